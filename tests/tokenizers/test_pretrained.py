"""The published codec speech-16k: whole, in float16, with the codes on record, and used by its name without a network.

`python -m tests.tokenizers.test_pretrained` records its codes anew, which is right only where new weights are published.
"""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import soundfile as sf
import torch

import audiolm
from audiolm import pretrained, store
from audiolm.config.load import load_config
from audiolm.data.audio import start_of
from audiolm.models.losses import multi_scale_mel
from audiolm.tokenizers.artifact import read_export
from audiolm.tokenizers.publish import without_paths
from audiolm.tokenizers.semantic import golden_clip
from audiolm.tokenizers.start import start_weights
from audiolm.train.objectives.codec import codec_start
from tests.worlds.basics import ROOT
from workflows import codec as command

NAME = "speech-16k"
GOLDEN = ROOT / "tests" / "golden" / f"{NAME}.safetensors"
SPEECH = ROOT / "workflows/quickstart/flac/test/9009/109/9009-109-0000.flac"


def numbers() -> dict[str, torch.Tensor]:
    """codes_TQ of the synthetic clip of 2 s, and its first 0.5 s decoded from these codes."""
    codec, wav_BT = audiolm.load_codec(NAME, "cpu"), golden_clip()
    codes_TQ = codec.encode(wav_BT, torch.tensor([wav_BT.shape[1]]))[0]
    return {"codes_TQ": codes_TQ, "wav_T": codec.decode(codes_TQ[None, :25])[0]}


@pytest.fixture(scope="module")
def codec():
    return audiolm.load_codec(NAME, "cpu")


def test_codes_and_sound_are_those_on_record():
    expected, found = safetensors.torch.load_file(GOLDEN), numbers()
    codes_TQ = expected["codes_TQ"]
    # A frame close to a tie may round the other way on another processor, and its later levels follow.
    assert found["codes_TQ"].shape == codes_TQ.shape and (found["codes_TQ"] == codes_TQ).double().mean() > 0.98
    assert len(codes_TQ.unique()) > 50
    decoded_T = audiolm.load_codec(NAME, "cpu").decode(codes_TQ[None, :25])[0]
    torch.testing.assert_close(decoded_T, expected["wav_T"], rtol=1e-3, atol=1e-3)


def test_the_folder_is_whole_and_names_no_machine():
    folder = pretrained.path(NAME)
    weights, config, digest = read_export(folder)
    assert {v.dtype for v in weights.values() if v.is_floating_point()} == {torch.float16}
    assert "weights_sha256" in config and audiolm.load_codec(NAME, "cpu").hash == digest
    assert len(Path(folder, "README.md").read_text()) > 500
    for name in ("export/config.json", "recipe.json"):
        value = store.get_json(f"{folder}/{name}")
        assert value is None or without_paths(value) == value


def test_speech_comes_back_and_more_levels_are_nearer(codec):
    wav_T = torch.from_numpy(start_of(str(SPEECH), 3 * 16_000))
    codes_TQ = codec.encode(wav_T[None], torch.tensor([len(wav_T)]))[0]
    distance = {}
    for levels in (1, codec.spec.n_q):
        decoded_T = codec.decode(codes_TQ[None, :, :levels])[0, :len(wav_T)]
        distance[levels] = float(multi_scale_mel(decoded_T[None], wav_T[None]))
    assert (codec.spec.sample_rate, codec.spec.hop) == (16_000, 320) and distance[codec.spec.n_q] < distance[1]
    assert 0.5 < float(decoded_T.square().mean() / wav_T.square().mean()) < 2  # as loud


def test_the_commands_take_its_name_without_a_network(tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise AssertionError("the published codec needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    sf.write("a.wav", start_of(str(SPEECH), 32_000), 16_000)
    assert command.main(["encode", "a.wav", "--codec", NAME, "--out", "codes"]) == 0
    assert command.main(["decode", "codes", "--out", "again"]) == 0  # without a run it is the default
    assert f"the published codec {NAME} is used" in capsys.readouterr().out
    wav_T, rate = sf.read("again/a.wav")
    assert rate == 16_000 and len(wav_T) == 32_000 and np.abs(wav_T).max() > 0.01
    assert command.main(["evaluate", "a.wav", "--codec", NAME, "--seconds", "1", "--levels", "1", "--metrics", "pesq,mel",
                         "--inline", "--out", "table"]) == 0


if __name__ == "__main__":
    safetensors.torch.save_file({name: value.contiguous() for name, value in numbers().items()}, GOLDEN)


def test_a_training_starts_from_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load_config(str(ROOT / "workflows" / "speech.yaml"), ["codec.start={uri: speech-16k}"])
    planned = start_weights("codec.start.uri", cfg.codec.start, "codec")
    assert (planned.uri, planned.digest) == (pretrained.path(NAME), audiolm.load_codec(NAME, "cpu").hash)
    weights = codec_start(cfg.codec.model_copy(update={"n_q": audiolm.load_codec(NAME, "cpu").spec.n_q}), planned)
    assert len(weights) > 20
    (tmp_path / "speech-16k").mkdir()  # what a user made comes first
    cfg = load_config(str(ROOT / "workflows" / "speech.yaml"), ["codec.start={uri: speech-16k}"])
    assert cfg.codec.start.uri == str(tmp_path / "speech-16k")
