"""The published system small: whole, in float16, below 40 MB, and what the commands speak with where there is no run."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import numpy as np
import soundfile

import audiolm
from audiolm import pretrained, store
from audiolm.dag.run_index import GENERATION_STEPS
from audiolm.generate.load import system_steps
from audiolm.tokenizers.artifact import read_export
from audiolm.tokenizers.publish import without_paths
from tests.worlds.basics import ROOT
from workflows import generate

MOST = 40_000_000  # bytes of all files
SPEECH = ROOT / "workflows/quickstart/flac/test/9009/109/9009-109-0000.flac"


def test_the_folder_is_whole_and_names_no_machine():
    index = pretrained.path("small")
    folder, steps = Path(index).parent, system_steps(index)
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= MOST
    assert set(steps) == set(GENERATION_STEPS) - {"lm_fine", "lm_parallel"}
    for step in steps.keys() - {"semantic_tokens"}:
        weights, config, _ = read_export(steps[step])
        assert all(v.dtype.itemsize == 2 for v in weights.values() if v.is_floating_point()), step
        assert without_paths(config) == config
    assert without_paths(store.get_json(index)["config"]) == store.get_json(index)["config"]
    assert len((folder / "README.md").read_text()) > 1000  # the model card


def test_without_a_run_it_continues_a_prompt_and_needs_no_network(tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise AssertionError(f"a connection to {args[-1]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    assert generate.main(["--prompt", str(SPEECH), "--seconds", "1", "--samples", "1", "--out", "out", "--whole"]) == 0
    assert "run small" in capsys.readouterr().out
    made = json.loads(next(Path("out").glob("*.json")).read_text())
    wav_T, rate = soundfile.read(next(Path("out").glob("*.wav")))
    assert rate == 16_000 and len(wav_T) == 64_000 and made["prompt_s"] == 3.0
    assert 0.003 < np.sqrt(np.mean(wav_T[48_000:] ** 2)) < 0.5  # as loud as speech


def test_it_is_the_codec_of_its_name_too():
    assert audiolm.load_codec("small", "cpu").spec.n_q == 6 and "small" not in pretrained.codecs()
