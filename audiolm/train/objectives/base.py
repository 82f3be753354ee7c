"""What one training loop asks of a masked model, a codec or a language model (DESIGN 1.5).

An objective owns a step: its modules, its batches, its losses.  The loop owns time: engines, schedule, checkpoints,
logs, resume.  A factory `(config, inputs, ctx) -> Objective` is a module-level function, so that it travels to workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn


@dataclass(frozen=True)
class Context:
    """Who and where this worker is."""

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

    def backward(self, loss: torch.Tensor, last: bool = True) -> None:
        """Adds the gradients of `loss`; `last` marks the last micro-batch of a step. Gradients are averaged over ranks."""

    def step(self) -> torch.Tensor:
        """Clips, updates, clears the gradients; returns the global gradient norm before clipping, on the device: the
        loop reads numbers only where it logs, so that a GPU's queue does not run dry."""


class Objective(Protocol):
    """Optional: `exported`, the name of the module whose weights are the export as they stand, so that every checkpoint
    can be loaded as one; `flops_per_unit`, floating-point operations of a unit's training, for MFU on GPUs."""

    modules: dict[str, nn.Module]  # one engine and optimizer each; built from (config, seed) alike on every rank
    unit: str  # what `units` counts: "audio s" or "tokens"

    def load(self, step: int, rows: Sequence[int]) -> Any:
        """Rows of step's global batch as CPU tensors. Depends on (seed, step, row) alone, never on rank or total steps.

        After a rollback (spike.py) `step` is the batch's number, which runs ahead of train_step's."""

    def train_step(self, engines: Mapping[str, Engine], batches: list[Any], step: int) -> dict[str, torch.Tensor]:
        """Forward, backward and engine steps over this rank's micro-batches; all ranks take part.

        Returns scalars already reduced over ranks (see engine.all_sum), among them "loss" and "units".
        """

    def evaluate(self) -> dict[str, float]:
        """Validation on held-out clips, all ranks take part, reduced; no randomness. "loss" (lower is better) says which
        checkpoint is the best; it is absent where there is nothing to compare yet, and present at the end."""

    def export(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(weights by name, JSON config) of what later steps load, for safetensors + JSON."""


Factory = Callable[[Mapping[str, Any], Mapping[str, Any], Context], Objective]
