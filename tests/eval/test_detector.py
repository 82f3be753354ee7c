"""The detector with planted traces: a buzz gives a generated sound away, sounds of one kind do not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import soundfile as sf

from audiolm import rng, store
from audiolm.eval.generated import Sample, SampleSpec
from audiolm.eval.models.convnet import Settings
from audiolm.eval.suites.detector import PLAN, TRAINED, crops, detector, pairs, score_windows
from tests.worlds.sounds import chance_band, talk
from workflows import evaluate as command

SR = 16_000
TINY = Settings(crop_s=1.0, channels=(8, 16, 16), mels=40, steps=50, batch=16, lr=5e-3)


def buzz(wav: np.ndarray) -> np.ndarray:
    return wav + 0.02 * np.sign(np.sin(np.arange(len(wav)) * 2 * np.pi * 3000 / SR)).astype(np.float32)


def sounds(generated=buzz, people: int = 8, seconds: float = 3.0) -> list[Sample]:
    """A clip a speaker, 1 s of prompt; what follows it in a continuation went through `generated`."""
    made = []
    for i in range(people):
        wav = talk(100 + 15 * i, 1 + seconds, i)
        wav[SR + 8000:SR + 12000] *= 1e-3  # a pause
        for mode in PLAN:
            one = np.concatenate([wav[:SR], generated(wav[SR:])]) if mode == "continuation" else wav
            made.append(Sample(SampleSpec(f"c{i}", f"p{i}", None, mode, 0, SR), one.astype(np.float32)))
    return made


def test_a_planted_trace_is_found_and_the_detector_judges_files(tmp_path):
    rows, path = detector(sounds(), str(tmp_path), TINY)
    table = {r.item: r for r in rows}
    assert table["original or continuation"].value > 95 and table["original or continuation"].paper == 98.6
    assert table["chance"].value == 50 and table["chance"].role == "floor"
    assert "others are judged" in table["continuations"].note
    wav = talk(130, 4.5, 99)
    p_S = score_windows(path, np.concatenate([wav[:2 * SR], buzz(wav[2 * SR:])]))
    assert p_S.shape == (4,) and p_S[:2].max() < 0.5 < p_S[2:].min()
    with pytest.raises(ValueError, match="lasts 0.50 s"):
        score_windows(path, wav[:SR // 2])
    assert detector(sounds(), str(tmp_path), TINY)[1] == path  # kept


def test_without_a_trace_it_is_at_chance(tmp_path):
    made = [*sounds(lambda wav: wav, people=40)]
    other = [replace(m, wav_T=np.concatenate([m.wav_T[:SR], talk(100 + 15 * (i // 3), 3.0, 500 + i)]).astype(np.float32))
             if m.spec.mode == "continuation" else m for i, m in enumerate(made)]
    rows, _ = detector(other, str(tmp_path), TINY)
    low, high = chance_band(rows[0].n)
    assert rows[0].n >= 40 and low <= rows[0].value <= high


def test_pairs_share_position_and_silence():
    made = sounds(lambda wav: wav, people=6)
    silent = [replace(m, wav_T=np.where(np.arange(len(m.wav_T)) < 2 * SR, m.wav_T, 1e-4 * m.wav_T)) for m in made]
    kinds = [crops([m for m in some if m.spec.mode == mode]) for some, mode in ((made, "original"), (silent, "continuation"))]
    assert {c.position for c in kinds[0]} == {0, 1, 2} and all(len(c.wav_T) == SR for c in kinds[0])
    assert {c.silence for c in kinds[1] if c.position == 2} == {3}  # all of it; the original has no such second
    found = pairs(*kinds, seed=0)
    assert found and all((a.position, a.silence) == (b.position, b.silence) for a, b in found)
    assert len({id(c) for pair in found for c in pair}) == 2 * len(found) < len(kinds[0]) + len(kinds[1])
    np.testing.assert_array_equal(kinds[0][1].wav_T, made[0].wav_T[2 * SR:3 * SR])


def test_speakers_of_the_test_are_not_learned_and_too_few_are_a_visible_row(tmp_path):
    rows, path = detector(sounds(people=1), str(tmp_path), TINY)
    assert path is None and rows[0].value is None and "of 1 speakers: give more clips" in rows[0].note
    made = sounds(people=8)
    order = rng.generator(0, "detector speakers").permutation(8)[:2]  # 0.3 of 8
    tested = {f"p{i}" for i in order}
    spoiled = [replace(m, wav_T=m.wav_T[::-1].copy()) if m.spec.speaker in tested else m for m in made]
    assert detector(spoiled, str(tmp_path), TINY)[1] == detector(made, str(tmp_path), TINY)[1]


def test_a_runs_detector_judges_files(tmp_path, capsys):
    suites = tmp_path / "tables" / "suites"
    _, path = detector(sounds(), str(suites / "nets"), TINY)
    store.put_json(str(suites / "detector-0" / TRAINED), {"net": path.rsplit("/", 1)[-1]})
    store.put_json(str(tmp_path / "runs" / "r.json"), {"steps": {"tables": {"path": str(tmp_path / "tables")}}})
    store.put_json(str(tmp_path / "runs" / "young.json"), {"steps": {}})
    folder = tmp_path / "sounds"
    folder.mkdir()
    wav = talk(130, 2.5, 99)
    for name, w in (("real", wav), ("made", buzz(wav)), ("short", wav[:800])):
        sf.write(folder / f"{name}.wav", np.stack([w, w], 1), SR)
    run = ("--store", str(tmp_path), "--run", "r", "--json", str(tmp_path / "out.json"))
    assert command.main(["detect", str(folder), *run]) == 1
    said, wrong = capsys.readouterr()
    judged = store.get_json(str(tmp_path / "out.json"))
    real, made = (judged[str(folder / f"{name}.wav")] for name in ("real", "made"))
    assert len(real) == len(made) == 2 and max(real) < 0.5 < min(made) and said.count("%") == 2
    assert "short.wav: the sound lasts 0.05 s" in wrong
    assert command.main(["detect", str(folder), "--store", str(tmp_path), "--run", "young"]) == 2
    assert "the run has no trained detector" in capsys.readouterr().err
