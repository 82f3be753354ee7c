"""Notes of piano: planted voices, chords and keys come out as they were planted."""

from __future__ import annotations

import numpy as np
import pytest

from audiolm.data.packaged import onnx
from audiolm.eval.generated import LABELS, Sample, SampleSpec
from audiolm.eval.metrics.notes import Note, keys_at_once, notes_in, pitch_class_distance
from audiolm.eval.suites import notes

SR, FRAME_S = 16_000, 256 / 22_050
SCALE = [60, 64, 67, 72, 71, 67, 62, 65, 69, 74]  # five seconds: more than two windows
BLACK = [61, 63, 66, 68]  # no pitch class of SCALE

needs_network = pytest.mark.skipif(bool(onnx.missing_dependency("basic_pitch", "")), reason="basic-pitch is not installed")


def sound(clip: str, mode: str, wav_T: np.ndarray, prompt: int = 0) -> Sample:
    return Sample(SampleSpec(clip, clip, None, mode, 0, prompt), wav_T.astype(np.float32))


def played(chords: list, each_s: float = 0.5) -> np.ndarray:
    """Plucked tones with harmonics, one chord after the other."""
    t = np.arange(round(each_s * SR)) / SR
    fade = np.clip((each_s - t) / 0.1, 0, 1)  # a click would be a note
    hz = [[440 * 2 ** ((p - 69) / 12) for p in np.atleast_1d(chord)] for chord in chords]
    tones = [fade * sum(0.2 / k * np.exp(-3 * k * t) * np.sin(2 * np.pi * f * k * t) for f in chord for k in range(1, 6))
             for chord in hz]
    return np.concatenate(tones).astype(np.float32)


@needs_network
def test_planted_notes_are_found():
    found = notes.transcriber()(played(SCALE))
    for i, pitch in enumerate(SCALE):  # in all windows
        assert any(p == pitch and abs(s - 0.5 * i) < 0.06 and abs(e - s - 0.45) < 0.15 for s, e, p in found)
    assert len(found) <= 13  # a partial may be taken for a note


@needs_network
def test_what_follows_the_prompt_is_compared():
    silent, voice = np.zeros(4 * SR, np.float32), played(SCALE[:8])
    chords = played([(61, 66, 70), (63, 68, 73), (61, 66, 70), (63, 68, 73)])
    made = [sound("a", "original", voice, 2 * SR), sound("b", "original", silent, 2 * SR),
            sound("c", "original", played([*BLACK, *BLACK]), 2 * SR),
            sound("a", "continuation", np.concatenate([voice[:2 * SR], chords]), 2 * SR),
            sound("c", "continuation", played([*BLACK, *BLACK]), 2 * SR)]
    rows = {(r.item, r.metric): r for r in notes.note_results(made)}
    original, ours = ({m: rows[item, m] for m in notes.METRICS if (item, m) in rows} for item in ("original", "continuation"))
    assert 1.2 <= original[notes.RATE].value <= 1.6 and (original[notes.RATE].n, original[notes.RATE].role) == (3, "ceiling")
    assert original[notes.KEYS].n == 2 and original[notes.KEYS].value == pytest.approx(1, abs=0.15)
    assert ours[notes.KEYS].value == pytest.approx((3 + 1) / 2, abs=0.3)
    assert ours[notes.DISTANCE].value == pytest.approx((1 + 0) / 2, abs=0.1) and notes.DISTANCE not in original
    assert original[notes.MEAN].value == pytest.approx((66.25 + 64.5) / 2, abs=1)
    assert original[notes.RANGE].value == pytest.approx((9 + 7) / 2, abs=1)
    prompt, other, noise = (rows[item, notes.DISTANCE] for item in (notes.PROMPT, notes.OTHER, notes.NOISE))
    assert (prompt.role, other.role, noise.role, prompt.n) == ("ceiling", "floor", "floor", 2)
    assert prompt.value == pytest.approx((0.75 + 0) / 2, abs=0.1)  # of 60 64 67 72 one is in 71 67 62 65
    assert other.value == pytest.approx(1, abs=0.1) and noise.value > 0.8
    assert rows[notes.NOISE, notes.RATE].value < 0.9 and (notes.NOISE, notes.MEAN) not in rows
    assert rows[LABELS["resynthesis"], notes.RATE].value is None


def test_notes_of_probabilities():
    onset, sounding = np.zeros((90, 88)), np.zeros((90, 88))
    onset[10:13, 39] = 0.4, 0.9, 0.6  # one peak
    sounding[11:40, 39] = 0.8
    sounding[44:50, 39] = 0.8  # a short gap is no end
    sounding[70:80, 39] = 0.8  # nothing began here
    onset[20, 50] = 0.9  # nothing sounds
    onset[[30, 45], 60] = 0.9  # the same key again
    sounding[30:65, 60] = 0.8
    found = notes_in(onset, sounding, 0.0125)
    assert [tuple(np.round([s / 0.0125, e / 0.0125, p]).astype(int)) for s, e, p in found] == [
        (11, 50, 60), (30, 45, 81), (45, 65, 81)]


def test_keys_at_once():
    one = [Note(0.5 * i, 0.5 * i + 0.4, 60 + i) for i in range(4)]
    assert keys_at_once(one) == pytest.approx(1)  # rests do not count
    assert keys_at_once([n._replace(pitch=n.pitch + k) for n in one for k in (0, 4, 7)]) == pytest.approx(3)
    assert keys_at_once([Note(0, 1, 60), Note(0.5, 1.5, 64)]) == pytest.approx(2 / 1.5)
    with pytest.raises(ValueError, match="no notes sound"):
        keys_at_once([])


def test_distance_of_pitch_classes():
    c_major, black = ([Note(i, i + 1, p) for i, p in enumerate(pitches)] for pitches in (SCALE, BLACK))
    octave_up = [n._replace(pitch=n.pitch + 12) for n in c_major]
    assert pitch_class_distance(c_major, octave_up * 2) == pytest.approx(0)
    assert pitch_class_distance(c_major, black) == 1 and pitch_class_distance([], black) == 1
    assert pitch_class_distance(black, black + black[:2] + [black[0]] * 2) == pytest.approx(0.25)
