"""Channels that cancel each other, and samples that are no sound: in the manifest, prompts and codec.py alike."""

from __future__ import annotations

import logging

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile as sf

from audiolm.config.corpus import CorpusConfig
from audiolm.config.run import ClusterConfig
from audiolm.data import audio, scan
from audiolm.data.channels import check_level
from audiolm.data.clips import read_clip, read_clips
from audiolm.data.containers.raw import Unusable
from audiolm.data.manifest import build_manifest
from audiolm.generate.prompts import prompt_from_array, read_prompt
from tests.worlds.basics import RecordingOut

RATE = 16_000
X = (0.1 * np.random.default_rng(0).standard_normal(2 * RATE)).astype(np.float32)
Y = (0.1 * np.random.default_rng(1).standard_normal(2 * RATE)).astype(np.float32)
# name: (channels, what is taken of them, whether the manifest has a remark)
CHANNELS = {
    "inverted": ([X, -X], X, True),
    "nearly": ([X, -0.98 * X], X, True),
    "second stronger": ([-0.9 * X, X], X, True),
    "quieter": ([X, -0.8 * X], X, True),
    "eight": ([X, -X, X, -X, X, -X, 0 * X, 0 * X], X, True),
    "one of eight": ([X, *[0 * X] * 7], X, True),
    "same": ([X, X], X, False),
    "left": ([X, 0 * X], X / 2, False),
    "stereo": ([X, Y], (X + Y) / 2, False),
    "partly": ([X, -0.5 * X], X / 4, False),
    "side": ([X + Y, X - Y], X, False),
    "seven": ([X, *[0 * X] * 6], X / 7, False),
}


def build(tmp_path, **corpus):
    """(the manifest's facts, its clips, rejected rows by file) of tmp_path/in."""
    config = CorpusConfig(name="c", sources=[{"kind": "folder", "name": "f", "root": str(tmp_path / "in")}],
                          max_rejected=0.9, dev=0, test=0, **corpus)
    out = RecordingOut(tmp_path / "out")
    facts = build_manifest({"corpus": config, "seed": 0, "cluster": ClusterConfig()}, {}, out)
    rows = pq.read_table(f"{out.path}/rejected.parquet").to_pylist()
    return facts, read_clips(out.path), {r["uri"]: (r["reason"], r["detail"]) for r in rows}


def test_channels_that_cancel_give_the_stronger_one_and_others_their_mean(tmp_path, caplog):
    (tmp_path / "in").mkdir()
    for name, (channels, _, _) in CHANNELS.items():
        sf.write(tmp_path / "in" / f"{name}.wav", np.stack(channels, 1), RATE, subtype="FLOAT")
    facts, clips, rejected = build(tmp_path)
    assert not rejected and len(clips) == len(CHANNELS)
    taken = sum(remark for _, _, remark in CHANNELS.values())
    (remark,) = (r for r in facts["remarks"] if "cancel" in r)
    assert remark.startswith(f"the channels of {taken} files cancel each other, so the strongest is taken: f/eight.wav, ")
    by_name = {c.parts[0].uri: c for c in clips}
    for name, (_, expected_T, remark) in CHANNELS.items():
        path = f"{tmp_path}/in/{name}.wav"
        np.testing.assert_allclose(read_clip(by_name[f"{name}.wav"], {"f": f"{tmp_path}/in"}), expected_T, atol=1e-6)
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            for wav_T in (np.concatenate([*audio.stream(path)]), audio.decode(path)[0], read_prompt(path, 0)):
                np.testing.assert_allclose(wav_T, expected_T, atol=1e-6)
            assert ("cancel each other" in caplog.text) == remark
        np.testing.assert_allclose(prompt_from_array(sf.read(path)[0], RATE, 0), expected_T, atol=1e-6)


def test_each_piece_of_a_file_has_its_own_choice(tmp_path):
    """A recording whose second half is wired the other way round: averaged as a whole, that half would be lost."""
    (tmp_path / "in").mkdir()
    half = np.tile(X, 5)
    sf.write(tmp_path / "in" / "a.flac", np.stack([np.r_[half, half], np.r_[half, -half]], 1), RATE)
    _, clips, _ = build(tmp_path, max_s=6.0)
    parts = sorted((p for c in clips for p in c.parts), key=lambda p: p.start)
    assert [p.channel for p in parts] == [None, None, 0, 0]


DAMAGED = np.arange(2 * RATE) == 9000
TOO_LOUD = {
    "int16": (X * 32767, r"\+8\d dBFS looks like 16-bit values saved as float: divide them by 32768"),
    "int32": (X * 2**31, r"\+1[78]\d dBFS looks like 32-bit values saved as float"),
    "up": (np.where(DAMAGED, 1e29, X), r"\+580 dBFS looks like damage: clean the file"),
    "down": (np.where(DAMAGED, -1e29, X), r"\+580 dBFS looks like damage"),
    "inverted": (np.stack([X * 32767, -X * 32767], 1), "16-bit values"),
    "one channel": (np.stack([X, X * 32767], 1), "16-bit values")}


def test_samples_far_beyond_full_scale_are_refused_by_name_everywhere(tmp_path):
    (tmp_path / "in").mkdir()
    for name, (wav, _) in TOO_LOUD.items():
        sf.write(tmp_path / "in" / f"{name}.wav", wav, RATE, subtype="FLOAT")
    sf.write(tmp_path / "in" / "hot.wav", X * 20, RATE, subtype="FLOAT")
    _, clips, rejected = build(tmp_path)
    assert [c.parts[0].uri for c in clips] == ["hot.wav"] and {reason for reason, _ in rejected.values()} == {"too loud"}
    for name, (_, text) in TOO_LOUD.items():
        path = f"{tmp_path}/in/{name}.wav"
        with pytest.raises(Unusable, match=text):
            scan.measure(path)
        for read in (lambda p=path: [*audio.stream(p)], lambda p=path: audio.decode(p), lambda p=path: read_prompt(p)):
            with pytest.raises(ValueError, match=rf"{name}\.wav: too loud: .*{text}"):
                read()
        with pytest.raises(ValueError, match="too loud"):
            prompt_from_array(sf.read(path)[0], RATE)


def test_levels_up_to_20_db_above_full_scale_are_sound():
    for peak in (0.0, 1.0, 3.0, 9.9, float("nan"), float("inf")):  # the last two have a reason of their own
        check_level(peak)
    with pytest.raises(Unusable, match="too loud"):
        check_level(10.1)
