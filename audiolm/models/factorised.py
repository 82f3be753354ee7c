"""Residual quantization in few dimensions: each level looks its code up in `code_dim` dimensions by cosine (2306.06546).

It has the shapes and methods of `rvq.ResidualVQ`.  A level projects the residual to code_dim numbers, takes the code of
the nearest direction and projects it back.  Codes and projections are parameters that learn by gradient and no code is
replaced; `update` only keeps the moving shares.  `initialise` sets the latents' mean and scale, which are removed first:
latents that share an offset share a direction, and so one code.  The search is fp32.
All levels learn on all examples: dropout masks the sum that goes to the decoder.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from audiolm.models.entropy import perplexity
from audiolm.models.rvq import Reduce, check_levels, follow_shares, nearest


class FactorisedVQ(nn.Module):
    """`norm`: weight norm on the projections, as DAC; exported weights are folded."""

    def __init__(self, dim: int, n_q: int, vocab: int, code_dim: int = 8, decay: float = 0.99, norm: bool = True):
        super().__init__()
        self.dim, self.n_q, self.vocab, self.decay = dim, n_q, vocab, decay
        down, up = ([nn.Linear(*size) for _ in range(n_q)] for size in ((dim, code_dim), (code_dim, dim)))
        self.down = nn.ModuleList(map(weight_norm, down) if norm else down)
        self.up = nn.ModuleList(map(weight_norm, up) if norm else up)
        self.codes_QNK = nn.Parameter(torch.randn(n_q, vocab, code_dim))
        self.register_buffer("mean_D", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("share_QN", torch.full((n_q, vocab), 1.0 / vocab))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.int64))

    def forward(self, x_BDT: torch.Tensor, n_q_B: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """As ResidualVQ.forward; `commitment` pulls the projected frames to their codes, `codebook` the codes to them.

        Both are sums over levels of a mean squared distance in code_dim dimensions.
        """
        with torch.autocast(x_BDT.device.type, enabled=False):  # a rounded latent could choose another code
            residual_BTD = (x_BDT.transpose(1, 2).float() - self.mean_D) / self.scale
            quantized_BTD, codes = torch.zeros_like(residual_BTD), []
            commitment = codebook = residual_BTD.new_zeros(())
            for level, codes_NK in enumerate(self.codes_QNK):
                z_BTK = self.down[level](residual_BTD)
                code_BT = self._nearest(z_BTK.detach(), codes_NK.detach())
                picked_BTK = F.embedding(code_BT, codes_NK)
                commitment = commitment + F.mse_loss(z_BTK, picked_BTK.detach())
                codebook = codebook + F.mse_loss(picked_BTK, z_BTK.detach())
                # forward: the code; backward: straight through to z
                level_BTD = self.up[level](z_BTK + (picked_BTK - z_BTK).detach())
                residual_BTD = residual_BTD - level_BTD
                quantized_BTD = quantized_BTD + (
                    level_BTD if n_q_B is None else level_BTD * (level < n_q_B)[:, None, None])
                codes.append(code_BT)
            quantized_BTD = quantized_BTD * self.scale + self.mean_D
        return {"quantized_BDT": quantized_BTD.transpose(1, 2).to(x_BDT.dtype), "codes_BTQ": torch.stack(codes, -1),
                "commitment": commitment, "codebook": codebook}

    @staticmethod
    def _nearest(z_BTK: torch.Tensor, codes_NK: torch.Tensor) -> torch.Tensor:
        return nearest(F.normalize(z_BTK.flatten(0, 1)), F.normalize(codes_NK)).view(z_BTK.shape[:2])

    @torch.no_grad()
    def encode(self, x_BDT: torch.Tensor) -> torch.Tensor:
        """codes_BTQ of latents."""
        return self.forward(x_BDT)["codes_BTQ"]

    def decode(self, codes_BTQ: torch.Tensor) -> torch.Tensor:
        """The fp32 latents, BDT, of any prefix of the levels."""
        levels = check_levels(codes_BTQ, self.n_q)
        with torch.autocast(codes_BTQ.device.type, enabled=False):
            latent_BTD = sum(self.up[q](F.embedding(codes_BTQ[..., q], self.codes_QNK[q])) for q in range(levels))
            return (latent_BTD * self.scale + self.mean_D).transpose(1, 2)

    @torch.no_grad()
    def initialise(self, frames_MD: torch.Tensor, *, seed: int, reduce: Reduce, rank: int = 0) -> None:
        """The mean of the frames, the same on every worker, and their scale around it."""
        self.mean_D.copy_(frames_MD.float().mean(0))
        self.scale.copy_((frames_MD.float() - self.mean_D).square().mean().sqrt().clamp_min(1e-6))
        self.initialised.fill_(1)

    @torch.no_grad()
    def update(self, x_MD: torch.Tensor, codes_MQ: torch.Tensor, *, seed: int, step: int, reduce: Reduce,
               rank: int = 0, world: int = 1) -> torch.Tensor:
        """Moves the shares by one training step; returns zeros, (Q,) int64: no code is ever replaced."""
        follow_shares(self.share_QN, codes_MQ, self.decay, reduce, world)
        return torch.zeros(self.n_q, dtype=torch.int64, device=codes_MQ.device)

    def perplexity(self) -> torch.Tensor:
        """exp(entropy) of each level's moving shares, (Q,)."""
        return perplexity(self.share_QN)
