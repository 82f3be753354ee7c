"""Interpolated modified Kneser-Ney models of id sequences (Chen and Goodman 1999), the baselines of the language models.

A sequence is rows laid end to end: x_N ids, depth_N how many ids stand before each in its row.  A row's first id (BOS, or
whatever the next one is asked given) is context alone, and no context reaches beyond it.  The highest order counts
occurrences; lower ones count different ids before a gram, or occurrences where it begins a row.  The lowest is mixed with
the uniform law over `support` ids.  Legend: N places, G grams of one order, C contexts (grams one shorter).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FALLBACK = (0.0, 0.5, 1.0, 1.5)  # discounts of counts 0, 1, 2, 3 and more, where the counts of counts give none
END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Order:
    """Grams of one length. Number -1 stands for a gram that was never seen: the last entry of share_G and left_C."""

    keys_G: np.ndarray  # sorted: first id x rest + number of the gram without it; END last
    rest: int  # grams one shorter
    share_G: np.ndarray  # discounted count over the total of the gram's context; 0 last
    left_C: np.ndarray  # what a context leaves to the order below; 1 last

    def number(self, first_N: np.ndarray, rest_N: np.ndarray) -> np.ndarray:
        key_N = np.where((first_N >= 0) & (rest_N >= 0), first_N * self.rest + rest_N, -1)
        at_N = np.searchsorted(self.keys_G, key_N)
        return np.where(self.keys_G[at_N] == key_N, at_N, -1)


@dataclass(frozen=True)
class KneserNey:
    orders: tuple[Order, ...]
    support: int

    def p(self, x_N: np.ndarray, depth_N: np.ndarray, w_N: np.ndarray) -> np.ndarray:
        """The chance of id w_N in each place of a sequence."""
        p_N = np.full(len(x_N), 1 / self.support)
        gram_N, seen_N, context_N = w_N, x_N, np.zeros(len(x_N), np.int64)
        for m, order in enumerate(self.orders, 1):
            if m > 1:
                inside_N = depth_N >= m - 1  # elsewhere the context would begin before the row: the shorter one serves
                context_N = np.where(inside_N, np.roll(seen_N, 1), -1)
                first_N = np.where(inside_N, np.roll(x_N, m - 1), -1)
                gram_N, seen_N = order.number(first_N, gram_N), order.number(first_N, seen_N)
            p_N = order.share_G[gram_N] + order.left_C[context_N] * p_N
        return p_N

    def nats(self, x_N: np.ndarray, depth_N: np.ndarray, no_repeat: bool = False) -> np.ndarray:
        """-log p of every id that is not the first of its row; `no_repeat`: none is equal to the one before."""
        p_N = self.p(x_N, depth_N, x_N)
        if no_repeat:  # a proper law again: the rest of the ids share what the repeated one would have
            p_N = p_N / np.where(depth_N > 1, 1 - self.p(x_N, depth_N, np.roll(x_N, 1)), 1)
        return -np.log(p_N[depth_N > 0])


def sequence(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(x_N, depth_N) of rows of ids."""
    lengths = np.array([len(r) for r in rows], np.int64)
    x_N = np.concatenate([*rows, np.empty(0, np.int64)]).astype(np.int64)
    return x_N, np.arange(len(x_N)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def fit(x_N: np.ndarray, depth_N: np.ndarray, order: int, ids: int, support: int, discounted: bool = True) -> KneserNey:
    """A model of grams of up to `order` ids; all ids lie below `ids`, and `support` of them may follow a context. Without
    discounts, relative frequencies after every context that was seen."""
    keys = [np.arange(ids)]
    raw, begins, context = [np.bincount(x_N[depth_N > 0], minlength=ids)], [np.zeros(ids, bool)], [np.zeros(ids, np.int64)]
    gram_N = x_N  # the number of the gram that ends in each place
    for m in range(2, order + 1):
        at = np.flatnonzero(depth_N >= m - 1)
        found, first, number, count = np.unique(x_N[at - m + 1] * len(keys[-1]) + gram_N[at], return_index=True,
                                                return_inverse=True, return_counts=True)
        keys, raw = [*keys, found], [*raw, count]
        begins, context = [*begins, depth_N[at[first]] == m - 1], [*context, gram_N[at[first] - 1]]
        gram_N = np.full(len(x_N), -1)
        gram_N[at] = number
    orders = []
    for i, keys_G in enumerate(keys):
        counts_G = raw[i] if i == order - 1 else np.where(
            begins[i], raw[i], np.bincount(keys[i + 1] % len(keys_G), minlength=len(keys_G)))
        rest = len(keys[i - 1]) if i else 1
        off_G = (discounts(counts_G) if discounted else np.zeros(4))[np.minimum(counts_G, 3)]
        total_C, left_C = (np.bincount(context[i], v, minlength=rest) for v in (counts_G, off_G))
        share_G = (counts_G - off_G) / np.maximum(total_C, 1)[context[i]]
        orders.append(Order(np.append(keys_G, END), rest, np.append(share_G, 0.0),
                            np.append(np.where(total_C > 0, left_C / np.maximum(total_C, 1), 1.0), 1.0)))
    return KneserNey(tuple(orders), support)


def discounts(counts_G: np.ndarray) -> np.ndarray:
    """What to take from counts of 0, 1, 2, 3 and more, from how many grams there are of each count."""
    n = np.bincount(np.minimum(counts_G, 5), minlength=6).astype(float)
    if not n[1:5].all():
        return np.array(FALLBACK)
    d = np.array([0.0, *(i - (i + 1) * n[1] / (n[1] + 2 * n[2]) * n[i + 1] / n[i] for i in (1, 2, 3))])
    return d if (d[1:] > 0).all() else np.array(FALLBACK)


def mix(p_MN: np.ndarray, steps: int = 50) -> np.ndarray:
    """The weights w_M of a mixture of laws that make N held-out chances likeliest, by EM from equal ones."""
    w_M = np.full(len(p_MN), 1 / len(p_MN))
    for _ in range(steps):
        share_MN = w_M[:, None] * p_MN
        w_M = (share_MN / share_MN.sum(0)).sum(1) + 1  # a place for each, so that none is lost
        w_M /= w_M.sum()
    return w_M
