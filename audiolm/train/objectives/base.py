"""Interfaces between the training loop and the objectives: masked models, codec, vocoder, language models.

An objective owns a step: its modules, its batches, its losses.  The loop owns time: engines, schedule, checkpoints,
logs, resume.  A factory `(config, inputs, ctx) -> Objective` is a module-level function, so that it travels to workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from audiolm.models.transfer import pin
from audiolm.tokenizers.base import SAMPLE_RATE, SEMANTIC_HOP


@dataclass(frozen=True)
class Context:
    """This worker: its rank among `world`, its device, and what the run gives every worker alike."""

    rank: int
    world: int
    device: torch.device
    seed: int
    cache_mb: int = 512
    compile: bool = False  # torch.compile where an objective can use it


class Engine(Protocol):
    """A module under an optimizer; `deepspeed` and `torch` engines behave alike."""

    module: nn.Module

    def __call__(self, *args) -> Any:
        """The module's forward pass."""

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of `loss`, once a micro-batch. By `step` they are averaged over ranks."""

    def step(self) -> torch.Tensor:
        """Clips, updates, clears the gradients; returns the global gradient norm before clipping.

        The norm stays on the device: the loop reads numbers only where it logs, so that a GPU's queue does not run dry.
        """


class Objective(Protocol):
    """One kind of training.

    Optional attributes: `exported`, the name of the module whose weights are the export as they are, so that every
    checkpoint can be loaded as one; `flops_per_unit`, floating-point operations to train on one unit, for MFU on GPUs.
    """

    modules: dict[str, nn.Module]  # one engine and optimizer each; built from (config, seed) alike on every rank
    unit: str  # what `units` counts: "audio s", "tokens" or "frames"

    def load(self, step: int, rows: Sequence[int]) -> Any:
        """Rows of step's global batch as CPU tensors. Depends on (seed, step, row) alone, never on rank or total steps.

        After a rollback (guards.py) `step` is the batch's number, which runs ahead of train_step's.
        """

    def train_step(self, engines: Mapping[str, Engine], batches: list[Any], step: int) -> dict[str, torch.Tensor]:
        """Forward, backward and engine steps over this rank's micro-batches; all ranks take part.

        Returns scalars already reduced over ranks (see engine.all_sum), among them "loss" and "units".
        """

    def evaluate(self) -> dict[str, float]:
        """Validates on held-out clips without randomness; all ranks take part, and the result is reduced.

        "loss" (lower is better) decides which checkpoint is the best.  It is absent where there is nothing to compare
        yet, and present at the end.
        """

    def export(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(weights by name, JSON config) of what later steps load, for safetensors + JSON."""


Factory = Callable[[Mapping[str, Any], Mapping[str, Any], Context], Objective]


def whole_frames(seconds: float) -> int:
    """Semantic frames (640 samples, 25 Hz) nearest to a length, at least one."""
    return max(1, round(seconds * SAMPLE_RATE / SEMANTIC_HOP))


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """bfloat16 arithmetic on float32 weights where `dtype` is bfloat16, and nothing otherwise.

    bfloat16 has float32's exponents, so gradients do not underflow and no loss scaling is needed.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def pinned(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The batch in page-locked memory on its way to a GPU: such a copy does not wait for the GPU's queue."""
    return {name: pin(x, device) for name, x in batch.items()}
