"""Kneser-Ney models against a plain-Python reading of the definition; proper laws; known laws are recovered."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from audiolm.eval.metrics import ngram

IDS, BOS = 7, 6  # ids 0 to 5 may follow


def rows(n=60, seed=0, law=0.6):
    """BOS and up to 14 ids; an id is often the sum of the two before."""
    draw, sequences = np.random.default_rng(seed), []
    for _ in range(n):
        row = [BOS]
        for _ in range(draw.integers(0, 15)):
            row.append(sum(row[-2:]) % BOS if draw.random() < law else int(draw.integers(BOS)))
        sequences.append(np.array(row))
    return sequences


class Slow:
    """The definition, gram by gram."""

    def __init__(self, rows, order):
        self.order = order
        grams = [Counter() for _ in range(order + 1)]
        for row in (r.tolist() for r in rows):
            for end in range(1, len(row)):
                for m in range(1, min(order, end + 1) + 1):
                    grams[m][tuple(row[end - m + 1:end + 1])] += 1
        self.counts = list(grams)
        for m in range(1, order):
            before = defaultdict(set)
            for g in grams[m + 1]:
                before[g[1:]].add(g[0])
            self.counts[m] = {g: n if g[0] == BOS else len(before[g]) for g, n in grams[m].items()}
        self.off = [self.discounts(Counter(c.values())) if c else None for c in self.counts]

    @staticmethod
    def discounts(n):
        if not all(n[i] for i in (1, 2, 3, 4)):
            return [0, 0.5, 1.0, 1.5]
        y = n[1] / (n[1] + 2 * n[2])
        d = [0, 1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]]
        return d if min(d[1:]) > 0 else [0, 0.5, 1.0, 1.5]

    def p(self, context, w):
        context = tuple(context[len(context) - self.order + 1:] if len(context) >= self.order else context)
        below = self.p(context[1:], w) if context else 1 / BOS
        after = {g[-1]: n for g, n in self.counts[len(context) + 1].items() if g[:-1] == context}
        total = sum(after.values())
        if not total:
            return below
        off = {i: self.off[len(context) + 1][min(n, 3)] for i, n in after.items()}
        return (after.get(w, 0) - off.get(w, 0)) / total + sum(off.values()) / total * below


@pytest.mark.parametrize("n, law", [(60, 0.6), (400, 0.9), (3, 0.5)])
@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_every_chance_is_the_definitions(order, n, law):
    train, held_out = rows(n, law=law), rows(12, seed=1)
    fast, slow = ngram.fit(*ngram.sequence(train), order, IDS, BOS), Slow(train, order)
    expected = [slow.p(r[:i].tolist(), int(r[i])) for r in held_out for i in range(1, len(r))]
    np.testing.assert_allclose(fast.nats(*ngram.sequence(held_out)), -np.log(expected), rtol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 5])
@pytest.mark.parametrize("no_repeat", [False, True])
def test_chances_sum_to_one_after_seen_and_unseen_contexts(order, no_repeat):
    train = [r[np.r_[True, r[1:] != r[:-1]]] for r in rows(30)] if no_repeat else rows(30)
    model = ngram.fit(*ngram.sequence(train), order, IDS, BOS)
    for context in ([BOS], [BOS, 3], [BOS, 3, 1, 4, 5], [BOS, 5, 0, 5, 0, 5, 0, 5], [BOS, *train[1][1:9]]):
        legal = [w for w in range(BOS) if not (no_repeat and w == context[-1])]
        p = [np.exp(-model.nats(*ngram.sequence([np.array([*context, w])]), no_repeat)[-1]) for w in legal]
        assert min(p) > 0 and sum(p) == pytest.approx(1, abs=1e-12)


def test_knowing_that_nothing_repeats_is_the_stronger_baseline():
    train, held_out = ([r[np.r_[True, r[1:] != r[:-1]]] for r in rows(40, seed=s)] for s in (0, 1))
    for order in (1, 2, 5):
        model, places = ngram.fit(*ngram.sequence(train), order, IDS, BOS), ngram.sequence(held_out)
        knowing, plain = model.nats(*places, no_repeat=True), model.nats(*places)
        assert (knowing <= plain).all() and knowing.mean() < plain.mean() - 0.02


def test_a_second_order_law_needs_three_ids():
    train, held_out = rows(2000, law=0.9), rows(200, seed=1, law=0.9)
    one, two, three, five = (ngram.fit(*ngram.sequence(train), n, IDS, BOS).nats(*ngram.sequence(held_out)).mean()
                             for n in (1, 2, 3, 5))
    p = 0.9 + 0.1 / BOS
    entropy = -p * np.log(p) - 5 * 0.1 / BOS * np.log(0.1 / BOS)
    assert entropy - 0.05 < three < entropy + 0.05 and three < two - 0.3 and two < one + 0.01
    assert abs(five - three) < 0.05  # more context than there is a law for costs little


def test_pairs_and_nothing_at_all():
    x_N = np.array([0, 1] * 30 + [2, 3] * 10)  # 1 follows 0, and 3 follows 2
    model = ngram.fit(x_N, np.arange(len(x_N)) % 2, 2, 4, 4)
    held_out = model.nats(np.array([0, 1, 2, 3, 0, 3]), np.array([0, 1] * 3))
    assert len(held_out) == 3 and held_out[:2].max() < 0.1 and held_out[2] > 2
    for order in (1, 2, 5):
        empty = ngram.fit(*ngram.sequence([]), order, IDS, BOS)
        np.testing.assert_allclose(empty.nats(*ngram.sequence(rows(3))), np.log(BOS))


def test_relative_frequencies_and_the_weights_of_a_mixture():
    x_N, depth_N = np.array([0, 1, 0, 1, 0, 2]), np.array([0, 1] * 3)
    plain = ngram.fit(x_N, depth_N, 2, 4, 4, discounted=False)
    np.testing.assert_allclose(plain.p(x_N, depth_N, x_N)[1::2], [2 / 3, 2 / 3, 1 / 3])
    draw, laws = np.random.default_rng(0), np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    seen = draw.choice(3, 20_000, p=np.array([0.6, 0.4]) @ laws)
    np.testing.assert_allclose(ngram.mix(laws[:, seen]), [0.6, 0.4], atol=0.03)
    np.testing.assert_allclose(ngram.mix(laws[:, :0]), [0.5, 0.5])
