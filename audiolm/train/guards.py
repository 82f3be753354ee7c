"""Guards of a training: early stopping, numbers that are not finite, rollback from spikes of the loss, and a watchdog.

Early stopping ends a training after `train.patience` validations without a new best.  A loss or weight that is not
finite raises, before anything is saved.  A spike sends all ranks back to the newest checkpoint; the batch that spiked
is skipped from then on (PaLM, 2204.02311 5.1, did so by hand).

A step spikes when its loss is not finite or exceeds the median of the last `window` losses by `deviations` of their spread.
Losses are checked in step order, whenever the loop logs, so the schedule of logs and saves changes no decision.
Every checkpoint's record holds the skipped batches and the window, so a resumed run is exact.
A collapsed model has finite numbers: objectives/alarms.py reports it, and eval/stage_gates.py stops the stage that follows.
"""

from __future__ import annotations

import faulthandler
import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn

from audiolm.config.training import TrainConfig
from audiolm.train.engine import all_sum

MAX_ROLLBACKS = 3  # of a training: after more, single batches are not to blame
NORMAL_SPREAD = 1.4826  # median distance from the median -> standard deviation of a normal law; wild losses hardly move it
STALL_S = 3600.0  # longer than a compilation, a step or a validation of any size


# --- watchdog

def alive() -> None:
    """Notes progress: without another note for STALL_S the process ends with its stacks on stderr, to be started again.

    A collective or a network disk that hangs raises nothing and never comes back by itself.
    """
    faulthandler.dump_traceback_later(STALL_S, exit=True, file=2)


def ended() -> None:
    faulthandler.cancel_dump_traceback_later()


# --- early stopping

def out_of_patience(train: TrainConfig, done: int, best_step: int | None) -> bool:
    """True when the training ends after `done` steps, the best validation so far being that of `best_step`."""
    return train.patience is not None and best_step is not None and done - best_step >= train.patience * train.eval_every


def stop_facts(train: TrainConfig, done: int, best_step: int | None) -> dict:
    """Facts for final.json about a training that ended before its last step; none of one that did not."""
    if done == train.steps:
        return {}
    return {"stopped_at": done, "notes": [f"stopped at step {done} of {train.steps}: {train.patience} validations were no "
                                          f"better than step {best_step}'s"]}


# --- finite numbers

def check_loss(value: float, name: str, done: int, train: TrainConfig) -> None:
    """Raises FloatingPointError, naming the settings to look at, for a value that is not finite after `done` steps."""
    if not math.isfinite(value):
        raise FloatingPointError(f"the {name} is {value} at step {done}: {_advice(train)}")


def check_weights(modules: Mapping[str, nn.Module], done: int, train: TrainConfig) -> None:
    """The same for weights and buffers. All ranks take part: under ZeRO 3 each holds a part of them."""
    tensors = [getattr(t, "ds_tensor", t) for m in modules.values() for t in m.state_dict(keep_vars=True).values()]
    # One sum, and so one read from the device, before each save.
    broken = all_sum(torch.stack([(~t.isfinite()).any() for t in tensors if t.is_floating_point()]).sum())
    if broken:
        raise FloatingPointError(f"weights are not finite after step {done}, and are not saved: {_advice(train)}")


def _advice(train: TrainConfig) -> str:
    return (f"look at train: lr {train.lr} and clip {train.clip} (lower them; clip 0 is none), warmup_steps "
            f"{train.warmup_steps} (raise it), dtype {train.dtype} (try float32); then at the input: silent audio, or code "
            "usage in the token steps' facts. The last checkpoint is sound")


# --- spikes

class LossSpike(Exception):
    """The loss of a step spiked; `skipped` lists this batch and the ones before it: {"step", "rows" (batch number)}."""

    def __init__(self, step: int, loss: float, skipped: list[dict[str, int]]):
        super().__init__(f"the loss is {loss} at step {step}")
        self.step, self.loss, self.skipped = step, loss, skipped


def batch_number(step: int, skipped: Sequence[Mapping[str, int]]) -> int:
    """The global batch of a step, from 0: the step-th of those that are not skipped."""
    for number in sorted(s["rows"] for s in skipped):
        step += number <= step
    return step


class SpikeGuard:
    """Losses of a training since its last check, and the window before them; idle where `train.rollback` is None."""

    def __init__(self, train: TrainConfig, commit: Mapping[str, Any] | None, skipped: list[dict[str, int]] | None):
        """`commit` is the record that training starts from, `skipped` what has spiked since (None: what the record says)."""
        record = (commit or {}).get("spikes", {"skipped": [], "recent": []})
        self.train, self.rule = train, train.rollback
        self.skipped = record["skipped"] if skipped is None else skipped
        self.recent = deque(record["recent"], self.rule.window if self.rule else 0)
        self._unchecked: list[tuple[int, torch.Tensor]] = []

    def add(self, step: int, loss: torch.Tensor) -> None:
        """Keeps a step's loss, reduced over ranks, on its device."""
        if self.rule:
            self._unchecked.append((step, loss.detach()))

    def check(self) -> None:
        """Checks the losses since the last call. Raises LossSpike, on all ranks alike; after the third, RuntimeError."""
        if not self._unchecked:
            return
        values = torch.stack([loss for _, loss in self._unchecked]).tolist()
        for (step, _), value in zip(self._unchecked, values, strict=True):
            if self._is_spike(value):
                if len(self.skipped) == MAX_ROLLBACKS:
                    raise RuntimeError(self._giving_up(step, value))
                raise LossSpike(step, value, [*self.skipped, {"step": step, "rows": batch_number(step, self.skipped)}])
            self.recent.append(value)  # a spike itself never widens the window's spread
        self._unchecked.clear()

    def record(self) -> dict[str, Any]:
        """For the checkpoint's record. Call after `check`."""
        return {"spikes": {"skipped": self.skipped, "recent": list(self.recent)}} if self.rule else {}

    def facts(self) -> dict[str, Any]:
        return {"rollbacks": len(self.skipped)} if self.rule else {}

    def _is_spike(self, value: float) -> bool:
        if not math.isfinite(value):
            return True
        if len(self.recent) < self.rule.window:
            return False
        middle = median(self.recent)
        return value > middle + self.rule.deviations * NORMAL_SPREAD * median(abs(x - middle) for x in self.recent)

    def _giving_up(self, step: int, value: float) -> str:
        before = ", ".join(str(s["step"] + 1) for s in self.skipped)
        return (f"the loss spiked to {value:.4g} at step {step + 1}, after {MAX_ROLLBACKS} rollbacks for spikes at steps "
                f"{before}: single rows are not to blame. Look at train: lr {self.train.lr} and clip {self.train.clip} "
                f"(lower them), warmup_steps {self.train.warmup_steps} and rollback.deviations {self.rule.deviations} "
                "(raise them)")
