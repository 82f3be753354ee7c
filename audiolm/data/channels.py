"""Several channels as one: their mean, or the strongest where the mean would lose the sound; and samples that are no sound.

A pair of channels in opposite phase cancels in its mean.  Shapes: wav_TC samples by channels, wav_T mono.
"""

from __future__ import annotations

import numpy as np

from audiolm.data.containers.raw import Unusable

FAR_LESS = 0.02  # of the strongest channel's power, 17 dB below it: one channel of seven alone keeps more in the mean
LOUDEST = 10.0  # of full scale, +20 dBFS: no converter or mix comes near
INT16, INT32 = 2.0**15, 2.0**31  # full scale of integers


def mix(wav_TC: np.ndarray, channel: int | None = None) -> np.ndarray:
    """wav_T: the mean of the channels, or one of them."""
    if wav_TC.shape[1] == 1:
        return wav_TC[:, 0]
    if channel is None:
        return wav_TC.mean(axis=1, dtype=np.float32)
    return np.ascontiguousarray(wav_TC[:, channel])


def powers(wav_TC: np.ndarray) -> np.ndarray:
    """(1 + C,) float64: the sums of squares of the mean and of every channel."""
    return np.array([np.vdot(x, x) for x in (mix(wav_TC), *wav_TC.T)], np.float64)


def cancelled(mean_power: float, channel_powers: np.ndarray) -> int | None:
    """The strongest channel where the mean has far less power than it, else None: the mean serves."""
    strongest = int(np.argmax(channel_powers))
    return strongest if mean_power < FAR_LESS * channel_powers[strongest] else None


def check_level(peak: float) -> None:
    """Raises Unusable for a sample that is no sound, of full scale 1."""
    if not LOUDEST < peak < np.inf:
        return
    what = ("16-bit values saved as float: divide them by 32768" if peak <= INT16 else
            "32-bit values saved as float: divide them by 2147483648" if peak <= INT32 else "damage: clean the file")
    raise Unusable("too loud", f"a sample at {20 * np.log10(peak):+.0f} dBFS looks like {what}")
