"""Results of metrics: rows for the paper's tables, each a value with its 95 % interval and its provenance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

ROLES = ("ours", "ceiling", "floor", "baseline")
Progress = Callable[[int, int, str], object]  # done, of how many, unit


@dataclass(frozen=True)
class Result:
    """A value of `table` (I, II, III, IV as in the paper, else a name). `n` counts `of` (clips, pairs, crops).

    value None: not measured; `note` gives the reason and the fix. role: ours; ceiling (the original, the codec); floor
    (chance, shuffled tokens); baseline (counting, duration).
    """

    table: str
    item: str
    metric: str  # with its unit: "WER %"
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    of: str = "clips"
    role: str = "ours"
    paper: float | None = None
    seconds: float = 0.0  # time that measuring took
    note: str = ""

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r} of {self.item!r} is none of {', '.join(ROLES)}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def no_progress(done: int, total: int, unit: str) -> None:
    """Ignores progress."""


def not_measured(table: str, item: str, metric: str, why: str, paper: float | None = None) -> Result:
    """A row without a value, which shows that an optional package or data are missing."""
    return Result(table, item, metric, None, paper=paper, note=why)


STAGE_TITLES = {"lm_semantic": "semantic stage", "lm_coarse": "coarse stage", "lm_fine": "fine stage", "codec": "codec",
         "masked_model": "masked audio model"}
BASELINE_TITLES = {"unigram": "unigram", "bigram": "Kneser-Ney 2", "fivegram": "Kneser-Ney 5", "previous": "previous frame",
             "below": "level below", "baseline": "the better"}
