"""Files that crash, hang or overwhelm a decoder: each is rejected by name, and the step goes on."""

from __future__ import annotations

import os
import struct
import tracemalloc

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile as sf

from audiolm.config.corpus import CorpusConfig
from audiolm.config.run import ClusterConfig
from audiolm.data import apart, scan
from audiolm.data.clips import read_clips
from audiolm.data.manifest import build_manifest
from tests.worlds.basics import RecordingOut


def sound(path, seconds: float = 1.0) -> None:
    path.parent.mkdir(exist_ok=True)
    sf.write(path, 0.1 * np.random.default_rng(0).standard_normal(int(16_000 * seconds)), 16_000)


def build(tmp_path) -> tuple[list[str], dict[str, tuple[str, str]]]:
    """(the files of the manifest of tmp_path/in, {rejected file: (reason, detail)})."""
    corpus = CorpusConfig(name="c", sources=[{"kind": "folder", "name": "f", "root": str(tmp_path / "in")}], max_rejected=0.9)
    out = RecordingOut(tmp_path / "out")
    build_manifest({"corpus": corpus, "seed": 0, "cluster": ClusterConfig()}, {}, out)
    rows = pq.read_table(f"{out.path}/rejected.parquet").to_pylist()
    return sorted(c.parts[0].uri for c in read_clips(out.path)), {r["uri"]: (r["reason"], r["detail"]) for r in rows}


# In the child alone: libsndfile has no fault on record that a file could bring out in every version.
FAULTS = """
import importlib.abc, importlib.util, os, signal, sys

class Faulty(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "soundfile":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            read = module.SoundFile.read

            def faulty(self, *args, **more):
                for word, fault in FAULTS.items():
                    if os.path.basename(str(self.name)) == word + '.wav':
                        open(os.environ["FAULTS"], "a").write(word + " ")
                        fault()
                return read(self, *args, **more)

            module.SoundFile.read = faulty

        spec.loader.exec_module = exec_module
        return spec

def hang():
    while True:
        pass

FAULTS = {"crash": lambda: os.kill(os.getpid(), signal.SIGSEGV), "hang": hang, "outofmemory": lambda: os.kill(os.getpid(), 9)}
sys.meta_path.insert(0, Faulty())
"""


@pytest.fixture
def faults(tmp_path, monkeypatch):
    """The file that lists the faults that happened."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FAULTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("FAULTS", str(tmp_path / "faults"))
    monkeypatch.setattr(scan, "CPU_S", 0.1)
    return tmp_path / "faults"


def test_a_file_that_crashes_or_hangs_its_decoder_three_times_is_rejected_by_name(tmp_path, faults):
    for name in ("a", "crash", "b", "hang", "c"):
        sound(tmp_path / "in" / f"{name}.wav")
    used, rejected = build(tmp_path)
    assert used == ["a.wav", "b.wav", "c.wav"] and faults.read_text().split() == ["crash"] * 3 + ["hang"] * 3
    assert rejected == {
        "crash.wav": ("unreadable", "the decoder crashed (SIGSEGV), 3 times; convert the file anew"),
        "hang.wav": ("unreadable", "the decoder took over 0.1 s for a minute of it, 3 times; convert the file anew")}


def test_a_decoder_that_is_killed_for_memory_names_the_file_and_rejects_nothing(tmp_path, faults):
    sound(tmp_path / "in" / "outofmemory.wav")
    with pytest.raises(RuntimeError, match=r"outofmemory\.wav: .* was killed 3 times"):
        build(tmp_path)


def wav(path, channels: int, rate: int, data: bytes, promised: int) -> None:
    """A 16-bit WAV whose header may promise more bytes than it has."""
    path.write_bytes(b"RIFF" + struct.pack("<I", 36 + promised) + b"WAVEfmt " + struct.pack(
        "<IHHIIHH", 16, 1, channels, rate, (rate * channels * 2) & 0xFFFFFFFF, (channels * 2) & 0xFFFF, 16)
        + b"data" + struct.pack("<I", promised) + data)


def test_a_header_of_a_thousand_channels_asks_for_no_more_than_a_block(tmp_path):
    wav(tmp_path / "wide.wav", 1024, 384_000, b"\1\1" * 1024 * 100, 1024 * 200)
    tracemalloc.start()
    try:
        measured = scan.measure(str(tmp_path / "wide.wav"))
        peak_mb = tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()
    assert measured.frames == 100 and peak_mb < 400  # it was 88 GiB


def test_more_audio_than_a_file_may_hold_is_rejected_by_its_header(tmp_path, monkeypatch):
    sound(tmp_path / "in" / "good.wav")
    sound(tmp_path / "in" / "long.wav", 5)
    monkeypatch.setattr(scan, "MOST_S", 3)
    monkeypatch.setattr(apart, "call", lambda fn, *args: fn(*args))  # here, where the limit is low
    monkeypatch.setattr(apart, "allow_cpu", lambda seconds: None)  # it would end this process later, with all its tests
    used, rejected = build(tmp_path)
    assert used == ["good.wav"] and rejected["long.wav"][0] == "too long"


def test_a_named_pipe_holds_nothing_up(tmp_path):
    sound(tmp_path / "in" / "good.wav")
    os.mkfifo(tmp_path / "in" / "pipe.wav")
    assert build(tmp_path) == (["good.wav"], {"pipe.wav": ("unreadable", "a pipe, not a regular file")})
