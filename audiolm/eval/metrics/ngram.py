"""Interpolated modified Kneser-Ney models of id sequences (Chen and Goodman 1999), the baselines of the language models.

A sequence is rows laid end to end: x_N ids, depth_N the number of ids before each in its row.  A row's first id (BOS, or
the given id of a pair) is context alone, and no context reaches beyond it.  The highest order counts occurrences; lower
orders count different ids before a gram, or occurrences where it begins a row.  The lowest is mixed with the uniform law
over `support` ids.  All in float64: thousands of small chances are multiplied and logged.
Legend: N places, G grams of one order, C contexts (grams one shorter).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FALLBACK = (0.0, 0.5, 1.0, 1.5)  # discounts of counts 0, 1, 2, 3 and more, where too few counts give an estimate
END = np.iinfo(np.int64).max  # behind all keys, so that searchsorted always finds an entry


@dataclass(frozen=True)
class Order:
    """Grams of one length. Number -1 means a gram that was never counted: the last entry of share_G and left_C."""

    keys_G: np.ndarray  # sorted: first id x rest + number of the gram without it; END last
    rest: int  # grams one shorter
    share_G: np.ndarray  # discounted count over the total of the gram's context; 0 last
    left_C: np.ndarray  # weight that a context leaves to the order below; 1 last

    def number(self, first_N: np.ndarray, rest_N: np.ndarray) -> np.ndarray:
        """Numbers of the grams of a first id and the number of the rest; -1 where a gram was never counted."""
        key_N = np.where((first_N >= 0) & (rest_N >= 0), first_N * self.rest + rest_N, -1)
        at_N = np.searchsorted(self.keys_G, key_N)
        return np.where(self.keys_G[at_N] == key_N, at_N, -1)


@dataclass(frozen=True)
class KneserNey:
    """Orders from unigrams up."""

    orders: tuple[Order, ...]
    support: int

    def p(self, x_N: np.ndarray, depth_N: np.ndarray, w_N: np.ndarray) -> np.ndarray:
        """(N,) probability of id w_N in each place of a sequence, from the lowest order up."""
        p_N = np.full(len(x_N), 1 / self.support)
        gram_N, own_N, context_N = w_N, x_N, np.zeros(len(x_N), np.int64)  # numbers of grams that end in each place
        for m, order in enumerate(self.orders, 1):
            if m > 1:
                inside_N = depth_N >= m - 1  # elsewhere the context would begin before the row: the order below is used
                context_N = np.where(inside_N, np.roll(own_N, 1), -1)
                first_N = np.where(inside_N, np.roll(x_N, m - 1), -1)
                gram_N, own_N = order.number(first_N, gram_N), order.number(first_N, own_N)
            p_N = order.share_G[gram_N] + order.left_C[context_N] * p_N
        return p_N

    def nats(self, x_N: np.ndarray, depth_N: np.ndarray, no_repeat: bool = False) -> np.ndarray:
        """-log p of every id that is not the first of its row; `no_repeat`: none is equal to the one before."""
        p_N = self.p(x_N, depth_N, x_N)
        if no_repeat:  # renormalised: the other ids share the repeated id's probability
            p_N = p_N / np.where(depth_N > 1, 1 - self.p(x_N, depth_N, np.roll(x_N, 1)), 1)
        return -np.log(p_N[depth_N > 0])


def sequence(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(x_N, depth_N) of rows of ids."""
    lengths = np.array([len(r) for r in rows], np.int64)
    x_N = np.concatenate([*rows, np.empty(0, np.int64)]).astype(np.int64)
    return x_N, np.arange(len(x_N)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def fit(x_N: np.ndarray, depth_N: np.ndarray, order: int, ids: int, support: int, discounted: bool = True) -> KneserNey:
    """A model of grams of up to `order` ids; all ids are below `ids`, and `support` of them may follow a context.

    `discounted` False: relative frequencies after every context that was counted.
    """
    # Counting.  A gram of m ids is keyed by its first id and the number of the other m - 1, order after order.
    keys = [np.arange(ids)]
    raw, begins, context = [np.bincount(x_N[depth_N > 0], minlength=ids)], [np.zeros(ids, bool)], [np.zeros(ids, np.int64)]
    gram_N = x_N  # the number of the gram that ends in each place
    for m in range(2, order + 1):
        at = np.flatnonzero(depth_N >= m - 1)  # places with m - 1 ids before them in their row
        keys_G, first, number, count = np.unique(x_N[at - m + 1] * len(keys[-1]) + gram_N[at], return_index=True,
                                                 return_inverse=True, return_counts=True)
        keys, raw = [*keys, keys_G], [*raw, count]
        begins, context = [*begins, depth_N[at[first]] == m - 1], [*context, gram_N[at[first] - 1]]
        gram_N = np.full(len(x_N), -1)
        gram_N[at] = number
    # Discounting.  Lower orders use continuation counts: the different ids before a gram, not its occurrences.
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
    """(4,) discounts of counts 0, 1, 2, 3 and more, estimated from the numbers of grams of each count."""
    n = np.bincount(np.minimum(counts_G, 5), minlength=6).astype(float)
    if not n[1:5].all():  # the estimate divides by them
        return np.array(FALLBACK)
    d = np.array([0.0, *(i - (i + 1) * n[1] / (n[1] + 2 * n[2]) * n[i + 1] / n[i] for i in (1, 2, 3))])
    return d if (d[1:] > 0).all() else np.array(FALLBACK)


def mix(p_MN: np.ndarray, steps: int = 50) -> np.ndarray:
    """w_M: the weights of a mixture of M laws that maximise the likelihood of N held-out ids, by EM from equal weights."""
    w_M = np.full(len(p_MN), 1 / len(p_MN))
    for _ in range(steps):
        share_MN = w_M[:, None] * p_MN
        w_M = (share_MN / share_MN.sum(0)).sum(1) + 1  # one pseudo-count each, so that no weight becomes 0
        w_M /= w_M.sum()
    return w_M
