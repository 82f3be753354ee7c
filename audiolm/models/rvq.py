"""Residual vector quantization with codebooks that are moving averages (paper III-B; SoundStream, 2107.03312, III-C).

Shapes: x_BDT latents, codes_BTQ int64, codebook_QND; M frames, Q levels, N codes, D dimensions.
The state is fp32 whatever the model's dtype: the codebooks and `share_QN`, the moving average of each code's share of a
step's frames.  (The paper's count is share x frames and its sum is count x code, so neither is stored.)
The search is fp32.  Quantizer dropout masks what goes to the decoder; every level learns on every example.
In `update` and `initialise` all ranks take part: sums go through `reduce`, frames through a slot for each rank.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from audiolm import rng
from audiolm.models.entropy import perplexity
from audiolm.models.transfer import send

Reduce = Callable[[torch.Tensor], torch.Tensor]  # sums over workers


def nearest(x_MD: torch.Tensor, codes_ND: torch.Tensor) -> torch.Tensor:
    """(M,) int64: the nearest code of each frame, in fp32; the lower index wins a tie."""
    half_N = codes_ND.square().sum(1) / 2
    rows = max(1, 2**24 // len(codes_ND))  # at once: 64 MB of distances
    return torch.cat([(half_N - x @ codes_ND.T).argmin(1) for x in x_MD.split(rows)])


def kmeans(x_MD: torch.Tensor, k: int, seed: int, level: int,
           iterations: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """(centroids_ND, share_N of the frames) by Lloyd's algorithm from k different random frames.

    An empty cluster moves to a random frame.
    """
    draw = rng.generator(seed, "codebook-kmeans", level)
    centroids_ND = x_MD[torch.from_numpy(draw.choice(len(x_MD), k, replace=False)).to(x_MD.device)].clone()
    for _ in range(iterations):
        code_M = nearest(x_MD, centroids_ND)
        count_N = torch.bincount(code_M, minlength=k).to(x_MD)
        sum_ND = torch.zeros_like(centroids_ND).index_add_(0, code_M, x_MD)
        other_N = torch.from_numpy(draw.integers(len(x_MD), size=k)).to(x_MD.device)
        centroids_ND = torch.where(count_N[:, None] > 0, sum_ND / count_N.clamp_min(1)[:, None], x_MD[other_N])
    return centroids_ND, torch.bincount(nearest(x_MD, centroids_ND), minlength=k).to(x_MD) / len(x_MD)


def check_levels(codes_BTQ: torch.Tensor, n_q: int) -> int:
    """The number of levels in codes; raises ValueError where a quantizer of n_q levels cannot decode them."""
    levels = codes_BTQ.shape[-1]
    if not 1 <= levels <= n_q:
        raise ValueError(f"codes have {levels} levels; this codec decodes 1 to {n_q}")
    return levels


def follow_shares(share_QN: torch.Tensor, codes_MQ: torch.Tensor, decay: float, reduce: Reduce, world: int) -> None:
    """Moves each code's share of the frames by one training step, in place, where codes learn otherwise or not at all.

    All ranks take part with the same number of frames.
    """
    hits_QN = torch.zeros_like(share_QN).scatter_add_(1, codes_MQ.T, torch.ones_like(codes_MQ.T, dtype=torch.float32))
    share_QN.lerp_(reduce(hits_QN) / (len(codes_MQ) * world), 1 - decay)


class ResidualVQ(nn.Module):
    """`decay` of the moving averages; a code below dead_share x the mean share is replaced."""

    def __init__(self, dim: int, n_q: int, vocab: int, decay: float = 0.99, dead_share: float = 0.1):
        super().__init__()
        self.dim, self.n_q, self.vocab, self.decay, self.dead_share = dim, n_q, vocab, decay, dead_share
        self.register_buffer("codebook_QND", torch.zeros(n_q, vocab, dim))
        self.register_buffer("share_QN", torch.full((n_q, vocab), 1.0 / vocab))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn, recurse=True):
        """Follows a move to another device but never a change of dtype: codebooks are fp32."""
        for name, value in self._buffers.items():
            self._buffers[name] = value.to(fn(value).device)
        return self

    def forward(self, x_BDT: torch.Tensor, n_q_B: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Quantizes with all levels; the first n_q_B levels of each example go to the decoder (all where None).

        quantized_BDT: its gradient passes straight through to x; codes_BTQ; commitment: a scalar, the sum over levels
        of the mean squared distance between a level's input and its code, with a gradient for x alone; codebook: 0,
        because these codes move by `update`.
        """
        with torch.autocast(x_BDT.device.type, enabled=False):
            x_BTD = x_BDT.transpose(1, 2).float()
            residual_BTD, quantized_BTD, commitment, codes = x_BTD, torch.zeros_like(x_BTD), x_BTD.new_zeros(()), []
            for level, codes_ND in enumerate(self.codebook_QND):
                code_BT = nearest(residual_BTD.detach().flatten(0, 1), codes_ND).view(x_BTD.shape[:2])
                picked_BTD = F.embedding(code_BT, codes_ND)
                commitment = commitment + F.mse_loss(residual_BTD, picked_BTD)
                residual_BTD = residual_BTD - picked_BTD
                kept = picked_BTD if n_q_B is None else picked_BTD * (level < n_q_B)[:, None, None]
                quantized_BTD = quantized_BTD + kept
                codes.append(code_BT)
            # straight-through estimator (1308.3432): the decoder's gradient passes to the encoder unchanged
            through_BTD = x_BTD + (quantized_BTD - x_BTD).detach()
        return {"quantized_BDT": through_BTD.transpose(1, 2).to(x_BDT.dtype), "codes_BTQ": torch.stack(codes, -1),
                "commitment": commitment, "codebook": torch.zeros_like(commitment)}

    @torch.no_grad()
    def encode(self, x_BDT: torch.Tensor) -> torch.Tensor:
        """codes_BTQ of latents."""
        return self.forward(x_BDT)["codes_BTQ"]

    def decode(self, codes_BTQ: torch.Tensor) -> torch.Tensor:
        """The fp32 latents, BDT, of any prefix of the levels."""
        levels = check_levels(codes_BTQ, self.n_q)
        return sum(F.embedding(codes_BTQ[..., q], self.codebook_QND[q]) for q in range(levels)).transpose(1, 2)

    @torch.no_grad()
    def initialise(self, frames_MD: torch.Tensor, *, seed: int, reduce: Reduce, rank: int = 0) -> None:
        """k-means, level by level on the residuals, over the same frames on every worker.

        Few frames a code leave clusters empty.  Rank 0 computes and the reduction spreads it, so that all ranks end with the
        same bits.
        Raises ValueError for fewer frames than codes.
        """
        if len(frames_MD) < self.vocab:
            raise ValueError(f"codec.vocab is {self.vocab} but only {len(frames_MD)} frames are there to initialise "
                             "from: lower codec.vocab or give more audio")
        codebook_QND, share_QN = torch.zeros_like(self.codebook_QND), torch.zeros_like(self.share_QN)
        residual_MD = frames_MD.float()
        for level in range(self.n_q if rank == 0 else 0):
            codebook_QND[level], share_QN[level] = kmeans(residual_MD, self.vocab, seed, level)
            residual_MD = residual_MD - codebook_QND[level][nearest(residual_MD, codebook_QND[level])]
        self.codebook_QND.copy_(reduce(codebook_QND))
        self.share_QN.copy_(reduce(share_QN))
        self.initialised.fill_(1)

    @torch.no_grad()
    def update(self, x_MD: torch.Tensor, codes_MQ: torch.Tensor, *, seed: int, step: int, reduce: Reduce,
               rank: int = 0, world: int = 1) -> torch.Tensor:
        """Moves the codebooks by one training step; returns how many codes of each level were replaced, (Q,) int64.

        Called once a step; all ranks take part with the same number of frames: x_MD the latents and codes_MQ the codes
        of this rank's rows, in row order. A code is dead below dead_share x the mean share. A random frame of the global
        batch (that level's input) replaces it, with the mean share, so that it has time to gather frames.  Frames are drawn
        for all codes: to draw for the dead ones alone, the CPU would have to wait for a GPU to know them.
        """
        # Each level's input and sums, by the codes that the training pass chose.
        inputs, residual_MD = [], x_MD.float()
        stats_QNE = residual_MD.new_zeros(self.n_q, self.vocab, self.dim + 1)  # sum of frames, then their number
        for level in range(self.n_q):
            inputs.append(residual_MD)
            ones_M1 = torch.ones_like(residual_MD[:, :1])
            stats_QNE[level].index_add_(0, codes_MQ[:, level], torch.cat([residual_MD, ones_M1], 1))
            residual_MD = residual_MD - self.codebook_QND[level][codes_MQ[:, level]]
        # One reduction for all levels.
        fresh_QND = self._drawn(inputs, seed, step, rank, world)
        stats_QNE, fresh_QND = reduce(torch.cat([stats_QNE, fresh_QND], -1)).split([self.dim + 1, self.dim], -1)
        stats_QNE = stats_QNE / (len(x_MD) * world)  # shares of the global batch, so that its size does not matter
        sum_QND, hit_QN = stats_QNE[..., :-1], stats_QNE[..., -1]
        self.share_QN.lerp_(hit_QN, 1 - self.decay)
        # Equal to the paper's sums / counts, written as a step towards the frames: a code without frames stays put.
        pull_QN = (1 - self.decay) / self.share_QN.clamp_min(1e-12)
        self.codebook_QND.add_(pull_QN[..., None] * (sum_QND - hit_QN[..., None] * self.codebook_QND))

        dead_QN = self.share_QN < self.dead_share / self.vocab
        self.codebook_QND.copy_(torch.where(dead_QN[..., None], fresh_QND, self.codebook_QND))
        self.share_QN.masked_fill_(dead_QN, 1.0 / self.vocab)
        return dead_QN.sum(1)

    def _drawn(self, inputs: list[torch.Tensor], seed: int, step: int, rank: int, world: int) -> torch.Tensor:
        """fresh_QND: a random frame of the global batch for each code; 0 where another rank holds it, for a sum over ranks."""
        frames = len(inputs[0])  # of a rank, in a row of the global batch
        total, draws = frames * world, [rng.generator(seed, "dead-code", step, level) for level in range(self.n_q)]
        index_QN = np.stack([draw.choice(total, self.vocab, replace=self.vocab > total) for draw in draws])
        index_QN = send(torch.from_numpy(index_QN), inputs[0].device)
        own_QN1 = (index_QN.div(frames, rounding_mode="floor") == rank)[..., None]
        return torch.stack([x_MD[at_N] for x_MD, at_N in zip(inputs, index_QN % frames, strict=True)]) * own_QN1

    def perplexity(self) -> torch.Tensor:
        """exp(entropy) of each level's moving shares, (Q,): N where all codes are used alike, 1 where one is."""
        return perplexity(self.share_QN)
