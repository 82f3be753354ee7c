"""Parts of a codec's training that both families share: quantizer dropout, frames to start from, scores by level."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from audiolm import rng
from audiolm.models.entropy import perplexity
from audiolm.tokenizers.base import ACOUSTIC_HOP
from audiolm.train.engine import all_sum
from audiolm.train.gan import quality_means
from audiolm.train.objectives.base import Context

INIT_FRAMES = 32  # frames a code for the k-means start, so that hardly any cluster is empty
MOST_INIT_FRAMES = 2**17  # in all: the work is frames times codes, and 3 levels of 2^14 codes did not start in 18 core minutes


def init_frames(vocab: int) -> int:
    """Frames that codebooks of so many codes start from; of large ones at least two a code."""
    return min(INIT_FRAMES * vocab, max(MOST_INIT_FRAMES, 2 * vocab))


def draw_levels(seed: int, step: int, row: int, n_q: int, p: float) -> int:
    """The number of levels that a row is decoded with (SoundStream, 2107.03312, III-C), from (seed, step, row) alone.

    With probability p it is uniform in 1 .. n_q, else n_q.  p = 1 is SoundStream's; DAC (2306.06546, 3.3) found that 0.5
    costs none of the quality with all levels.
    """
    draw = rng.generator(seed, "n_q", step, row)
    # The number is drawn first, so that it does not depend on p: a larger p only adds rows that keep theirs.
    levels = int(draw.integers(1, n_q + 1))
    return levels if draw.random() < p else n_q


@torch.no_grad()
def first_frames(features: Callable[[torch.Tensor], torch.Tensor], crops: Callable, batch: int, crop: int, least: int,
                 ctx: Context) -> torch.Tensor:
    """The frames of the training's first batches, `least` of them or a few more; all ranks take part.

    `features` makes frames_MD of wav_BT, `crops(step, rows)` reads a batch.  Nothing else than the training's own
    batches is read.  A rank reads whole batches, so that the world size changes no bit.
    """
    frames = batch * crop // ACOUSTIC_HOP
    steps = math.ceil(least / frames)
    slots: list[torch.Tensor | None] = [None] * steps
    for step in range(ctx.rank, steps, ctx.world):
        wav_BT, _ = crops(step, range(batch))
        slots[step] = features(wav_BT.to(ctx.device))
    # Every slot is zero on all ranks but one: the sum gathers them, exactly and in order.
    own = next(slot for slot in slots if slot is not None)
    return all_sum(torch.cat([torch.zeros_like(own) if slot is None else slot for slot in slots]))


def level_scores(mel: Sequence[float], hits_QN: torch.Tensor, quality_222: torch.Tensor) -> dict[str, float]:
    """Scores of a validation, by name.

    mel: the distance with 1 .. n_q levels, then unquantized; hits_QN: how often each code was drawn; quality_222: sums of
    PESQ and SI-SDR (one level or all, score, sum and number).
    """
    *levels, unquantized = mel
    perplexities = perplexity(hits_QN).tolist()
    scores = {"mel": levels[-1], "mel/unquantized": unquantized,
              **quality_means(quality_222[0], "/q00"), **quality_means(quality_222[1])}
    for q, distance in enumerate(levels):
        scores |= {f"mel/q{q:02d}": distance, f"perplexity/q{q:02d}": perplexities[q],
                   f"used/q{q:02d}": float((hits_QN[q] > 0).float().mean())}
        if q:
            scores[f"gain/q{q:02d}"] = levels[q - 1] - distance
    return scores


def quantized_scores(levels: Sequence[float]) -> dict[str, float]:
    """The loss that chooses the best checkpoint, and the alarm for levels that lower no distance."""
    return {"loss": levels[-1],
            "alarm/levels_without_gain": float(sum(b >= a for a, b in zip(levels, levels[1:], strict=False)))}
