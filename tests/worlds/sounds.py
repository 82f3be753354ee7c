"""Table III with planted voices: two pitches are told apart, shuffled names give chance, nets are kept and found again."""

from __future__ import annotations

import math

import numpy as np

from audiolm import rng

SR, PROMPT = 16_000, 8_000


def talk(pitch_hz: float, seconds: float, index: int) -> np.ndarray:
    """Harmonics of a wandering pitch under a changing filter: what is said differs, who says it stays."""
    g, n = rng.generator(0, "talk", index), round(seconds * SR)
    steps = n // 3200 + 2
    at = np.arange(n) / 3200
    f0 = pitch_hz * np.interp(at, np.arange(steps), 1 + 0.1 * g.standard_normal(steps))
    centre = np.interp(at, np.arange(steps), g.uniform(300, 2500, steps))
    phase, out = np.cumsum(2 * np.pi * f0 / SR), np.zeros(n)
    for k in range(1, 25):
        out += np.exp(-np.abs(k * f0 - centre) / 700) * np.sin(k * phase)
    return (0.2 * out / np.abs(out).max() + 0.002 * g.standard_normal(n)).astype(np.float32)


def chance_band(n: int, level: float = 0.99) -> tuple[float, float]:
    """The two-sided binomial band of n guesses between two classes, in % right: outside it, chance is refuted at `level`."""
    cdf = np.cumsum([math.comb(n, k) for k in range(n + 1)]) / 2.0**n
    return tuple(100 * int(np.searchsorted(cdf, q)) / n for q in ((1 - level) / 2, (1 + level) / 2))
