"""Semantic vocoder: blocks that read both ways at 25 Hz, then SoundStream's decoder (for Table I, paper III-B).

Shapes: codes_BTQ int64 at 25 Hz, wav_BT of exactly T x 640 samples; x_BTD and x_BDT in between.  Each level has a table of
embeddings, and the levels' embeddings add up, so that any prefix of the levels decodes.  One frame at 25 Hz becomes two
at 50 Hz, the rate of SoundStream's decoder.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from audiolm.models.rvq import check_levels
from audiolm.models.soundstream import CausalUp, decoder

KERNEL = 7
STRIDES = (2, 4, 5, 8)


class Block(nn.Module):
    """ConvNeXt block (2201.03545) over time: a convolution within each channel, then a wide layer within each frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.mix = nn.Conv1d(dim, dim, KERNEL, padding=KERNEL // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.wide, self.back = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.gain_D = nn.Parameter(torch.full((dim,), 0.1))  # small, so that a block starts near the identity

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        y_BTD = self.norm(self.mix(x_BTD.transpose(1, 2)).transpose(1, 2))
        return x_BTD + self.gain_D * self.back(F.gelu(self.wide(y_BTD)))


class SemanticVocoder(nn.Module):
    """`norm=False` builds the same model without weight norm, for the folded weights that are exported."""

    def __init__(self, levels: int, vocab: int, dim: int, layers: int, channels: int, norm: bool = True):
        super().__init__()
        self.levels, self.vocab = levels, vocab
        self.tables = nn.ModuleList(nn.Embedding(vocab, dim) for _ in range(levels))
        for table in self.tables:
            nn.init.normal_(table.weight, std=1 / math.sqrt(levels))  # the sum over levels has variance 1
        self.blocks = nn.ModuleList(Block(dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.up = CausalUp(dim, dim, 2, norm)
        self.decoder = decoder(channels, dim, STRIDES, norm)

    def forward(self, codes_BTQ: torch.Tensor, levels_B: torch.Tensor | None = None, starts_B: torch.Tensor | None = None,
                frames: int | None = None) -> torch.Tensor:
        """wav_BT of all frames, or of `frames` of them from starts_B on, whose context are all frames.

        levels_B: number of each example's levels that are used (None: all). Raises ValueError for more levels than the
        model has.
        """
        levels = check_levels(codes_BTQ, self.levels)
        # Levels that an example does not use add nothing: one model decodes every number of levels.
        x_BTD = 0.0
        for level in range(levels):
            part_BTD = self.tables[level](codes_BTQ[..., level])
            x_BTD = x_BTD + (part_BTD if levels_B is None else part_BTD * (level < levels_B)[:, None, None])
        for block in self.blocks:
            x_BTD = block(x_BTD)
        x_BTD = self.norm(x_BTD)
        if frames is not None:  # the blocks read the whole clip, the costly decoder makes a crop
            at_BT = starts_B[:, None] + torch.arange(frames, device=x_BTD.device)
            x_BTD = x_BTD.gather(1, at_BT[..., None].expand(-1, -1, x_BTD.shape[-1]))
        return self.decoder(self.up(x_BTD.transpose(1, 2)))[:, 0]
