"""Results: rows of the paper's tables, each a value with its 95 % interval, its source and its role.

Intervals come from a bootstrap over groups (speakers, or clips), as values of one group are not independent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

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


STAGE_TITLES = {"lm_semantic": "semantic stage", "lm_coarse": "coarse stage", "lm_fine": "fine stage",
                "lm_parallel": "parallel decoder", "lm_decoder": "hearing decoder", "codec": "codec",
                "masked_model": "masked audio model"}
BASELINE_TITLES = {"unigram": "unigram", "bigram": "Kneser-Ney 2", "fivegram": "Kneser-Ney 5", "previous": "previous frame",
                   "below": "level below", "baseline": "the better"}
