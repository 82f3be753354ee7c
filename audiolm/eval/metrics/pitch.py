"""Fundamental frequency by YIN, and its correlation between an original and a reconstruction.

Source: de Cheveigné and Kawahara, JASA 111 (2002), steps 1 to 5: the difference function, normalised by its cumulative
mean, the first minimum below a threshold, refined by a parabola.  A frame is voiced where there is such a minimum and its
level is within 40 dB of the loudest frame's.
wav_T: mono float at 16 kHz; f0_N: Hz of each 10 ms, NaN where unvoiced.
"""

from __future__ import annotations

import numpy as np

from audiolm.tokenizers.base import SAMPLE_RATE

LOWEST_HZ, HIGHEST_HZ = 60, 500  # of a voice
SMOOTH = 16  # 1 ms: a mean over it keeps the first harmonics, and little of the breath above them
HOP, WINDOW = 160, 560  # 10 ms; 35 ms, two periods of the lowest pitch
THRESHOLD = 0.2  # of the normalised difference; the paper's 0.1 leaves out much of a voice with breath or room
QUIET = 1e-4  # of the loudest frame's energy
LEAST_FRAMES = 10  # voiced in both: of fewer a correlation is chance


def f0_hz(wav_T: np.ndarray) -> np.ndarray:
    """f0_N of a sound, N = samples // 160, from windows that begin with each frame; behind its end is silence."""
    low, high = SAMPLE_RATE // HIGHEST_HZ, SAMPLE_RATE // LOWEST_HZ
    size = WINDOW + high + 1
    sums_T = np.concatenate([np.zeros(SMOOTH), np.cumsum(wav_T, dtype=np.float64)])
    x_T = np.pad((sums_T[SMOOTH:] - sums_T[:-SMOOTH]) / SMOOTH, (0, size))
    frames_NT = np.lib.stride_tricks.sliding_window_view(x_T, size)[::HOP][:len(wav_T) // HOP]
    if not len(frames_NT):
        return np.zeros(0)
    difference_NL = _difference(frames_NT, high + 1)
    # The mean of the differences so far: 1 at lag 0, and below 1 only where the sound repeats itself.
    lags = np.arange(1, high + 2)
    mean_NL = np.maximum(np.cumsum(difference_NL[:, 1:], 1) / lags, 1e-20)
    normal_NL = np.concatenate([np.ones((len(frames_NT), 1)), difference_NL[:, 1:] / mean_NL], 1)

    inside_NL = normal_NL[:, low:high + 1]
    first_N = (inside_NL < THRESHOLD).argmax(1) + low
    # From the first lag below the threshold down to the foot of its valley.
    rises_NL = (normal_NL[:, 1:] >= normal_NL[:, :-1]) & (np.arange(high + 1) >= first_N[:, None])
    lag_N = np.maximum(rises_NL.argmax(1), 1)  # 0 where it falls to the end: no valley
    before_N, at_N, after_N = (normal_NL[np.arange(len(lag_N)), lag_N + step] for step in (-1, 0, 1))
    bend_N = before_N - 2 * at_N + after_N
    offset_N = np.where(bend_N > 0, 0.5 * (before_N - after_N) / np.where(bend_N > 0, bend_N, 1.0), 0.0)

    energy_N = np.square(frames_NT[:, :WINDOW]).sum(1)
    voiced_N = (inside_NL < THRESHOLD).any(1) & rises_NL.any(1) & (energy_N > QUIET * energy_N.max())
    return np.where(voiced_N, SAMPLE_RATE / (lag_N + offset_N.clip(-1, 1)), np.nan)


def _difference(frames_NT: np.ndarray, most: int) -> np.ndarray:
    """Sum of (x_t - x_{t + lag})^2 over a window, for lags 0 to `most`."""
    fft = 1 << (frames_NT.shape[1] + WINDOW).bit_length()
    spectrum_NF = np.fft.rfft(frames_NT[:, :WINDOW], fft).conj() * np.fft.rfft(frames_NT, fft)
    product_NL = np.fft.irfft(spectrum_NF, fft)[:, :most + 1]
    power_NT = np.concatenate([np.zeros((len(frames_NT), 1)), np.cumsum(np.square(frames_NT), 1)], 1)
    energy_NL = power_NT[:, WINDOW:WINDOW + most + 1] - power_NT[:, :most + 1]
    return np.maximum(energy_NL[:, :1] + energy_NL - 2 * product_NL, 0.0)


def f0_correlation(f0_N: np.ndarray, made_N: np.ndarray) -> float | str:
    """Pearson's correlation of two pitches over the frames that are voiced in both, or why there is none."""
    both_N = np.isfinite(f0_N) & np.isfinite(made_N)
    if both_N.sum() < LEAST_FRAMES:
        return f"fewer than {LEAST_FRAMES} frames are voiced in both"
    a, b = f0_N[both_N] - f0_N[both_N].mean(), made_N[both_N] - made_N[both_N].mean()
    spread = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / spread) if spread > 0 else "the pitch does not move"
