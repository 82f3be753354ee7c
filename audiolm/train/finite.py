"""A loss or weight that is not finite ends a training, and never ends in a checkpoint or an export.

The loss is looked at where it is logged, validated or saved and nowhere else, so that a GPU's queue does not run dry; the
weights before each save, since one update may spoil them after a loss that was fine.  All ranks raise alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from audiolm.config import Train
from audiolm.train.engine import all_sum


def check_loss(value: float, name: str, done: int, train: Train) -> None:
    """Raises FloatingPointError naming what to look at for a value that is not finite after `done` steps."""
    if not math.isfinite(value):
        raise FloatingPointError(f"the {name} is {value} at step {done}: {_look_at(train)}")


def check_weights(modules: Mapping[str, nn.Module], done: int, train: Train) -> None:
    """The same for weights and buffers. All ranks take part: each may hold a part of them."""
    tensors = [t for m in modules.values() for t in m.state_dict().values() if t.is_floating_point()]
    spoiled = all_sum(torch.stack([(~t.isfinite()).any() for t in tensors]).sum())
    if spoiled:
        raise FloatingPointError(f"weights are not finite after step {done}, and are not saved: {_look_at(train)}")


def _look_at(train: Train) -> str:
    return (f"look at train: lr {train.lr} and clip {train.clip} (lower them; clip 0 is none), warmup_steps "
            f"{train.warmup_steps} (raise it), dtype {train.dtype} (try float32); then at the input: silent audio, or code "
            "usage in the token steps' facts. The last checkpoint is sound")
