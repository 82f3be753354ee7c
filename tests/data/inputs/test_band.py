"""The band that a sound reaches, and the filter that rejects narrow ones."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile as sf
import soxr

from audiolm.config.base import identity
from audiolm.config.corpus import CorpusConfig
from audiolm.config.run import ClusterConfig
from audiolm.data.band import band_hz
from audiolm.data.clips import read_clips
from audiolm.data.manifest import build_manifest
from tests.worlds.basics import ROOT, RecordingOut

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


def test_narrow_files_are_rejected_with_their_band(folder, tmp_path):
    def build(name: str, **more) -> tuple[set[str], dict[str, tuple[str, str]]]:
        source, out = {"kind": "folder", "name": "f", "root": str(folder)}, RecordingOut(tmp_path / name)
        corpus = CorpusConfig(name="c", sources=[source], max_rejected=0.9, **more)
        build_manifest({"corpus": corpus, "seed": 0, "cluster": ClusterConfig()}, {}, out)
        rows = pq.read_table(f"{out.path}/rejected.parquet").to_pylist()
        return {c.parts[0].uri for c in read_clips(out.path)}, {r["uri"]: (r["reason"], r["detail"]) for r in rows}

    used, rejected = build("a", min_band_hz=7000)
    assert used == {"full.wav", "cd.wav"} and set(rejected) == {"phone.wav", "lowpass.wav", "true8.wav"}
    assert {reason for reason, _ in rejected.values()} == {"narrow band"}
    assert "corpus.min_band_hz is 7000" in rejected["phone.wav"][1]
    assert build("b") == ({p.name for p in folder.iterdir()}, {})
    plain = {"name": "c", "sources": [{"kind": "folder", "name": "f", "root": "/"}]}
    assert "min_band_hz" not in identity(CorpusConfig(**plain))
    assert "min_band_hz" in identity(CorpusConfig(**plain, min_band_hz=1))
