"""DNSMOS (2110.01763): a network's estimate of listeners' marks, 1 to 5, for speech, background and the whole.

The network comes with package speechmos and takes about a second for each window of 9.01 s.  Shorter audio is repeated to
one window.  wav_T: float32 mono at 16 kHz.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from audiolm.data.audio import SAMPLE_RATE_HZ
from audiolm.data.packaged import onnx

WINDOW_S = 9.01
# Microsoft's polynomials from raw outputs to marks, in the order of the network's outputs (DNS-Challenge, dnsmos_local.py).
POLYNOMIALS = {"speech": (-0.08397278, 1.22083953, 0.0052439), "background": (-0.13166888, 1.60915514, -0.39604546),
               "overall": (-0.06766283, 1.11546468, 0.04602535)}

Scorer = Callable[[np.ndarray], tuple[float, float, float]]


def scorer() -> Scorer:
    """wav_T -> (overall, speech, background), means over windows a second apart."""
    net = onnx.session("speechmos", "dnsmos_models/sig_bak_ovr.onnx")
    size = int(WINDOW_S * SAMPLE_RATE_HZ)

    def score(wav_T: np.ndarray) -> tuple[float, float, float]:
        if not len(wav_T):
            raise ValueError("a sound without samples has no quality: give clips that last longer than their prompt")
        wav_T = np.asarray(wav_T, np.float32)
        wav_T = np.resize(wav_T, size) if len(wav_T) < size else wav_T  # resize repeats it
        starts = range(0, (int(len(wav_T) // SAMPLE_RATE_HZ - WINDOW_S) + 1) * SAMPLE_RATE_HZ, SAMPLE_RATE_HZ)
        raw = [net.run(None, {"input_1": wav_T[None, a:a + size]})[0][0] for a in starts]
        speech, background, overall = (float(np.mean(np.polyval(p, x))) for p, x in
                                       zip(POLYNOMIALS.values(), np.array(raw, np.float64).T, strict=True))
        return overall, speech, background

    return score
