"""A law for the parallel decoder: each sound has a voice, which all its codes share, and one pass cannot agree on it.

Level 1 is voice x K + the semantic id of the frame's time, level 2 is level 1 + 3 modulo VOCAB.
"""

from __future__ import annotations

import numpy as np
import torch

from audiolm import rng
from audiolm.config.lm import ParallelConfig
from audiolm.config.training import TrainConfig
from audiolm.data.tokens import RATIO
from audiolm.lm.model import build_parallel
from audiolm.lm.parallel import collate, draw_document, inputs_of
from audiolm.lm.stages import Stage
from audiolm.models.lm.parallel_decoder import ParallelDecoder

K, VOCAB, LEVELS = 4, 16, 2
STAGE = Stage("parallel", K, VOCAB, (0, LEVELS), LEVELS, False, 1.0, dropped=0.1)
SHAPE = ParallelConfig(crop_s=1.0, dim=32, layers=2, heads=2, ff=64, dropout=0.0,
                       train=TrainConfig(steps=1, batch=16, lr=5e-3))
GAP = SHAPE.conv_kernel // 2


def sound(draw: np.random.Generator, frames: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """(z_T of so many semantic frames, codes_TQ) of a random voice."""
    z_T = np.repeat(draw.integers(0, K, -(-frames // 3)), 3)[:frames]
    one_T = np.repeat(z_T, RATIO) + K * draw.integers(VOCAB // K)
    return z_T, np.stack([one_T, (one_T + 3) % VOCAB], 1)


def untrained(seed: int = 0) -> ParallelDecoder:
    torch.manual_seed(seed)
    return build_parallel(STAGE, SHAPE).eval()


def trained(steps: int = 250) -> ParallelDecoder:
    model = untrained().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=SHAPE.train.lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = SHAPE.train.lr * min(1, step / 20) * (1 - step / steps)
        draw = rng.generator(0, "voices", step)
        batch = collate(STAGE, [[draw_document(STAGE, *sound(draw), draw)] for _ in range(SHAPE.train.batch)], GAP)
        optimizer.zero_grad()
        (model(*inputs_of(batch)).sum() / batch["count_2"][0]).backward()
        optimizer.step()
    return model.eval()
