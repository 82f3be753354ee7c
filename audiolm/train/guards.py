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
from torch import nn

from audiolm.config.training import TrainConfig
from audiolm.train.engine import all_sum


def out_of_patience(train: TrainConfig, done: int, best_step: int | None) -> bool:
    """True when the training ends after `done` steps, the best validation so far being that of `best_step`."""
    return train.patience is not None and best_step is not None and done - best_step >= train.patience * train.eval_every


def stop_facts(train: TrainConfig, done: int, best_step: int | None) -> dict:
    """What final.json says of a training that ended before its steps; nothing of one that did not."""
    if done == train.steps:
        return {}
    return {"stopped_at": done, "notes": [f"stopped at step {done} of {train.steps}: {train.patience} validations were no "
                                          f"better than step {best_step}'s"]}


def check_loss(value: float, name: str, done: int, train: TrainConfig) -> None:
    """Raises FloatingPointError naming what to look at for a value that is not finite after `done` steps."""
    if not math.isfinite(value):
        raise FloatingPointError(f"the {name} is {value} at step {done}: {_first_bad(train)}")


def check_weights(modules: Mapping[str, nn.Module], done: int, train: TrainConfig) -> None:
    """The same for weights and buffers. All ranks take part: each may hold a part of them."""
    tensors = [t for m in modules.values() for t in m.state_dict().values() if t.is_floating_point()]
    spoiled = all_sum(torch.stack([(~t.isfinite()).any() for t in tensors]).sum())
    if spoiled:
        raise FloatingPointError(f"weights are not finite after step {done}, and are not saved: {_first_bad(train)}")


def _first_bad(train: TrainConfig) -> str:
    return (f"look at train: lr {train.lr} and clip {train.clip} (lower them; clip 0 is none), warmup_steps "
            f"{train.warmup_steps} (raise it), dtype {train.dtype} (try float32); then at the input: silent audio, or code "
            "usage in the token steps' facts. The last checkpoint is sound")


MAX_ROLLBACKS = 3  # rollbacks of a training


class LossSpike(Exception):
    """The loss of a step spiked; `skipped` is what to pass over from now on."""

    def __init__(self, step: int, loss: float, skipped: list[dict[str, int]]):
        super().__init__(f"the loss is {loss} at step {step}")
        self.step, self.loss, self.skipped = step, loss, skipped


def rows_of(step: int, skipped: Sequence[Mapping[str, int]]) -> int:
    """Which global batch a step trains on: the step-th, from 0, of those that are not passed over."""
    for rows in sorted(s["rows"] for s in skipped):
        step += rows <= step
    return step


class SpikeGuard:
    """The losses of a training as its rollback sees them; does nothing where `train.rollback` is None."""

    def __init__(self, train: TrainConfig, commit: Mapping[str, Any] | None, skipped: list[dict[str, int]] | None):
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
                if len(self.skipped) == MAX_ROLLBACKS:
                    before = ", ".join(str(s["step"] + 1) for s in self.skipped)
                    raise RuntimeError(f"the loss spiked to {value:.4g} at step {step + 1}, after {MAX_ROLLBACKS} rollbacks for spikes "
                                       f"at steps {before}: single rows are not to blame. Look at train: lr {self.train.lr} "
                                       f"and clip {self.train.clip} (lower them), warmup_steps {self.train.warmup_steps} and "
                                       f"rollback.deviations {self.rule.deviations} (raise them)")
                raise LossSpike(step, value, [*self.skipped, {"step": step, "rows": rows_of(step, self.skipped)}])
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
