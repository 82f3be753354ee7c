"""Published models: their names, the command that publishes a codec, and what float16 changes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import soundfile as sf
import torch

import audiolm
from audiolm import pretrained, store
from audiolm.tokenizers import publish as publishing
from audiolm.tokenizers.acoustic import load_codec
from audiolm.tokenizers.publish import publish
from tests.worlds.basics import ROOT
from tests.worlds.tiny_codec import built_codec, noise, voice, whole_codes
from workflows import codec as command

CLIPS = [voice(32_000, 0).numpy(), noise(20_000)]
NAME = pretrained.DEFAULT_CODEC


@pytest.fixture
def build(tmp_path) -> str:
    """A codec build with its recipe, as a run's step leaves it."""
    folder = built_codec(str(tmp_path / "store/codec/0123456789ab/0001/0001"))
    store.put_json(str(tmp_path / "store/codec/0123456789ab/recipe.json"), {
        "step": "codec", "config": {"codec": {"n_q": 3, "where": "/data/x"}, "sources": ["s3://bucket/x", "a/b", "**/*.wav"]}})
    return folder


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """The folder of published models, empty, and a working folder beside it."""
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "desk").mkdir()
    monkeypatch.setattr(pretrained, "ROOT", str(tmp_path / "pretrained"))
    monkeypatch.chdir(tmp_path / "desk")
    return tmp_path / "pretrained"


def test_names_and_folders(root, build):
    assert pretrained.names() == ()
    with pytest.raises(ValueError, match="no published model 'tiny'; published are: none"):
        pretrained.path("tiny")
    (root / "half").mkdir()  # no config: not whole
    for name in ("tiny", "other"):
        publish(build, str(root / name), CLIPS)
    assert pretrained.names() == ("other", "tiny") and pretrained.path("tiny") == f"{root}/tiny"
    with pytest.raises(ValueError, match="published are: other, tiny"):
        pretrained.path("half")


def test_a_bare_name_is_the_published_model_unless_there_is_such_a_path(root, build):
    publish(build, str(root / "tiny"), CLIPS)
    assert pretrained.resolve("tiny") == f"{root}/tiny"
    for place in ("./tiny", "x/tiny", "s3://tiny", "unknown", "runs/tiny.json"):
        assert pretrained.resolve(place) == place
    Path("tiny").mkdir()
    assert pretrained.resolve("tiny") == "tiny"


def test_names_need_no_torch():
    code = "import sys, audiolm, audiolm.pretrained as p; p.names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_published_codec_is_the_build_in_float16(root, build):
    made = publish(build, str(root / "tiny"), CLIPS)
    again = publish(build, str(root / "again"), CLIPS)
    files = [root / "tiny/export" / name for name in ("model.safetensors", "config.json")]
    assert [f.read_bytes() for f in files] == [(root / "again/export" / f.name).read_bytes() for f in files]
    assert made.hash == again.hash == hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]
    assert publish("tiny", str(root / "twice"), CLIPS).hash == made.hash  # a published codec is in float16 already

    original, kept = (safetensors.torch.load_file(f"{place}/export/model.safetensors") for place in (build, root / "tiny"))
    assert original.keys() == kept.keys() and made.size < made.original_size
    assert any(not value.is_floating_point() for value in original.values())
    for name, value in original.items():
        assert torch.equal(kept[name], value.half() if value.is_floating_point() else value)

    codec, before = audiolm.load_codec("tiny", "cpu"), load_codec(build)
    state = codec.model.state_dict()
    assert {v.dtype for v in state.values() if v.is_floating_point()} == {torch.float32} and codec.hash == made.hash
    assert all(torch.equal(state[name].double(), value.double()) for name, value in kept.items())
    same = np.concatenate([(whole_codes(codec, w) == whole_codes(before, w)).numpy() for w in CLIPS])
    assert made.equal == pytest.approx(same.mean()) and made.equal_first == pytest.approx(same[:, 0].mean())
    assert made.codes == same.size and 0.95 < made.equal <= 1


def test_the_recipe_goes_along_without_paths(root, build):
    assert publish(build, str(root / "tiny"), CLIPS).recipe
    assert store.get_json(f"{root}/tiny/recipe.json") == {
        "step": "codec", "config": {"codec": {"n_q": 3}, "sources": ["a/b", "**/*.wav"]}}
    assert not publish(built_codec(str(root.parent / "alone/x")), str(root / "other"), CLIPS).recipe


