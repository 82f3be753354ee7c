"""What the demo page makes of its fields, on a tiny system: every mode, the ladder, and the line of each refusal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from audiolm.config.base import ConfigError
from audiolm.demo.sounds import Request, answer, ladder
from audiolm.eval.ladder import seconds_within
from audiolm.generate.load import load
from audiolm.generate.prompts import read_prompt
from tests.worlds.tiny_system import CROPS_S, RUN, build, voice
from workflows import demo as command

LONGEST_S = CROPS_S["coarse"]


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return load(build(str(tmp_path_factory.mktemp("system"))), "cpu", RUN)


@pytest.fixture
def request_(tmp_path) -> Request:
    path = str(tmp_path / "clip.wav")
    sf.write(path, voice(1.5), 16_000)
    return Request(path, "continuation", 0.6, 0.8, 2, 5, {"semantic": 0.9, "coarse": 1.0, "fine": 0.7})


def test_a_recording_is_continued_and_a_seed_gives_its_sound_again(lm, request_):
    recording, one, two = answer(lm, request_, LONGEST_S)
    np.testing.assert_array_equal(recording.wav_T, read_prompt(request_.recording, 0.6))
    assert recording.prompt_s is None and one.prompt_s == two.prompt_s == 0.6
    assert all(9600 < len(s.wav_T) <= 22_400 for s in (one, two)) and not np.array_equal(one.wav_T, two.wav_T)
    assert "Continuation, seed 5" in one.title and "Continuation, seed 6" in two.title
    again = answer(lm, replace(request_, samples=1, seed=6), LONGEST_S)
    assert len(again) == 2 and again[1].title == two.title
    np.testing.assert_array_equal(again[1].wav_T, two.wav_T)


def test_a_sound_that_the_model_ended_says_so(lm, request_):
    titles = [s.title for s in answer(lm, replace(request_, seconds=1.4, samples=4), LONGEST_S)[1:]]
    ended = [", ended by the model" in title for title in titles]
    assert ended == ["2.0 s" not in title for title in titles]


@pytest.mark.parametrize(("mode", "titles", "samples"), [
    ("acoustic", ["Recording", "New voice, seed 5", "New voice, seed 6"], 23_680),
    ("resynthesis", ["Recording", "Resynthesis, 1.5 s"], 23_680),
    ("unconditional", ["Sound, seed 5", "Sound, seed 6"], 12_800)])
def test_the_other_modes(lm, request_, mode, titles, samples):
    """The whole recording counts in whole frames of 40 ms: 1.48 of 1.5 s."""
    recording = None if mode == "unconditional" else request_.recording
    found = answer(lm, replace(request_, mode=mode, recording=recording), LONGEST_S)
    assert len(found) == len(titles) and all(s.title.startswith(t) for s, t in zip(found, titles, strict=True))
    lengths = {len(s.wav_T) for s in found}
    assert max(lengths) <= samples and (mode == "unconditional" or lengths == {samples})


def test_temperatures_are_the_requests_alone(lm, request_):
    before = dict(lm.sampling)
    _, one, two = answer(lm, replace(request_, temperatures=dict.fromkeys(before, 0.0)), LONGEST_S)
    np.testing.assert_array_equal(one.wav_T, two.wav_T)  # the most likely ids, whatever the seed
    assert lm.sampling == before
    with pytest.raises(ValueError, match=r"temperature \(-1\)"):
        answer(lm, replace(request_, temperatures={"fine": -1}), LONGEST_S)


def test_the_ladder_begins_with_the_recording(lm, request_):
    rungs = ladder(lm, request_, LONGEST_S)
    assert [s.title.split(",")[0] for s in rungs] == [
        "0. original", "1. codec", "2. codec", "3. fine from true coarse", "4. coarse from true semantic", "5. continuation"]
    np.testing.assert_array_equal(rungs[0].wav_T, read_prompt(request_.recording, 1.4))
    assert {len(s.wav_T) for s in rungs} == {22_400} and all("mel distance" in s.title for s in rungs[1:])
    assert [s.prompt_s for s in rungs] == [None] * 5 + [0.6]


def test_the_ladder_has_the_same_limits(lm, request_):
    with pytest.raises(ValueError, match="are 2.1 s together"):
        ladder(lm, replace(request_, mode="resynthesis", seconds=1.5), LONGEST_S)
    with pytest.raises(ValueError, match="there is no recording"):
        ladder(lm, replace(request_, recording=None), LONGEST_S)


@pytest.mark.parametrize(("wav", "mode", "line"), [
    (np.zeros(32_000), "continuation", "clip.wav: the prompt is silent (peak 0.0e+00"),
    (voice(0.3), "continuation", "clip.wav: the prompt lasts 0.30 s: give at least 0.5 s"),
    (np.full(16_000, np.nan), "resynthesis", "clip.wav: the sample at 0.000 s is NaN or infinite; clean the file"),
    (voice(LONGEST_S + 0.04), "acoustic", "clip.wav lasts longer than 2 s, and this mode takes the whole"),
    (b"", "continuation", "clip.wav is empty: it holds no bytes"),
    (b"no sound " * 99, "continuation", "clip.wav is no audio that can be read"),
    (None, "acoustic", "there is no recording")])
def test_a_bad_recording_is_refused_in_one_line(lm, request_, wav, mode, line):
    if isinstance(wav, bytes):
        Path(request_.recording).write_bytes(wav)
    elif wav is not None:
        sf.write(request_.recording, wav, 16_000, subtype="FLOAT")
    with pytest.raises(ValueError) as e:
        answer(lm, replace(request_, mode=mode, recording=request_.recording if wav is not None else None), LONGEST_S)
    assert str(e.value).startswith(line) and "\n" not in str(e.value)
    assert str(Path(request_.recording).parent) not in str(e.value)  # a folder of the server


def test_any_rate_and_channels_and_no_more_than_the_beginning_is_read(lm, request_):
    wav_T = np.repeat(voice(12.0), 3)
    wav_T[-9:] = np.nan  # a file is decoded in blocks of some seconds
    sf.write(request_.recording, np.stack([wav_T, wav_T / 2], 1), 48_000, subtype="FLOAT")
    assert len(answer(lm, request_, LONGEST_S)[0].wav_T) == 9600


@pytest.mark.parametrize(("fields", "line"), [
    ({"seconds": 1.5}, "are 2.1 s together, 2 s at most"), ({"seconds": 0.0}, "seconds: 0"),
    ({"seconds": float("nan")}, "seconds: nan"), ({"prompt_s": 0.1}, "seconds of the prompt: 0.1"),
    ({"mode": "unconditional", "seconds": 2.5}, "2.5 s"), ({"samples": 5}, "sounds: 5"), ({"mode": "sing"}, "'sing'")])
def test_a_request_beyond_the_limits_is_refused(lm, request_, fields, line):
    with pytest.raises(ValueError, match=line):
        answer(lm, replace(request_, **fields), LONGEST_S)


def test_the_owner_may_lower_the_limit(lm):
    assert seconds_within(lm, float("inf")) == LONGEST_S and seconds_within(lm, 1.5) == 1.5


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(ValueError, match="--max-seconds 0.5: at least 1"):
        command.serve(command.parser().parse_args(["--max-seconds", "0.5"]))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"gradio, which is not installed: .* pip install -e '\.\[demo\]'"):
        command.serve(command.parser().parse_args([]))
