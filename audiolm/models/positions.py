"""Where a token stands (paper III-C): rotary angles, or T5's learned bias by distance, one table for all layers.

Shapes: positions (...) int64 from 0 within a document; cos, sin (..., width of a head); bias_HTT float32, added to the
scores of head h, query i and key j.  The bias knows every distance below `longest`: half of its buckets hold one distance
each, the others grow evenly in the logarithm up to the longest, and what lies beyond shares the last.
"""

from __future__ import annotations

import math

import torch
from torch import nn

ROTARY_BASE = 10_000.0
BUCKETS = 32  # as T5


def rotary(positions: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines (..., width) in float32: positions do not fit in bfloat16."""
    half = torch.arange(width // 2, device=positions.device, dtype=torch.float32)
    angles = positions.float()[..., None] * ROTARY_BASE ** (-2.0 * half / width)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (i, i + width/2) of the last axis; sin carries the sign of its half."""
    y = torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
    return y.to(x.dtype)


def distance_buckets(longest: int) -> torch.Tensor:
    """The bucket of every distance 0 .. longest - 1."""
    exact = BUCKETS // 2
    grown = [int(math.log(d / exact) / math.log(longest / exact) * (BUCKETS - exact)) for d in range(exact, longest)]
    return torch.tensor([*range(min(exact, longest)), *(min(exact + g, BUCKETS - 1) for g in grown)])


class RelativePositionBias(nn.Module):
    """What every head adds to a score at each distance; `longest` in tokens."""

    def __init__(self, heads: int, longest: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(BUCKETS, heads))
        self.register_buffer("bucket_L", distance_buckets(longest), persistent=False)

    def forward(self, length: int) -> torch.Tensor:
        """bias_HTT, -inf where a key comes after the query."""
        by_HT = self.at(torch.arange(length, device=self.table.device)).T
        # Row i holds one and the same vector u, i places further on: u[(j - i) mod 2T].  Copies and views alone, since
        # looking up T x T distances has a backward pass that adds T x T numbers into 32 places.
        later = by_HT.new_full((len(by_HT), length), -torch.inf)
        u_HU = torch.cat([by_HT[:, :1], later, by_HT[:, 1:].flip(1)], 1)
        turned = u_HU[:, None].expand(-1, length, -1).flatten(1)[:, :length * (2 * length - 1)]
        return turned.view(-1, length, 2 * length - 1)[..., :length]

    def at(self, distance: torch.Tensor) -> torch.Tensor:
        """(..., H) at distances (...) from 0."""
        return self.table[self.bucket_L[distance.clamp(0, len(self.bucket_L) - 1)]]
