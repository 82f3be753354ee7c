"""Figures of one reconstructed clip, for training and evaluation alike.

wav_T (the original) and made_T: mono float at 16 kHz, of one length.
"""

from __future__ import annotations

import math

import numpy as np

from audiolm.tokenizers.base import SAMPLE_RATE

PESQ_MIN_S = 0.25  # shorter clips have none


def si_sdr_db(wav_T: np.ndarray, made_T: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio in dB; -inf for silence against sound."""
    wav, made = wav_T.astype(np.float64), made_T.astype(np.float64)
    wav, made = wav - wav.mean(), made - made.mean()
    energy = wav @ wav
    if energy == 0:
        return -math.inf
    target = (made @ wav / energy) * wav
    signal, noise = target @ target, ((made - target) ** 2).sum()
    if signal == 0:
        return -math.inf
    return math.inf if noise == 0 else float(10 * math.log10(signal / noise))


def pesq_wb(wav_T: np.ndarray, made_T: np.ndarray) -> float | str:
    """Wide-band PESQ (ITU-T P.862.2), or why there is none (too short, no speech found)."""
    import pesq

    if len(wav_T) < PESQ_MIN_S * SAMPLE_RATE:
        return f"shorter than {PESQ_MIN_S} s"
    try:
        return float(pesq.pesq(SAMPLE_RATE, wav_T, made_T, "wb"))
    except (pesq.PesqError, ValueError, ZeroDivisionError) as e:
        return f"{type(e).__name__}: {e}"
