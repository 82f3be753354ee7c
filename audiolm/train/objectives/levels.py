"""Quantizer dropout: the number of levels that a training row is decoded with (SoundStream, 2107.03312, III-C)."""

from __future__ import annotations

from audiolm import rng


def draw_levels(seed: int, step: int, row: int, n_q: int, p: float) -> int:
    """The number of levels of a row, from (seed, step, row) alone: with probability p uniform in 1 .. n_q, else n_q.

    p = 1 is SoundStream's; DAC (2306.06546, 3.3) found that 0.5 costs none of the quality with all levels.
    """
    draw = rng.generator(seed, "n_q", step, row)
    # The number is drawn first, so that it does not depend on p: a larger p only adds rows that keep theirs.
    levels = int(draw.integers(1, n_q + 1))
    return levels if draw.random() < p else n_q
