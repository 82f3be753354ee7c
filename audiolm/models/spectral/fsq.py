"""Finite scalar quantization in groups of mel bands (2309.15505; groups as in 2406.05298).

A level is a group of bands, from low to high; a code is a point of a grid, so that a near miss sounds near.  Levels do
not build on each other: a level that is left out is a group of bands that the decoder fills in.
Shapes: x_BDT latents, D = Q x (grid dimensions); codes_BTQ int64.  There is no state but counts of codes.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from audiolm.models.entropy import perplexity
from audiolm.models.rvq import Reduce, check_levels, follow_shares

SPREAD = 2.0  # standard deviations of a coordinate that the grid spans to either side of its middle


class BandFSQ(nn.Module):
    """`sizes`: values of each grid dimension; a code is a mixed-radix number of them, the first digit the smallest."""

    def __init__(self, n_q: int, sizes: tuple[int, ...], decay: float = 0.99):
        super().__init__()
        self.n_q, self.vocab, self.dim, self.decay = n_q, math.prod(sizes), n_q * len(sizes), decay
        half = (torch.tensor(sizes, dtype=torch.float32) - 1) / 2
        radix = torch.tensor([math.prod(sizes[:i]) for i in range(len(sizes))])
        self.register_buffer("half_G", half, persistent=False)
        self.register_buffer("radix_G", radix, persistent=False)
        self.register_buffer("share_QN", torch.full((n_q, self.vocab), 1.0 / self.vocab))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.int64))

    def forward(self, x_BDT: torch.Tensor, n_q_B: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """As ResidualVQ's; the losses are 0, because the grid does not move."""
        with torch.autocast(x_BDT.device.type, enabled=False):
            inside_BTQG = self._inside(x_BDT)
            digits_BTQG = self._digits(inside_BTQG)
            grid_BTQG = digits_BTQG / self.half_G - 1
            through_BTQG = inside_BTQG + (grid_BTQG - inside_BTQG).detach()  # straight through (1308.3432)
            if n_q_B is not None:
                kept_BQ = torch.arange(self.n_q, device=n_q_B.device) < n_q_B[:, None]
                through_BTQG = through_BTQG * kept_BQ[:, None, :, None]
            nothing = through_BTQG.new_zeros(())
        return {"quantized_BDT": through_BTQG.flatten(2).transpose(1, 2), "codes_BTQ": self._codes(digits_BTQG),
                "commitment": nothing, "codebook": nothing}

    def _inside(self, x_BDT: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x_BDT.transpose(1, 2).float()).unflatten(2, (self.n_q, -1))

    def _digits(self, inside_BTQG: torch.Tensor) -> torch.Tensor:
        return ((inside_BTQG + 1) * self.half_G).round()

    def _codes(self, digits_BTQG: torch.Tensor) -> torch.Tensor:
        return (digits_BTQG.long() * self.radix_G).sum(-1)

    @torch.no_grad()
    def encode(self, x_BDT: torch.Tensor) -> torch.Tensor:
        """codes_BTQ of latents."""
        return self._codes(self._digits(self._inside(x_BDT)))

    def decode(self, codes_BTQ: torch.Tensor) -> torch.Tensor:
        """The fp32 latents, BDT, of any prefix of the levels; the groups of the others are 0."""
        levels = check_levels(codes_BTQ, self.n_q)
        sizes_G = (2 * self.half_G + 1).long()
        digits_BTQG = codes_BTQ[..., None].div(self.radix_G, rounding_mode="floor") % sizes_G
        grid_BTQG = digits_BTQG / self.half_G - 1
        rest = (0, 0, 0, self.n_q - levels)
        return nn.functional.pad(grid_BTQG, rest).flatten(2).transpose(1, 2)

    def transform(self, y_MF: torch.Tensor, stack: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(analysis_FD, synthesis_DF), float64: the first principal components of each group of bands.

        y_MF: normalised frames of `stack` hops.  A coordinate of SPREAD deviations is 1, where the grid ends.
        """
        features, group = y_MF.shape[1], len(self.half_G)
        bands = features // stack
        analysis_FD, synthesis_DF = y_MF.new_zeros(features, self.dim), y_MF.new_zeros(self.dim, features)
        for q, own in enumerate(torch.arange(bands).tensor_split(self.n_q)):
            at = (own + bands * torch.arange(stack)[:, None]).flatten()
            cov_FF = y_MF[:, at].T @ y_MF[:, at] / len(y_MF)
            values, vectors = torch.linalg.eigh(cov_FF)
            values_G, vectors_FG = values.flip(0)[:group], vectors.flip(1)[:, :group]
            to = slice(q * group, (q + 1) * group)
            reach_G = SPREAD * values_G.clamp_min(1e-12).sqrt()
            analysis_FD[at, to] = vectors_FG / reach_G
            synthesis_DF[to, at] = (vectors_FG * reach_G).T
        return analysis_FD, synthesis_DF

    @torch.no_grad()
    def initialise(self, frames_MD: torch.Tensor, *, seed: int, reduce: Reduce, rank: int = 0) -> None:
        self.initialised.fill_(1)

    @torch.no_grad()
    def update(self, x_MD: torch.Tensor, codes_MQ: torch.Tensor, *, seed: int, step: int, reduce: Reduce,
               rank: int = 0, world: int = 1) -> torch.Tensor:
        """Moves the shares by one training step; returns zeros, (Q,) int64: no point of a grid is ever replaced."""
        follow_shares(self.share_QN, codes_MQ, self.decay, reduce, world)
        return torch.zeros(self.n_q, dtype=torch.int64, device=codes_MQ.device)

    def perplexity(self) -> torch.Tensor:
        """exp(entropy) of each level's moving shares, (Q,)."""
        return perplexity(self.share_QN)
