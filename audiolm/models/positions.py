"""Token positions (paper III-C): rotary position embeddings (2104.09864), or T5's learned bias by distance.

Shapes: positions (...) int64 from 0 within a document; cos, sin (..., width of a head); bias_HTT float32, added to the
scores of head h, query i and key j.  One bias table serves all layers.  Half of its buckets hold one distance each, the
others grow evenly in the logarithm up to MAX_DISTANCE; distances beyond share the last bucket (T5, 1910.10683, 2.1).
"""

from __future__ import annotations

import math

import torch
from torch import nn

ROTARY_BASE = 10_000.0  # 2104.09864
BUCKETS, MAX_DISTANCE = 32, 128  # as T5; the distance in tokens

Rope = tuple[torch.Tensor, torch.Tensor]  # cosines and signed sines, (..., width) each


def rope_table(positions: torch.Tensor, width: int) -> Rope:
    """Cosines and signed sines (..., width) of positions, in float32: bfloat16 cannot hold positions above 256."""
    half = torch.arange(width // 2, device=positions.device, dtype=torch.float32)
    angles = positions.float()[..., None] * ROTARY_BASE ** (-2.0 * half / width)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, fused: bool = True) -> torch.Tensor:
    """Rotates the pairs (i, i + width/2) of the last axis; sin carries the sign of its half.

    `fused` rounds once, as the Transformer does; the encoder rounds its products and their sum, in float32.
    """
    y = x if fused else x.float()
    other = y.roll(x.shape[-1] // 2, -1)
    return (torch.addcmul(y * cos, other, sin) if fused else y * cos + other * sin).to(x.dtype)


def distance_buckets() -> torch.Tensor:
    """The bucket of every distance 0 .. MAX_DISTANCE - 1."""
    exact = BUCKETS // 2
    growth = (BUCKETS - exact) / math.log(MAX_DISTANCE / exact)
    return torch.tensor([*range(exact), *(exact + int(math.log(d / exact) * growth) for d in range(exact, MAX_DISTANCE))])


class RelativePositionBias(nn.Module):
    """Learned bias of every head at each distance in tokens."""

    def __init__(self, heads: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(BUCKETS, heads))
        self.register_buffer("bucket_L", distance_buckets(), persistent=False)

    def forward(self, length: int) -> torch.Tensor:
        """bias_HTT, -inf where a key comes after the query."""
        bias_HL = self.at(torch.arange(length, device=self.table.device)).T
        # Row i holds the same vector u, shifted by i places: u[(j - i) mod 2T].  Copies and views only, because a
        # lookup of T x T distances has a backward pass that adds T x T numbers into 32 places.
        later = bias_HL.new_full((len(bias_HL), length), -torch.inf)
        u_HU = torch.cat([bias_HL[:, :1], later, bias_HL[:, 1:].flip(1)], 1)
        shifted = u_HU[:, None].expand(-1, length, -1).flatten(1)[:, :length * (2 * length - 1)]
        return shifted.view(-1, length, 2 * length - 1)[..., :length]

    def at(self, distance: torch.Tensor) -> torch.Tensor:
        """(..., H) at distances (...) from 0."""
        return self.table[self.bucket_L[distance.clamp(0, len(self.bucket_L) - 1)]]
