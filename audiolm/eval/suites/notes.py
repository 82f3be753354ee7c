"""Piano: notes a second, mean pitch and pitch range of continuations beside the originals.

The transcriber is basic-pitch (2203.09893), its network alone: a note is a peak of the onset's probability that reaches ONSET,
whose key then sounds (SOUNDING) for most of HELD_S.  Scores only the audio after the prompt, over the same span for originals
and codec; the codec's row shows what transcribing loses.  Equal means do not prove equal music; the suite fad compares
distributions.  Floor: notes found in white noise as loud as the original.  wav_T: float32 mono at 16 kHz.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from audiolm.data.packaged import onnx
from audiolm.eval.generated import LABELS, Sample, as_floor, by_item, white_noise
from audiolm.eval.metrics.stats import bootstrap_interval
from audiolm.eval.results import Progress, Result, no_progress, not_measured
from audiolm.eval.suites.base import Scored, SuiteContext, continuations, score_items
from audiolm.tokenizers.base import SAMPLE_RATE

ROLES = {"original": "ceiling", "resynthesis": "ceiling", "continuation": "ours"}
PLAN = dict.fromkeys(ROLES, 1)  # samples of each mode a clip
INSTALL = 'pip install "audiolm[eval]" and pip install --no-deps basic-pitch'
NOISE = "white noise"
METRICS = ("notes a second", "mean pitch, MIDI number", "pitch range, semitones")  # A4 is 69
# The network's sample rate, samples a frame and a window, and frames that two windows share.
NET_HZ, HOP, WINDOW, OVERLAP = 22_050, 256, 43_844, 30
ONSET, SOUNDING, HELD_S = 0.5, 0.3, 0.128  # basic-pitch's default thresholds and minimum note length
LOWEST = 21  # MIDI number of the first of 88 keys

Transcribe = Callable[[np.ndarray], list[tuple[float, int]]]  # wav_T -> (start in seconds, MIDI number) of each note


def note_results(samples: Sequence[Sample], seed: int = 0, progress: Progress = no_progress) -> list[Result]:
    """Rows of each mode by metric; rows without values where the package is missing."""
    if why := onnx.missing_dependency("basic_pitch", INSTALL):
        return [not_measured("Notes", LABELS[mode], metric, why) for metric in METRICS for mode in ROLES]
    noise = as_floor(samples, lambda wav_T, clip: white_noise(wav_T, seed, clip).astype(np.float32))
    transcribe, rows = transcriber(), []

    def pitches(sample: Sample) -> list[int]:
        return [pitch for _, pitch in transcribe(sample.after_T)]

    for scored in score_items({**by_item(samples, ROLES), NOISE: ("floor", noise)}, pitches, progress):
        rows += _rows(scored, seed)
    return sorted(rows, key=lambda r: METRICS.index(r.metric))


def _rows(scored: Scored, seed: int) -> list[Result]:
    """An item's rows. A sample without notes counts in their number alone; so does noise, which has no pitch."""
    rate = [(s.spec.clip, len(p) * SAMPLE_RATE / len(s.after_T)) for s, p in zip(scored.samples, scored.values, strict=True)]
    pitched = [(s.spec.clip, p) for s, p in zip(scored.samples, scored.values, strict=True) if p and scored.item != NOISE]
    columns = (rate, [(clip, float(np.mean(p))) for clip, p in pitched],
               [(clip, float(max(p) - min(p))) for clip, p in pitched])
    rows = []
    for metric, column in zip(METRICS, columns, strict=True):
        if column:
            clips, values = zip(*column, strict=True)
            rows.append(Result("Notes", scored.item, metric, *bootstrap_interval(values, clips, seed), len(values), "sounds",
                               scored.role, seconds=scored.seconds / len(METRICS), note="by basic-pitch"))
        elif scored.item != NOISE:
            rows.append(not_measured("Notes", scored.item, metric, "no notes were heard"))
    return rows


def transcriber() -> Transcribe:
    """basic-pitch's network over windows, of which only the middle is used. Raises ValueError for audio without samples."""
    import soxr

    net = onnx.session("basic_pitch", "saved_models/icassp_2022/nmp.onnx")
    (audio,), (onset, sounding) = [i.name for i in net.get_inputs()], [f"StatefulPartitionedCall:{i}" for i in (2, 1)]
    margin, used = OVERLAP // 2, WINDOW // HOP - OVERLAP  # frames of a window: at each end, and between

    def transcribe(wav_T: np.ndarray) -> list[tuple[float, int]]:
        if not len(wav_T):
            raise ValueError("a sound without samples has no notes: give clips that last longer than their prompt")
        wav_T = soxr.resample(np.asarray(wav_T, np.float32), SAMPLE_RATE, NET_HZ)
        starts = range(0, len(wav_T), used * HOP)
        padded_T = np.pad(wav_T, (margin * HOP, starts[-1] + WINDOW))
        outputs = [net.run([onset, sounding], {audio: padded_T[None, a:a + WINDOW, None]}) for a in starts]
        frames = -(-len(wav_T) // HOP)
        return notes_in(*(np.concatenate([w[i][0, margin:margin + used] for w in outputs])[:frames] for i in (0, 1)))

    return transcribe


def notes_in(onset_TP: np.ndarray, sounding_TP: np.ndarray) -> list[tuple[float, int]]:
    """Notes of probabilities by frame T and key P, by start: peaks of the onset whose key then sounds for most of HELD_S."""
    padded = np.pad(onset_TP, ((1, 1), (0, 0)))
    peaks = (onset_TP >= ONSET) & (onset_TP > padded[:-2]) & (onset_TP >= padded[2:])
    n = round(HELD_S * NET_HZ / HOP)
    return [(int(t) * HOP / NET_HZ, LOWEST + int(p)) for t, p in np.argwhere(peaks)
            if len(after := sounding_TP[t + 1:t + 1 + n, p]) == n and (after >= SOUNDING).mean() > 0.5]


def notes_suite(context: SuiteContext) -> list[Result]:
    """Notes of continuations beside originals and codec."""
    return note_results(continuations(context, PLAN), context.seed, context.progress)
