"""The band of a sound: the frequency that it reaches, which a low-rate MP3 or a telephone cuts whatever the file's rate."""

from __future__ import annotations

import numpy as np

from audiolm.data.audio import SAMPLE_RATE_HZ, stream

WINDOW = 512  # samples: 32 ms, about 31 Hz a bin
# Of the power, what may lie above the band. Speech has 1e-4 to 1e-6 of its power in the last 500 Hz below 8 kHz; the low-pass
# of an MP3 encoder leaves less than 1e-9.
SHARE = 1e-7


def band_hz(path: str) -> float:
    """The frequency above which a file at 16 kHz holds less than SHARE of its power; 8,000 Hz at most. Raises as `stream`."""
    power_F, window = np.zeros(WINDOW // 2 + 1), np.hanning(WINDOW)
    for wav_T in stream(path, SAMPLE_RATE_HZ):
        whole_NT = wav_T[:len(wav_T) // WINDOW * WINDOW].reshape(-1, WINDOW)
        power_F += np.square(np.abs(np.fft.rfft(whole_NT * window))).sum(axis=0)
    above_F = np.cumsum(power_F[::-1])[::-1]  # from each frequency up
    reached = np.flatnonzero(above_F > SHARE * above_F[0])
    return float((reached[-1] if len(reached) else 0) * SAMPLE_RATE_HZ / WINDOW)
