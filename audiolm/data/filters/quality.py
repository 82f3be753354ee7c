"""DNSMOS of a file, by some windows of it."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from audiolm.data.audio import SAMPLE_RATE_HZ, stream
from audiolm.data.packaged.dnsmos import WINDOW_S, Scorer, scorer

WINDOWS = 4  # a second of work each


def dnsmos(path: str, seconds: float) -> float:
    """The mean overall mark of at most WINDOWS windows, at even places of a file that lasts `seconds`. Raises as `stream`."""
    size = round(WINDOW_S * SAMPLE_RATE_HZ)
    n = min(WINDOWS, max(1, int(seconds / WINDOW_S)))
    room = max(0, int(seconds * SAMPLE_RATE_HZ) - size)
    firsts = [round(room * i / max(1, n - 1)) for i in range(n)]
    windows, at = [np.zeros(0, np.float32) for _ in firsts], 0
    for wav_T in stream(path, SAMPLE_RATE_HZ):
        for i, first in enumerate(firsts):
            windows[i] = np.concatenate([windows[i], wav_T[max(0, first - at):max(0, first + size - at)]])
        at += len(wav_T)
    return float(np.mean([_score()(w)[0] for w in windows]))


@lru_cache(maxsize=1)
def _score() -> Scorer:
    """Kept for a process' next files."""
    return scorer()
