"""Output heads, one for each slot of a frame: a slot's scores are over its own ids alone (paper III-C).

One matrix holds the rows of all slots' ids, slot after slot.  Scores never dominate memory: they are computed a piece of
targets at a time, and again in the backward pass.
Shapes: h_ND; index_SN, the rows of h that predict each slot's targets; label_SN, the target's row within its slot,
NO_TARGET where a place is empty; W is the widest slot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

NO_TARGET = -100
Table = tuple[torch.Tensor, torch.Tensor | None]  # of a slot: weight (ids, D), bias (ids)
PIECE = 8192  # targets scored at once, at most: 32 MB at 1,024 ids in float32
TILE = 128  # rows that a GPU's matrix product computes at once
# Rows of a training product's weights are a multiple of it, by device: tensor cores read whole groups of ids, and 1,024
# codes with EOS are 1,025.
ALIGN = {"cuda": 64}


class LevelHeads(nn.Module):
    """Linear heads of `sizes` ids each. `bias` is None, or a bias of every id, set where tied tables were folded in."""

    def __init__(self, dim: int, sizes: Sequence[int]):
        super().__init__()
        self.sizes = tuple(sizes)
        self.weight = nn.Parameter(torch.empty(sum(sizes), dim))
        self.register_buffer("bias", None, persistent=False)

    def _apply(self, fn, recurse=True):
        bias = self.bias
        super()._apply(fn, recurse)
        if bias is not None:  # follows a cast to its device, unrounded
            self.bias = bias.to(self.weight.device)
        return self

    def forward(self, h_ND: torch.Tensor, index_SN: torch.Tensor, label_SN: torch.Tensor, piece: int = PIECE,
                tables: Sequence[Table] | None = None) -> torch.Tensor:
        """nats_SN float32 of the targets, 0 for empty places; `piece`: targets scored at once, at most.

        `tables`: in place of the module's own.
        """
        piece = even_piece(index_SN.shape[1], piece)
        return torch.stack([torch.cat([self._nats(h_ND, *table, *part) for part in
                                       zip(index_N.split(piece), label_N.split(piece), strict=True)])
                            for table, index_N, label_N in zip(tables or self.by_slot(), index_SN, label_SN, strict=True)])

    def by_slot(self) -> list[Table]:
        """Each slot's table."""
        biases = [None] * len(self.sizes) if self.bias is None else self.bias.split(self.sizes)
        return list(zip(self.weight.split(self.sizes), biases, strict=True))

    def _nats(self, *args: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return _nats(*args)
        # nothing is random here, so no random state needs to be kept for the second pass
        return checkpoint(_nats, *args, use_reentrant=False, preserve_rng_state=False)

    def scores(self, h_BD: torch.Tensor, slots: Sequence[int] | None) -> torch.Tensor:
        """scores_BW float32 of row b in slot slots[b], -inf beyond the slot's ids; None: scores_BV of all slots' ids.

        One product a slot, over all rows: its shape, and so its rounding, does not depend on the other rows' slots.  One
        product of all ids serves where only the device knows the slots, as in a CUDA graph.
        """
        if slots is None:
            return _scores(h_BD, self.weight, self.bias)
        own, widest = self.by_slot(), max(self.sizes)
        by_slot = {s: F.pad(_scores(h_BD, *own[s]), (0, widest - self.sizes[s]), value=-torch.inf) for s in sorted(set(slots))}
        if len(by_slot) == 1:  # all rows in one slot, the usual case of a batch in step
            return next(iter(by_slot.values()))[:len(slots)]
        return torch.stack([by_slot[s][b] for b, s in enumerate(slots)])


def even_piece(n: int, most: int) -> int:
    """Size of the pieces that n targets are scored in: whole tiles, as few and as even as `most` allows."""
    even = math.ceil(n / max(1, math.ceil(n / most)))
    return max(1, min(most, TILE * math.ceil(even / TILE)))


def _scores(h_ND: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, align: int = 1) -> torch.Tensor:
    ids = len(weight)
    if ids % align:  # zero rows, whose scores are dropped
        scores = F.linear(h_ND, F.pad(weight, (0, 0, 0, -ids % align)))[:, :ids].float()
    else:
        scores = F.linear(h_ND, weight).float()
    return scores if bias is None else scores + bias.float()  # in float32: a bfloat16 bias of 16 is off by 0.06


def _nats(h_ND: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, index_N: torch.Tensor,
          label_N: torch.Tensor) -> torch.Tensor:
    scores = _scores(h_ND[index_N], weight, bias, ALIGN.get(h_ND.device.type, 1))
    return F.cross_entropy(scores, label_N, ignore_index=NO_TARGET, reduction="none")
