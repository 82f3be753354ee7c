"""Rollback on a spike of the loss: training goes back to its newest checkpoint and passes over the rows that spiked.

A step spikes when its loss is not finite or lies above the median of the last `window` losses by `deviations` of their
spread (1.4826 x the median distance from the median: the standard deviation of a normal law, which a few wild losses do
not move).  The rows of a spike are one global batch; all later steps use the rows after it.  Losses are looked at in their
order where the loop looks anyway, before anything is saved, so what is found depends neither on that nor on the checkpoint
it goes back to.  Every checkpoint's record holds what is passed over and the window, so a resumed run is exact.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch

from audiolm.config import Train

MOST = 3  # rollbacks of a training


class Spiked(Exception):
    """The loss of a step spiked; `skipped` is what to pass over from now on."""

    def __init__(self, step: int, loss: float, skipped: list[dict[str, int]]):
        super().__init__(f"the loss is {loss} at step {step}")
        self.step, self.loss, self.skipped = step, loss, skipped


def rows_of(step: int, skipped: Sequence[Mapping[str, int]]) -> int:
    """Which global batch a step trains on: the step-th, from 0, of those that are not passed over."""
    for rows in sorted(s["rows"] for s in skipped):
        step += rows <= step
    return step


class Spikes:
    """The losses of a training as its rollback sees them; does nothing where `train.rollback` is None."""

    def __init__(self, train: Train, commit: Mapping[str, Any] | None, skipped: list[dict[str, int]] | None):
        """`commit` is the record that training starts from, `skipped` what was found since (None: what the record says)."""
        known = (commit or {}).get("spikes", {"skipped": [], "recent": []})
        self.train, self.rule = train, train.rollback
        self.skipped = known["skipped"] if skipped is None else skipped
        self.recent = deque(known["recent"], self.rule.window if self.rule else 0)
        self._unseen: list[tuple[int, torch.Tensor]] = []

    def add(self, step: int, loss: torch.Tensor) -> None:
        """Keeps a step's loss, reduced over ranks, on its device."""
        if self.rule:
            self._unseen.append((step, loss.detach()))

    def look(self) -> None:
        """Judges the losses since the last look. Raises Spiked, on all ranks alike; after the third, RuntimeError."""
        if not self._unseen:
            return
        values = torch.stack([loss for _, loss in self._unseen]).tolist()
        for (step, _), value in zip(self._unseen, values, strict=True):
            if self._is_spike(value):
                if len(self.skipped) == MOST:
                    before = ", ".join(str(s["step"] + 1) for s in self.skipped)
                    raise RuntimeError(f"the loss spiked to {value:.4g} at step {step + 1}, after {MOST} rollbacks for spikes "
                                       f"at steps {before}: single rows are not to blame. Look at train: lr {self.train.lr} "
                                       f"and clip {self.train.clip} (lower them), warmup_steps {self.train.warmup_steps} and "
                                       f"rollback.deviations {self.rule.deviations} (raise them)")
                raise Spiked(step, value, [*self.skipped, {"step": step, "rows": rows_of(step, self.skipped)}])
            self.recent.append(value)
        self._unseen.clear()

    def record(self) -> dict[str, Any]:
        """For the checkpoint's record. Call after `look`."""
        return {"spikes": {"skipped": self.skipped, "recent": list(self.recent)}} if self.rule else {}

    def facts(self) -> dict[str, Any]:
        return {"rollbacks": len(self.skipped)} if self.rule else {}

    def _is_spike(self, value: float) -> bool:
        if not math.isfinite(value):
            return True
        if len(self.recent) < self.rule.window:
            return False
        middle = median(self.recent)
        return value > middle + self.rule.deviations * 1.4826 * median(abs(x - middle) for x in self.recent)
