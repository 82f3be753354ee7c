"""Results: rows of the paper's tables, each a value with its 95 % interval, its source and its role.

Intervals come from a bootstrap over groups (speakers, or clips), as values of one group are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from audiolm import rng

DRAWS = 2000  # bootstrap resamples
ROLES = ("ours", "ceiling", "floor", "baseline")
Progress = Callable[[int, int, str], object]  # (done, total, unit)


@dataclass(frozen=True)
class Result:
    """A row of `table`: I, II, III or IV as in the paper, else a name.

    `n` counts `of` (clips, pairs, crops).  A `value` of None is not measured, and `note` names the reason and the fix.
    `role`: ours; ceiling (the original, the codec); floor (chance, shuffled tokens); baseline (counting, duration)."""

    table: str
    item: str
    metric: str  # with its unit: "WER %"
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    of: str = "clips"
    role: str = "ours"
    paper: float | None = None  # the paper's value
    seconds: float = 0.0  # of computing
    note: str = ""

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r} of {self.item!r} is none of {', '.join(ROLES)}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def no_progress(done: int, total: int, unit: str) -> None:
    """Ignores progress: the default where no caller follows it."""


def not_measured(table: str, item: str, metric: str, why: str, paper: float | None = None) -> Result:
    """A row without a value, so that a missing package or missing data stay visible; `why` names the fix."""
    return Result(table, item, metric, None, paper=paper, note=why)


def bootstrap_interval(values: Sequence[float], groups: Sequence[Any], seed: int = 0,
                       weights: Sequence[float] | None = None) -> tuple[float, float, float]:
    """(mean, low, high) of values, weighted (error rates by their words, say) and resampled by group.

    Raises ValueError where there are none."""
    if not len(values):
        raise ValueError("no values to average: give the suite at least one item")
    x = np.asarray(values, np.float64)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
    names, of = np.unique(np.asarray([str(g) for g in groups]), return_inverse=True)
    sums, totals = (np.bincount(of, v, minlength=len(names)) for v in (w * x, w))
    # How often each group is drawn: (DRAWS, groups). Counts suffice, as a mean needs only the groups' sums.
    counts = rng.generator(seed, "bootstrap").multinomial(len(names), np.full(len(names), 1 / len(names)), size=DRAWS)
    means = (counts @ sums) / np.maximum(counts @ totals, 1e-12)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(sums.sum() / totals.sum()), float(low), float(high)


STAGE_TITLES = {"lm_semantic": "semantic stage", "lm_coarse": "coarse stage", "lm_fine": "fine stage", "codec": "codec",
                "masked_model": "masked audio model"}
BASELINE_TITLES = {"unigram": "unigram", "bigram": "Kneser-Ney 2", "fivegram": "Kneser-Ney 5", "previous": "previous frame",
                   "below": "level below", "baseline": "the better"}
