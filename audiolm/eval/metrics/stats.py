"""Statistics that all metrics share: intervals by bootstrap over groups, and text tables.

Groups are speakers or clips, since values that share one are not independent.  Intervals are 95 %.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from audiolm import rng

RESAMPLES = 2000  # enough that the ends of an interval move by about 2 % of its width from seed to seed
QUANTILES = (0.025, 0.975)


def resampled(groups: int, seed: int, purpose: str = "bootstrap") -> np.ndarray:
    """(RESAMPLES, groups) float64: how often each resample draws each group, with replacement."""
    equal = np.full(groups, 1 / groups)
    return rng.generator(seed, purpose).multinomial(groups, equal, size=RESAMPLES).astype(np.float64)


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """(low, high) that hold 95 % of the resamples' values."""
    low, high = np.quantile(values, QUANTILES)
    return float(low), float(high)


def bootstrap_interval(values: Sequence[float], groups: Sequence[Any], seed: int = 0,
                       weights: Sequence[float] | None = None) -> tuple[float, float, float]:
    """(mean, low, high) of values, resampled by group; `weights` as for errors a word, weighted by words.

    Raises ValueError where there are no values.
    """
    if not len(values):
        raise ValueError("no values to average: give the suite at least one item")
    x = np.asarray(values, np.float64)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
    names, group_of = np.unique(np.asarray([str(g) for g in groups]), return_inverse=True)
    # Sums by group first: a resample is then one product of its draws, however many values a group has.
    sums, totals = (np.bincount(group_of, v, minlength=len(names)) for v in (w * x, w))
    drawn = resampled(len(names), seed)
    means = (drawn @ sums) / np.maximum(drawn @ totals, 1e-12)  # a resample may draw groups of weight 0 alone
    return float(sums.sum() / totals.sum()), *interval(means)


def text_table(lines: Sequence[Sequence[str]], notes: Iterable[str] = ()) -> str:
    """Cells in aligned columns, the first to the left and the others to the right, with the notes below."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join([f"{line[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in lines]
    return "\n".join([*text, "", *notes])
