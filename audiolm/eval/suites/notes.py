"""Piano: how many notes a second are played, how high, and over what range, beside the originals.

A transcriber's figures (basic-pitch, 2203.09893: the network alone, read plainly): a note is a peak of the onset's probability
that reaches ONSET, whose key then sounds (SOUNDING) for most of HELD_S.  Judged is what follows the prompt, of
originals and codec the same stretch; the codec says what transcribing loses.  Equal means are no equal music: FAD asks for
more.  Floor: how many notes are heard in white noise as loud as the original.  wav_T: float32 mono at 16 kHz.
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

PLAN = {"original": 1, "resynthesis": 1, "continuation": 1}  # for `generated.plan`
ROLES = {"original": "ceiling", "resynthesis": "ceiling", "continuation": "ours"}
INSTALL = 'pip install "audiolm[eval]" and pip install --no-deps basic-pitch'
NOISE = "white noise"
METRICS = ("notes a second", "mean pitch, MIDI number", "pitch range, semitones")  # A4 is 69
NET_HZ, HOP, WINDOW, OVERLAP = 22_050, 256, 43_844, 30  # the network's rate, samples a frame and a window; frames shared by two
ONSET, SOUNDING, HELD_S = 0.5, 0.3, 0.128
LOWEST = 21  # MIDI number of the first of 88 keys

Transcribe = Callable[[np.ndarray], list[tuple[float, int]]]  # wav_T -> (start in seconds, MIDI number) of each note


def note_results(made: Sequence[Sample], seed: int = 0, progress: Progress = no_progress) -> list[Result]:
    """Statistics of each mode; a sound without notes counts in their number alone. Without the package the rows say so."""
    if why := onnx.missing_dependency("basic_pitch", INSTALL):
        return [not_measured("Notes", LABELS[mode], metric, why) for metric in METRICS for mode in ROLES]
    own = by_item(made, ROLES, NOISE)
    transcribe, rows, done, total = transcriber(), [], 0, sum(len(sounds) for _, sounds in own.values())
    for item, (role, sounds) in own.items():
        began, found = time.monotonic(), []
        for m in sounds:
            wav_T = m.after_T
            if item == NOISE:
                wav_T = white_noise(wav_T, seed, m.wanted.clip).astype(np.float32)
            pitches = [pitch for _, pitch in transcribe(wav_T)]
            found.append((m.wanted.clip, len(pitches) * SAMPLE_RATE / len(wav_T), pitches))
            progress(done := done + 1, total, "sounds")
        spent = (time.monotonic() - began) / len(METRICS)
        heard = [(clip, pitches) for clip, _, pitches in found if pitches and item != NOISE]
        columns = ([(clip, rate) for clip, rate, _ in found], [(clip, float(np.mean(p))) for clip, p in heard],
                   [(clip, float(max(p) - min(p))) for clip, p in heard])
        for metric, column in zip(METRICS, columns, strict=True):
            if column:
                clips, values = zip(*column, strict=True)
                rows.append(Result("Notes", item, metric, *bootstrap_interval(values, clips, seed), len(values), "sounds", role,
                                seconds=spent, note="by basic-pitch"))
            elif item != NOISE:
                rows.append(not_measured("Notes", item, metric, "no notes were heard"))
    return sorted(rows, key=lambda r: METRICS.index(r.metric))


def transcriber() -> Transcribe:
    """Raises ValueError for a sound without samples."""
    import soxr

    net = onnx.session("basic_pitch", "saved_models/icassp_2022/nmp.onnx")
    (given,), (onset, sounding) = [i.name for i in net.get_inputs()], [f"StatefulPartitionedCall:{i}" for i in (2, 1)]
    half, own = OVERLAP // 2, WINDOW // HOP - OVERLAP  # frames

    def transcribe(wav_T: np.ndarray) -> list[tuple[float, int]]:
        if not len(wav_T):
            raise ValueError("a sound without samples has no notes: give clips that last longer than their prompt")
        wav_T = soxr.resample(np.asarray(wav_T, np.float32), SAMPLE_RATE, NET_HZ)
        starts = range(0, len(wav_T), own * HOP)
        padded_T = np.pad(wav_T, (half * HOP, starts[-1] + WINDOW))
        both = [net.run([onset, sounding], {given: padded_T[None, a:a + WINDOW, None]}) for a in starts]
        frames = -(-len(wav_T) // HOP)
        return notes_in(*(np.concatenate([w[i][0, half:half + own] for w in both])[:frames] for i in (0, 1)))

    return transcribe


def notes_in(onset_TP: np.ndarray, sounding_TP: np.ndarray) -> list[tuple[float, int]]:
    """Notes of probabilities by frame and key, by start."""
    padded = np.pad(onset_TP, ((1, 1), (0, 0)))
    peaks = (onset_TP >= ONSET) & (onset_TP > padded[:-2]) & (onset_TP >= padded[2:])
    n = round(HELD_S * NET_HZ / HOP)
    return [(int(t) * HOP / NET_HZ, LOWEST + int(p)) for t, p in np.argwhere(peaks)
            if len(held := sounding_TP[t + 1:t + 1 + n, p]) == n and (held >= SOUNDING).mean() > 0.5]


def notes_suite(ask: SuiteContext) -> list[Result]:
    """Piano: what is played, in figures."""

    return note_results(samples_for(ask, "continued", lambda: clips_to_continue(ask), PLAN), ask.config.run.seed, ask.out.progress)
