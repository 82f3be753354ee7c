"""ConvNeXt blocks over frames (2201.03545), causal or looking both ways; shapes: x_BTD."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

KERNEL = 7


class Block(nn.Module):
    """A convolution within each channel, then a wide layer within each frame, added to the input."""

    def __init__(self, dim: int, causal: bool):
        super().__init__()
        self.pad = (KERNEL - 1, 0) if causal else (KERNEL // 2, KERNEL // 2)
        self.mix = nn.Conv1d(dim, dim, KERNEL, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.wide, self.back = nn.Linear(dim, 3 * dim), nn.Linear(3 * dim, dim)
        self.gain_D = nn.Parameter(torch.full((dim,), 0.1))  # small, so that a block starts near the identity

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        y_BTD = self.mix(F.pad(x_BTD.transpose(1, 2), self.pad)).transpose(1, 2)
        return x_BTD + self.gain_D * self.back(F.gelu(self.wide(self.norm(y_BTD))))


class Correction(nn.Module):
    """A stack of blocks between two linear layers; the last starts at zero, so that it adds nothing at first."""

    def __init__(self, c_in: int, c_out: int, dim: int, layers: int, causal: bool):
        super().__init__()
        self.first = nn.Linear(c_in, dim)
        self.blocks = nn.ModuleList(Block(dim, causal) for _ in range(layers))
        self.norm, self.last = nn.LayerNorm(dim), nn.Linear(dim, c_out)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.before = layers * (KERNEL - 1 if causal else KERNEL // 2)  # frames that an output depends on, on either side
        self.after = 0 if causal else self.before

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        x_BTD = self.first(x_BTC)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.last(self.norm(x_BTD)).float()
