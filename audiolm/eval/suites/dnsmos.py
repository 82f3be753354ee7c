"""DNSMOS (2110.01763): a network's estimate of listeners' marks, 1 to 5, for speech, background and the whole.

It was trained on noisy phone calls, not on generated speech: it reacts to noise and distortion, not to sense.  The network
comes with package speechmos and takes about a second for each window of 9.01 s, so this suite is optional.  Shorter audio is
repeated to one window.  Scores only the audio after the prompt, over the same span for originals and codec; acoustic
generation has no prompt.  Floor: originals in white noise as loud as they are.  wav_T: float32 mono at 16 kHz.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from audiolm.eval.generated import LABELS, Sample, as_floor, by_item, white_noise
from audiolm.eval.metrics.stats import bootstrap_interval
from audiolm.eval.models import onnx
from audiolm.eval.results import Progress, Result, no_progress, not_measured
from audiolm.eval.suites.base import SuiteContext, continuations, score_items
from audiolm.tokenizers.base import SAMPLE_RATE

ROLES = {"original": "ceiling", "resynthesis": "ceiling", "acoustic": "ours", "continuation": "ours"}
PLAN = dict.fromkeys(ROLES, 1)  # samples of each mode a clip
FLOOR = "original in white noise, 0 dB"
METRICS = ("DNSMOS overall, 1 to 5", "DNSMOS speech, 1 to 5", "DNSMOS background, 1 to 5")
WINDOW_S = 9.01
# Microsoft's polynomials from raw outputs to marks, in the order of the network's outputs (DNS-Challenge, dnsmos_local.py).
POLYNOMIALS = {"speech": (-0.08397278, 1.22083953, 0.0052439), "background": (-0.13166888, 1.60915514, -0.39604546),
               "overall": (-0.06766283, 1.11546468, 0.04602535)}

Scorer = Callable[[np.ndarray], tuple[float, float, float]]


def dnsmos_results(samples: Sequence[Sample], seed: int = 0, progress: Progress = no_progress) -> list[Result]:
    """Marks of each mode; rows without values where the package is missing."""
    if why := onnx.missing_dependency("speechmos", 'pip install "audiolm[eval]"'):
        return [not_measured("DNSMOS", LABELS[mode], METRICS[0], why) for mode in ROLES]
    floor = as_floor(samples, lambda wav_T, clip: in_noise(wav_T, seed, clip))
    score, rows = scorer(), []
    for scored in score_items({**by_item(samples, ROLES), FLOOR: ("floor", floor)}, lambda s: score(s.after_T), progress):
        # zip is empty for a mode without samples, which has no row.
        for metric, marks in zip(METRICS, zip(*scored.values, strict=True), strict=False):
            rows.append(Result("DNSMOS", scored.item, metric, *bootstrap_interval(marks, scored.clips, seed), len(marks),
                               "sounds", scored.role, seconds=scored.seconds / len(METRICS), note="by speechmos"))
    return rows


def scorer() -> Scorer:
    """wav_T -> (overall, speech, background), means over windows a second apart."""
    net = onnx.session("speechmos", "dnsmos_models/sig_bak_ovr.onnx")
    size = int(WINDOW_S * SAMPLE_RATE)

    def score(wav_T: np.ndarray) -> tuple[float, float, float]:
        if not len(wav_T):
            raise ValueError("a sound without samples has no quality: give clips that last longer than their prompt")
        wav_T = np.asarray(wav_T, np.float32)
        wav_T = np.resize(wav_T, size) if len(wav_T) < size else wav_T  # resize repeats it
        starts = range(0, (int(len(wav_T) // SAMPLE_RATE - WINDOW_S) + 1) * SAMPLE_RATE, SAMPLE_RATE)
        raw = [net.run(None, {"input_1": wav_T[None, a:a + size]})[0][0] for a in starts]
        speech, background, overall = (float(np.mean(np.polyval(p, x))) for p, x in
                                       zip(POLYNOMIALS.values(), np.array(raw, np.float64).T, strict=True))
        return overall, speech, background

    return score


def in_noise(wav_T: np.ndarray, seed: int, clip: str) -> np.ndarray:
    """The audio with noise of its own root mean square, scaled down to full scale where it exceeds it."""
    noisy_T = wav_T + white_noise(wav_T, seed, clip)
    return (noisy_T / max(1.0, np.abs(noisy_T).max())).astype(np.float32)


def dnsmos_suite(context: SuiteContext) -> list[Result]:
    """DNSMOS of continuations and acoustic generation beside originals and codec."""
    return dnsmos_results(continuations(context, PLAN), context.seed, context.progress)
