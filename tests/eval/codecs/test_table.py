"""The table of codecs on planted codecs of known answers, killed half-way, sharded otherwise, and without packages or data."""

from __future__ import annotations

import os
from functools import partial

import numpy as np
import pytest
import soundfile
import torch

from audiolm import store
from audiolm.config.run import ClusterConfig
from audiolm.data.parallel import Workers
from audiolm.eval import codec_scores, codec_table
from audiolm.eval.codec_scores import Scoring, System, TableClip
from audiolm.eval.models import asr, speaker
from audiolm.report.results_page import build
from audiolm.tokenizers.base import TokenSpec
from tests.eval.test_codec_quality import RATE, noise, voice

WORDS = "it was the best of times it was the worst".split()
OUT = Workers(True, "table", lambda *args: None)


class Planted:
    """Gives the clip back with noise: as loud as `noise_at[q - 1]` with q levels, the voice being about 0.1. `hz`: its rate."""

    def __init__(self, name: str, noise_at: tuple[float, ...], hz: int = RATE):
        self.spec, self.hash, self.noise_at, self.decoded = TokenSpec(name, hz, 320, len(noise_at), 256), name, noise_at, 0

    def encode(self, wav_BT, lengths_B):
        self.wav_BT = wav_BT
        return [torch.zeros(-(-wav_BT.shape[1] // 320), self.spec.n_q, dtype=torch.int64)]

    def decode(self, codes_BTQ):
        self.decoded += 1
        loud = self.noise_at[codes_BTQ.shape[2] - 1]
        return self.wav_BT + loud * torch.from_numpy(noise(self.wav_BT.shape[1])) if loud < 9 else 0.1 * torch.from_numpy(
            noise(self.wav_BT.shape[1], 1))[None]


@pytest.fixture
def planted(monkeypatch):
    """{name: codec}, a recogniser that hears fewer words the more noise there is, and a voice that is a mean spectrum."""
    codecs = {"identity": Planted("identity", (0.0,) * 3), "noise": Planted("noise", (9.0,)),
              "same": Planted("same", (0.05, 0.01, 0.01)), "24k": Planted("24k", (0.0,), 24_000)}

    def recognise(wav_T: np.ndarray) -> str:  # the voices end in silence
        return " ".join(WORDS[:round(len(WORDS) * max(0.0, 1 - 20 * float(np.sqrt(np.mean(np.square(wav_T[-1600:]))))))])

    def embed(wav_T: np.ndarray) -> np.ndarray:
        power_F = np.log(1e-6 + np.square(np.abs(np.fft.rfft(wav_T)))[:8000].reshape(80, 100).mean(1))
        return power_F / np.linalg.norm(power_F)

    monkeypatch.setattr(codec_scores, "open_codec", lambda place, device="cpu": codecs[place.rsplit("/", 1)[-1]])
    monkeypatch.setattr(codec_scores, "codec_folder", lambda place: place)
    monkeypatch.setattr(codec_scores, "_recogniser", lambda asr, device: recognise)
    monkeypatch.setattr(codec_scores, "_embedder", lambda model, device: embed)
    for module in (asr, speaker):
        monkeypatch.setattr(module, "missing_dependency", lambda *args: None)
    for cache in (codec_scores._codec, codec_scores._quality):
        cache.cache_clear()
    yield codecs
    codec_scores._codec.cache_clear()
    codec_scores._quality.cache_clear()


def spoken(index: int) -> np.ndarray:
    return np.concatenate([voice(RATE, index), np.zeros(1600, np.float32)])


def clips(n: int) -> list[TableClip]:
    return [TableClip(f"clip {i}", f"speaker {i % 2}", f"{i}", partial(spoken, i)) for i in range(n)]


def measured(folder, systems: list[System], some: list[TableClip], metrics=("si_sdr_db", "mel", "f0", "wer", "speaker"),
             absent=None) -> dict:
    return codec_table.measure(some, systems, absent or {}, Scoring(metrics), str(folder), OUT, ClusterConfig(device="cpu"))


def test_planted_codecs_have_their_known_answers(planted, tmp_path):
    systems, absent = codec_scores.systems_beside([codec_scores.codec_system(name, "all") for name in planted])
    assert not absent and [s.kind for s in systems].count("shipped") == 3
    del systems[3:5]  # two of Opus' rates
    table = measured(tmp_path, systems, clips(2), tuple(m for m in codec_scores.METRICS if m != "visqol"))
    rows = {(r["codec"], r["levels"]): r for r in table["rows"]}
    names, original, floor = table["metrics"], rows["original", None], rows["noise", 1]
    assert original["role"] == "ceiling" and rows["noise", None]["role"] == "floor" and floor["role"] == "ours"
    for q in (1, 2, 3):  # the identity is at the ceiling, whatever its levels
        assert {n: rows["identity", q][n] for n in names} == {n: original[n] for n in names}
        assert rows["identity", q]["kbps"] == pytest.approx(q * 50 * 8 / 1000)
    best = {n: original[n]["value"] for n in names}
    assert best["si_sdr_db"] == 100 and best["f0"] == pytest.approx(1) and best["wer"] == 0 and best["mel"] == 0
    assert best["speaker"] == pytest.approx(1) and best["pesq"] > 4.6 and best["stoi"] == pytest.approx(1, abs=1e-6)
    assert rows["24k", 1]["si_sdr_db"]["value"] > 20 and rows["24k", 1]["f0"]["value"] > 0.999  # resampled, there and back

    # Noise is at the floor.
    assert floor["wer"]["value"] == 100 and floor["si_sdr_db"]["value"] < -20 and floor["pesq"]["value"] < 1.3
    assert floor["f0"] == {"why": "fewer than 10 frames are voiced in both"} and floor["stoi"]["value"] < 0.3
    assert {n: rows["same", 2][n] for n in names} == {n: rows["same", 3][n] for n in names}
    assert rows["same", 1]["mel"]["value"] > rows["same", 2]["mel"]["value"]
    assert table["useless"] == {"identity": [2, 3], "same": [3]}  # and levels that change nothing are named

    # The same rows as text, as results and on a page.
    text, results = codec_table.as_text(table), codec_table.results(table)
    lines = text.split("\n\n")[0].splitlines()
    assert len({len(line) for line in lines}) == 1 and "F0 correlation" in lines[0] and lines[1].startswith("original")
    assert "same: levels that do not lower the mel distance: 3." in text and "interval over clips" in text
    found = {(r.item, r.metric): r for r in results}
    assert found["same, 1 level", "WER %"].value == rows["same", 1]["wer"]["value"]
    assert found["original", "STOI"].role == "ceiling" and found["original", "STOI"].n == 2
    assert found["noise, 1 level", "F0 correlation"].value is None and ("noise", "F0 correlation") not in found
    assert "Codecs by number of levels" in build("x", [("value", results, [])])


def test_a_table_that_was_killed_goes_on_and_is_the_same_to_the_last_bit(planted, tmp_path):
    systems = [codec_scores.codec_system(name, "all") for name in ("same", "identity")]
    whole = measured(tmp_path / "whole", systems, clips(3))
    if not (child := os.fork()):
        planted["identity"].decode = lambda codes_BTQ: os._exit(9)  # in the first clip, after the first codec's part
        measured(tmp_path / "killed", systems, clips(3))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    parts = store.names(str(tmp_path / "killed"))
    assert len(parts) == 1
    planted["same"].decoded = planted["identity"].decoded = 0
    assert measured(tmp_path / "killed", systems, clips(3)) == whole
    assert (planted["same"].decoded, planted["identity"].decoded) == (6, 9)  # the part that was written is not made again
    for sharding in ([0], [2], [1, 0]):  # a clip at a time, in another order
        measured(tmp_path / "sharded", systems[::-1], [clips(3)[i] for i in sharding])
    planted["same"].decoded = 0
    assert measured(tmp_path / "sharded", systems, clips(3)) == whole and planted["same"].decoded == 0


def test_what_is_missing_is_one_row_with_the_fix_and_the_rest_is_measured(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(speaker, "missing_dependency", lambda model: f"resemblyzer not installed: {speaker.INSTALL}")
    there = codec_scores.scorers(False)
    monkeypatch.setattr(codec_scores, "scorers", lambda visqol: type(there)(
        {k: v for k, v in there.by_name.items() if k != "stoi"}, {"stoi": "pystoi is not installed"}, None))
    systems, absent = codec_scores.systems_beside([codec_scores.codec_system("identity", [1])], str(tmp_path))
    assert list(absent) == ["Lyra v2"]
    bad = TableClip("bad.wav", "b", "b", partial(soundfile.read, str(tmp_path / "none.wav")))
    table = measured(tmp_path / "parts", [s for s in systems if s.kind != "shipped"], [*clips(1), bad],
                     ("stoi", "mel", "speaker"), absent)
    missing = [r for r in codec_table.results(table) if r.value is None]
    assert [(r.item, r.metric) for r in missing] == [("all codecs", "STOI"), ("all codecs", "speaker cosine"),
                                                     ("Lyra v2", "all metrics")]
    assert "pip install --no-deps resemblyzer" in missing[1].note and "stoi" not in table["metrics"]
    assert "No speaker cosine: resemblyzer not installed" in codec_table.as_text(table)
    assert table["clips"] == 1 and "none.wav" in table["left_out"]["bad.wav"]
    with pytest.raises(ValueError, match="none of the clips can be read, the first: bad.wav"):
        measured(tmp_path / "parts", systems, [bad])
    with pytest.raises(ValueError, match=r"levels \[0, 4\] do not exist: identity has 1 to 3"):
        codec_scores.codec_system("identity", [0, 2, 4])
    monkeypatch.setattr(codec_scores, "_recogniser", lambda asr, device: lambda wav_T: "")
    silent = measured(tmp_path / "silent", systems[:1], clips(1), ("wer",))
    assert silent["rows"][0]["wer"] == {"why": "the recogniser hears no words in the originals"}
    assert "WER % has a value on as few as 0 of 1 clips" in codec_table.as_text(silent)