def test_what_cannot_be_published_is_refused_and_writes_nothing(root, build, tmp_path):
    target = str(root / "tiny")
    weights = safetensors.torch.load_file(f"{build}/export/model.safetensors")

    def changed(config: dict | None = None, **tensors: torch.Tensor) -> str:
        folder = str(tmp_path / "changed")
        store.put(f"{folder}/export/model.safetensors", safetensors.torch.save({**weights, **tensors}))
        store.put_json(f"{folder}/export/config.json", config or store.get_json(f"{build}/export/config.json"))
        return folder

    store.put_json(str(tmp_path / "theirs/config.json"), {"model_type": "dac"})
    codebook = weights["quantizer.codebook_QND"]
    for place, message in ((lambda: str(tmp_path / "theirs"), "is no codec build"),
                           (lambda: changed({"kind": "dac"}), r"is an imported codec \(dac\)"),
                           (lambda: changed(**{"quantizer.codebook_QND": 1e6 * codebook}), "codebook_QND hold numbers beyond"),
                           (lambda: changed(**{"quantizer.codebook_QND": 1e-9 * codebook}), "do not survive float16"),
                           (lambda: changed(x=torch.zeros(1)), "do not fit")):
        with pytest.raises(ValueError, match=message):
            publish(place(), target, CLIPS)
    assert not store.exists(target)


def test_another_codec_is_replaced_only_by_force(root, build, tmp_path):
    other, target = built_codec(str(tmp_path / "other/1"), seed=1), str(root / "tiny")
    first = publish(build, target, CLIPS)
    with pytest.raises(ValueError, match=f"holds another codec .{first.hash}"):
        publish(other, target, CLIPS)
    assert audiolm.load_codec("tiny", "cpu").hash == first.hash and store.exists(f"{target}/recipe.json")
    assert publish(other, target, CLIPS, force=True).hash == audiolm.load_codec("tiny", "cpu").hash != first.hash
    assert not store.exists(f"{target}/recipe.json")  # it was the first one's


def test_an_altered_export_is_refused(root, build):
    publish(build, str(root / "tiny"), CLIPS)
    config = root / "tiny/export/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "weights_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="is not the file that config.json describes"):
        audiolm.load_codec("tiny", "cpu")


def test_the_command_publishes_and_the_others_take_the_name(root, build, capsys, monkeypatch):
    sf.write("a.wav", voice(32_000, 3).numpy(), 16_000)
    index = {"steps": {"codec": {"path": build}}}
    store.put_json("run.json", index)
    argv = ["publish", "--codec", "run.json", "--out", str(root), "--name", NAME]
    assert command.main(argv) == 0
    out = capsys.readouterr().out
    assert f"codec {audiolm.load_codec(NAME).hash} in {root}/{NAME}: 0.0" in out and "on a synthetic sound" in out
    assert "recipe.json: the build's, without paths" in out
    assert command.main([*argv, "a.wav"]) == 0 and "of 300, " in capsys.readouterr().out

    # By its name, and without one where there is no quickstart run.
    for name in (["--codec", NAME], []):
        cpu = [*name, "--device", "cpu"]
        assert command.main(["encode", "a.wav", "--out", "codes", "--force", *cpu]) == 0
        assert (f"the published codec {NAME} is used" in capsys.readouterr().out) == (not name)
        assert command.main(["decode", "codes", "--out", "again", "--force", *cpu]) == 0 and Path("again/a.wav").exists()
    small = ["--levels", "1", "--seconds", "1", "--metrics", "mel", "--inline"]
    assert command.main(["evaluate", "a.wav", "--codec", NAME, *small]) == 0
    capsys.readouterr()
    store.put_json("outputs/runs/quickstart.json", index)
    assert command.main(["encode", "a.wav", "--out", "new", "--device", "cpu"]) == 0
    assert f"codec soundstream {load_codec(build).hash} on cpu" in (out := capsys.readouterr().out) and NAME not in out

    # Wrong names list the right ones; broken publications are wrong usage.
    assert command.main(["encode", "a.wav", "--out", "o", "--codec", "speech"]) == 2
    assert f"a published codec's name ({NAME})" in capsys.readouterr().err
    monkeypatch.setattr(publishing, "LEAST_EQUAL", 1.1)
    assert command.main(argv) == 2 and "do not survive float16" in capsys.readouterr().err
