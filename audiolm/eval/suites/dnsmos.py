"""DNSMOS (2110.01763): a network's estimate of listeners' marks, 1 to 5, for speech, background and the whole.

It was trained on noisy phone calls, not on generated speech: it reacts to noise and distortion, not to sense.  It takes about
a second for each window of 9.01 s, so this suite is optional.  Scores only the audio after the prompt, over the same span for
originals and codec; acoustic generation has no prompt.  Floor: originals in white noise as loud as they are.  wav_T: float32
mono at 16 kHz.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from audiolm.data.packaged import onnx
from audiolm.data.packaged.dnsmos import scorer
from audiolm.eval.generated import LABELS, Sample, as_floor, by_item, white_noise
from audiolm.eval.metrics.stats import bootstrap_interval
from audiolm.eval.results import Progress, Result, no_progress, not_measured
from audiolm.eval.suites.base import SuiteContext, continuations, score_items

ROLES = {"original": "ceiling", "resynthesis": "ceiling", "acoustic": "ours", "continuation": "ours"}
PLAN = dict.fromkeys(ROLES, 1)  # samples of each mode a clip
FLOOR = "original in white noise, 0 dB"
METRICS = ("DNSMOS overall, 1 to 5", "DNSMOS speech, 1 to 5", "DNSMOS background, 1 to 5")


def dnsmos_results(samples: Sequence[Sample], seed: int = 0, progress: Progress = no_progress) -> list[Result]:
    """Marks of each mode; rows without values where the package is missing."""
    if why := onnx.missing_dependency("speechmos", 'pip install "audiolm[eval]"'):
        return [not_measured("DNSMOS", LABELS[mode], METRICS[0], why) for mode in ROLES]
    return mark_rows("DNSMOS", METRICS, scorer(), samples, "by speechmos", seed, progress)


def mark_rows(table: str, metrics: Sequence[str], score: Callable[[np.ndarray], Sequence[float]], samples: Sequence[Sample],
              note: str, seed: int, progress: Progress) -> list[Result]:
    """Rows of each mode and of the floor. `score`: wav_T -> a mark of each metric."""
    floor, rows = as_floor(samples, lambda wav_T, clip: in_noise(wav_T, seed, clip)), []
    for scored in score_items({**by_item(samples, ROLES), FLOOR: ("floor", floor)}, lambda s: score(s.after_T), progress):
        # zip is empty for a mode without samples, which has no row.
        for metric, marks in zip(metrics, zip(*scored.values, strict=True), strict=False):
            rows.append(Result(table, scored.item, metric, *bootstrap_interval(marks, scored.clips, seed), len(marks),
                               "sounds", scored.role, seconds=scored.seconds / len(metrics), note=note))
    return rows


def in_noise(wav_T: np.ndarray, seed: int, clip: str) -> np.ndarray:
    """The audio with noise of its own root mean square, scaled down to full scale where it exceeds it."""
    noisy_T = wav_T + white_noise(wav_T, seed, clip)
    return (noisy_T / max(1.0, np.abs(noisy_T).max())).astype(np.float32)


def dnsmos_suite(context: SuiteContext) -> list[Result]:
    """DNSMOS of continuations and acoustic generation beside originals and codec."""
    return dnsmos_results(continuations(context, PLAN), context.seed, context.progress)
