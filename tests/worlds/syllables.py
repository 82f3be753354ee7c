"""Syllables that run through five pitches in turn, so that masked ones can be inferred: crops for the masked model."""

from __future__ import annotations

import numpy as np
import torch

from audiolm import rng
from audiolm.train.objectives.base import Context

RATE = 16_000
CTX = Context(0, 1, torch.device("cpu"), seed=5)


def syllables(seed: int, seconds: float) -> torch.Tensor:
    """Harmonic tones of 150 ms to 350 ms that run through five pitches in turn: what is masked can be inferred."""
    g, out = rng.generator(seed, "syllables"), []
    first = g.integers(5)
    while sum(map(len, out)) < seconds * RATE:
        t = np.arange(int(g.uniform(0.15, 0.35) * RATE)) / RATE
        f = (180.0, 320.0, 570.0, 1010.0, 1800.0)[(first + len(out)) % 5]
        out.append(sum(np.sin(2 * np.pi * f * n * t) / n for n in (1, 2, 3)) * np.hanning(len(t)) * 0.2)
    return torch.from_numpy(np.concatenate(out)[:int(seconds * RATE)]).float()


class Crops:
    def batch(self, step: int, rows):
        wavs = [syllables(1000 * step + row, 2.0) for row in rows]
        lengths = [len(w) - 4000 * (row % 3) for w, row in zip(wavs, rows, strict=True)]
        wav_BT = torch.stack(wavs)
        for row, n in zip(wav_BT, lengths, strict=True):
            row[n:] = 0
        return wav_BT, torch.tensor(lengths)


def tones(midi: list[float], seconds: float = 1.0, gain: float = 0.2) -> torch.Tensor:
    """wav_1T: each key's fundamental and three harmonics."""
    t_T = torch.arange(int(seconds * RATE)) / RATE
    partials = [torch.sin(2 * torch.pi * 440 * 2 ** ((m - 69) / 12) * h * t_T) / h for m in midi for h in (1, 2, 3, 4)]
    return gain * torch.stack(partials).sum(0)[None]
