"""DNSMOS (2110.01763): a network's guess of listeners' marks, 1 to 5, for speech, background and the whole.

It was trained on noisy phone calls, not on generated speech: it hears noise and distortion, not sense.  The network is
package speechmos's; about a second of computing for each window of 9.01 s, so this suite is not of the default ones.  Sounds of
less are repeated to one window.  Judged is what follows the prompt, of originals and codec the same stretch; acoustic
generation has none.  Floor: originals in white noise as loud as they are.  wav_T: float32 mono at 16 kHz.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from audiolm.eval.generated import LABELS, Sample, by_item, white_noise
from audiolm.eval.metrics.stats import bootstrap_interval
from audiolm.eval.models import onnx
from audiolm.eval.results import Progress, Result, no_progress, not_measured
from audiolm.eval.suites.base import clips_to_continue, samples_for
from audiolm.tokenizers.base import SAMPLE_RATE

if TYPE_CHECKING:
    from audiolm.eval.suites.base import SuiteContext

PLAN = {"original": 1, "resynthesis": 1, "acoustic": 1, "continuation": 1}  # for `generated.plan`
ROLES = {"original": "ceiling", "resynthesis": "ceiling", "acoustic": "ours", "continuation": "ours"}
FLOOR = "original in white noise, 0 dB"
METRICS = ("DNSMOS overall, 1 to 5", "DNSMOS speech, 1 to 5", "DNSMOS background, 1 to 5")
WINDOW_S = 9.01
TO_MARKS = {"speech": (-0.08397278, 1.22083953, 0.0052439), "background": (-0.13166888, 1.60915514, -0.39604546),
            "overall": (-0.06766283, 1.11546468, 0.04602535)}  # Microsoft's polynomials, in the order of the network's outputs

Judge = Callable[[np.ndarray], tuple[float, float, float]]


def dnsmos_results(made: Sequence[Sample], seed: int = 0, progress: Progress = no_progress) -> list[Result]:
    """Marks of each mode. Without the package the rows say so."""
    if why := onnx.missing_dependency("speechmos", 'pip install "audiolm[eval]"'):
        return [not_measured("DNSMOS", LABELS[mode], METRICS[0], why) for mode in ROLES]
    own = by_item(made, ROLES, FLOOR)
    mark, rows, done, total = judge(), [], 0, sum(len(sounds) for _, sounds in own.values())
    for item, (role, sounds) in own.items():
        began, marks = time.monotonic(), []
        for m in sounds:
            marks.append(mark(in_noise(m.after_T, seed, m.wanted.clip) if item == FLOOR else m.after_T))
            progress(done := done + 1, total, "sounds")
        spent = (time.monotonic() - began) / len(METRICS)
        for metric, values in zip(METRICS, zip(*marks, strict=True), strict=False):
            rows.append(Result("DNSMOS", item, metric, *bootstrap_interval(values, [m.wanted.clip for m in sounds], seed), len(sounds),
                            "sounds", role, seconds=spent, note="by speechmos"))
    return rows


def judge() -> Judge:
    """wav_T -> (overall, speech, background), means over windows a second apart."""
    net = onnx.session("speechmos", "dnsmos_models/sig_bak_ovr.onnx")
    size = int(WINDOW_S * SAMPLE_RATE)

    def mark(wav_T: np.ndarray) -> tuple[float, float, float]:
        if not len(wav_T):
            raise ValueError("a sound without samples has no quality: give clips that last longer than their prompt")
        wav_T = np.asarray(wav_T, np.float32)
        wav_T = np.resize(wav_T, size) if len(wav_T) < size else wav_T
        starts = range(0, (int(len(wav_T) // SAMPLE_RATE - WINDOW_S) + 1) * SAMPLE_RATE, SAMPLE_RATE)
        raw = [net.run(None, {"input_1": wav_T[None, a:a + size]})[0][0] for a in starts]
        speech, background, overall = (float(np.mean(np.polyval(p, x))) for p, x in
                                       zip(TO_MARKS.values(), np.array(raw, np.float64).T, strict=True))
        return overall, speech, background

    return mark


def in_noise(wav_T: np.ndarray, seed: int, clip: str) -> np.ndarray:
    """The sound with noise of its own root mean square, within full scale."""
    noisy_T = wav_T + white_noise(wav_T, seed, clip)
    return (noisy_T / max(1.0, np.abs(noisy_T).max())).astype(np.float32)


def dnsmos_suite(ask: SuiteContext) -> list[Result]:
    """A network's marks for the sound."""
    from audiolm.eval.suites import dnsmos as marks

    made = samples_for(ask, "continued", lambda: clips_to_continue(ask), marks.PLAN)
    return marks.dnsmos_results(made, ask.config.run.seed, ask.out.progress)
