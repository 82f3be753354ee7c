"""The listening test: what a rater's page holds, what the key says, and what the answers amount to."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import soundfile

from audiolm import store
from audiolm.eval.listening import prepare, score
from audiolm.generate.load import load
from tests.worlds.tiny_system import RUN, build, voice


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    return load(build(str(tmp_path_factory.mktemp("system"))), "cpu", RUN)


@pytest.fixture(scope="module")
def test(system, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("test"))
    prepare({"ours": system}, [voice(2.0, seed) for seed in range(6)], out, 0.8, 0.8, seed=3)
    return out, store.get_json(f"{out}/key.json")


def sound(out, number, side):
    return soundfile.read(io.BytesIO(store.get(f"{out}/page/{number}-{side}.wav")), dtype="float32")[0]


def test_each_pair_is_a_recording_and_a_continuation_of_the_same_length_and_loudness(test):
    out, key = test
    assert len(key["pairs"]) == 6 and all(set(pair.values()) == {"recording", "ours"} for pair in key["pairs"].values())
    assert len({tuple(pair.items()) for pair in key["pairs"].values()}) == 2  # the recording is not always on one side
    for number in key["pairs"]:
        a, b = (sound(out, number, side) for side in "ab")
        assert len(a) == len(b) == 16_000 * 1.6 and not np.array_equal(a, b)
        assert np.sqrt(np.mean(a**2)) == pytest.approx(np.sqrt(np.mean(b**2)), rel=0.02)


def test_the_page_does_not_tell_which_is_which(test):
    out, key = test
    page = store.get(f"{out}/page/index.html").decode()
    assert all(number in page for number in key["pairs"]) and key["test"] in page
    assert "ours" not in page and store.names(f"{out}/page").count("key.json") == 0


def test_sides_and_order_follow_from_the_seed(system, test, tmp_path):
    wavs = [voice(2.0, seed) for seed in range(6)]
    prepare({"ours": system}, wavs, str(tmp_path / "same"), 0.8, 0.8, seed=3)
    prepare({"ours": system}, wavs, str(tmp_path / "other"), 0.8, 0.8, seed=4)
    same, other = (store.get_json(str(tmp_path / name / "key.json")) for name in ("same", "other"))
    assert same == test[1] and other["test"] != same["test"]
    assert store.get(str(tmp_path / "same/page/001-a.wav")) == store.get(f"{test[0]}/page/001-a.wav")


def test_answers_become_a_share_with_its_interval(test):
    key = test[1]
    right = {number: "ab"[pair["b"] == "recording"] for number, pair in key["pairs"].items()}
    found = score(key, [{"test": key["test"], "answers": right}])
    assert found["chosen"]["recording"] == [1.0, 1.0, 1.0] and found["p"] == pytest.approx(2 / 2**6)
    flipped = {**right, "001": "ab"["ba".index(right["001"])]}
    mixed = score(key, [{"test": key["test"], "answers": right}, {"test": key["test"], "answers": flipped}])
    assert mixed["judgements"] == 12 and mixed["raters"] == 2 and mixed["chosen"]["recording"][0] == pytest.approx(11 / 12)
    assert mixed["chosen"]["recording"][1] < 11 / 12 <= mixed["chosen"]["recording"][2]
    with pytest.raises(ValueError, match="give the key.json beside their page"):
        score(key, [{"test": "another", "answers": right}])
    with pytest.raises(ValueError, match="no pair was answered"):
        score(key, [{"test": key["test"], "answers": {}}])


def test_two_systems_are_compared_without_recordings(system, tmp_path):
    prepare({"old": system, "new": system}, [voice(2.0)], str(tmp_path), 0.8, 0.8)
    key = json.loads((tmp_path / "key.json").read_text())
    assert key["kind"] == "preference" and set(key["pairs"]["001"].values()) == {"old", "new"}
    assert "continues it better" in (tmp_path / "page" / "index.html").read_text()
    with pytest.raises(ValueError, match="nothing behind 2 s"):
        prepare({"old": system}, [voice(2.0)], str(tmp_path / "short"), 2.0, 1.0)
    assert not (tmp_path / "short").exists()
