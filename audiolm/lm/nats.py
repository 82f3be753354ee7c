"""Negative log-likelihood of a stage's targets in nats, by level: one rule for training, validation and evaluation.

Shapes: logits_BTV (entry t predicts ids t + 1), ids_BT, target_BT (the id carries loss); N targets, row after row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def target_nats(logits_BTV: torch.Tensor, ids_BT: torch.Tensor, target_BT: torch.Tensor,
                levels_V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(nats_N float32, levels_N) of the targets; levels_V is Stage.level_table(), -1 being semantic."""
    wanted_BT = target_BT[:, 1:]
    ids_N = ids_BT[:, 1:][wanted_BT]
    return F.cross_entropy(logits_BTV[:, :-1][wanted_BT].float(), ids_N, reduction="none"), levels_V[ids_N]


def by_level(nats_N: torch.Tensor, levels_N: torch.Tensor, n: int) -> torch.Tensor:
    """float64 (2, n): nats and number of the targets, summed at level + 1."""
    sums = torch.zeros(2, n, dtype=torch.float64, device=nats_N.device)
    sums[0].index_add_(0, levels_N + 1, nats_N.double())
    sums[1].index_add_(0, levels_N + 1, torch.ones_like(nats_N, dtype=torch.float64))
    return sums
