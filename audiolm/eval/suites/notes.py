"""Piano: notes a second, keys at once, pitch classes, mean pitch and range of continuations beside the originals.

The transcriber is basic-pitch (2203.09893), its network alone; each note has one onset, so notes a second are onsets a second.
Scores only the audio after the prompt, over the same span for originals and codec; the codec's row shows what transcribing
loses.  The distance of pitch classes is that to the original's same span: ceilings are the codec and the prompt, which is
another part of the same recording, floors another piece and white noise as loud as the original.  Few notes are far from
any, so read it beside their number.  Equal statistics do not prove equal music; the suite fad compares distributions.
wav_T: float32 mono at 16 kHz.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from audiolm.data.packaged import onnx
from audiolm.eval.generated import LABELS, Sample, as_floor, by_item, of_mode, white_noise
from audiolm.eval.metrics.notes import Note, keys_at_once, notes_in, pitch_class_distance
from audiolm.eval.metrics.stats import bootstrap_interval
from audiolm.eval.results import Progress, Result, no_progress, not_measured
from audiolm.eval.suites.base import Scored, SuiteContext, continuations, score_items
from audiolm.tokenizers.base import SAMPLE_RATE

ROLES = {"original": "ceiling", "resynthesis": "ceiling", "continuation": "ours"}
PLAN = dict.fromkeys(ROLES, 1)  # samples of each mode a clip
INSTALL = 'pip install "audiolm[eval]" and pip install --no-deps basic-pitch'
PROMPT, OTHER, NOISE = "the original's prompt", "another piece", "white noise"
RATE, KEYS, DISTANCE = "notes a second", "keys at once", "pitch classes, distance to the original (0 to 1)"
MEAN, RANGE = "mean pitch, MIDI number", "pitch range, semitones"  # A4 is 69
METRICS = (RATE, KEYS, DISTANCE, MEAN, RANGE)
# Noise has no pitch, an original is no distance from itself; prompt and other piece are there for the distance alone.
MEASURED = {LABELS["original"]: (RATE, KEYS, MEAN, RANGE), PROMPT: (DISTANCE,), OTHER: (DISTANCE,), NOISE: (RATE, DISTANCE)}
OF_NOTES = {KEYS: keys_at_once, MEAN: lambda notes: float(np.mean([n.pitch for n in notes])),
            RANGE: lambda notes: float(np.ptp([n.pitch for n in notes]))}
# The network's sample rate, samples a frame and a window, and frames that two windows share.
NET_HZ, HOP, WINDOW, OVERLAP = 22_050, 256, 43_844, 30

Transcribe = Callable[[np.ndarray], list[Note]]  # of wav_T


def note_results(samples: Sequence[Sample], seed: int = 0, progress: Progress = no_progress) -> list[Result]:
    """Rows of each mode by metric; rows without values where the package is missing."""
    if why := onnx.missing_dependency("basic_pitch", INSTALL):
        return [not_measured("Notes", LABELS[mode], metric, why) for metric in METRICS for mode in ROLES
                if metric in MEASURED.get(LABELS[mode], METRICS)]
    noise = as_floor(samples, lambda wav_T, clip: white_noise(wav_T, seed, clip).astype(np.float32))
    prompts = [Sample(replace(s.spec, prompt=0), s.wav_T[:s.spec.prompt]) for s in of_mode(samples, "original")]
    items, transcribe = {**by_item(samples, ROLES), PROMPT: ("ceiling", prompts), NOISE: ("floor", noise)}, transcriber()
    scored = {s.item: s for s in score_items(items, lambda sample: transcribe(sample.after_T), progress)}
    originals = scored[LABELS["original"]]
    if len(originals.values) > 1:
        scored[OTHER] = replace(originals, item=OTHER, role="floor", values=_other_pieces(originals), seconds=0.0)
    truth = dict(zip(originals.clips, originals.values, strict=True))
    rows = [row for item in scored.values() for row in _rows(item, truth, seed)]
    return sorted(rows, key=lambda r: METRICS.index(r.metric))


def _other_pieces(originals: Scored) -> list[list[Note]]:
    """For each original the notes of the next one of another speaker, or of the next clip where there is but one speaker."""
    groups, n = originals.groups, len(originals.values)
    return [next(originals.values[j % n] for j in range(i + 1, i + n) if groups[j % n] != groups[i]) for i in range(n)]


def _rows(scored: Scored, truth: Mapping[str, list[Note]], seed: int) -> list[Result]:
    """An item's rows. A sample without notes counts in their number and in the distance, which is then 1.

    Distances are to the `truth` of clips that have notes.
    """
    sounds, rows = list(zip(scored.groups, scored.samples, scored.values, strict=True)), []
    metrics = MEASURED.get(scored.item, METRICS)
    for metric in metrics:
        if metric == RATE:
            column = [(group, len(notes) * SAMPLE_RATE / len(s.after_T)) for group, s, notes in sounds]
        elif metric == DISTANCE:
            column = [(group, pitch_class_distance(notes, truth[s.spec.clip])) for group, s, notes in sounds
                      if truth.get(s.spec.clip)]
        else:
            column = [(group, OF_NOTES[metric](notes)) for group, _, notes in sounds if notes]
        if not column:
            rows.append(not_measured("Notes", scored.item, metric, "no notes were heard"))
            continue
        groups, values = zip(*column, strict=True)
        rows.append(Result("Notes", scored.item, metric, *bootstrap_interval(values, groups, seed), len(values), "sounds",
                           scored.role, seconds=scored.seconds / len(metrics), note="by basic-pitch"))
    return rows


def transcriber() -> Transcribe:
    """basic-pitch's network over windows, of which only the middle is used. Raises ValueError for audio without samples."""
    import soxr

    net = onnx.session("basic_pitch", "saved_models/icassp_2022/nmp.onnx")
    (audio,), (onset, sounding) = [i.name for i in net.get_inputs()], [f"StatefulPartitionedCall:{i}" for i in (2, 1)]
    margin, used = OVERLAP // 2, WINDOW // HOP - OVERLAP  # frames of a window: at each end, and between

    def transcribe(wav_T: np.ndarray) -> list[Note]:
        if not len(wav_T):
            raise ValueError("a sound without samples has no notes: give clips that last longer than their prompt")
        wav_T = soxr.resample(np.asarray(wav_T, np.float32), SAMPLE_RATE, NET_HZ)
        starts = range(0, len(wav_T), used * HOP)
        padded_T = np.pad(wav_T, (margin * HOP, starts[-1] + WINDOW))
        outputs = [net.run([onset, sounding], {audio: padded_T[None, a:a + WINDOW, None]}) for a in starts]
        frames = -(-len(wav_T) // HOP)
        return notes_in(*(np.concatenate([w[i][0, margin:margin + used] for w in outputs])[:frames] for i in (0, 1)),
                        HOP / NET_HZ)

    return transcribe


def notes_suite(context: SuiteContext) -> list[Result]:
    """Notes of continuations beside originals and codec."""
    return note_results(continuations(context, PLAN), context.seed, context.progress)
