"""A published system: float16 exports under a name, which loads, continues and is refused as a run is."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import audiolm
from audiolm import pretrained, store
from audiolm.config.pipeline import Pipeline
from audiolm.generate.load import load, system_steps
from audiolm.generate.params import SamplingParams
from audiolm.generate.publish import publish_system
from audiolm.tokenizers.codec_lookup import codec_folder
from audiolm.tokenizers.start import find_export
from audiolm.tracking.lookup import find_run
from tests.worlds.tiny_system import RUN, build, token_store, voice
from workflows import generate


def run_of(folder: str, name: str = "tiny") -> str:
    """The index of a finished run with random weights."""
    steps = build(folder) | {"semantic_tokens": token_store(folder)}
    index = store.join(folder, "runs", f"{name}.json")
    corpus = {"name": "c", "sources": [{"kind": "folder", "name": "c", "root": f"{folder}/sounds"}]}
    config = Pipeline(run={"name": name}, store=folder, corpus=corpus).model_dump(mode="json")
    store.put_json(index, {"run": name, "corpus": "c", "steps": {n: {"path": p} for n, p in steps.items()}, "config": config})
    return index


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    index = run_of(str(folder / "store"))
    return index, publish_system(index, str(folder / "out"), "mini", [voice(1.0)])


@pytest.fixture
def known(published, monkeypatch):
    """The published system as one of the package's."""
    root = Path(published[1].path).parents[1]
    monkeypatch.setattr(pretrained, "ROOT", str(root))
    return root


def test_a_published_system_is_small_and_close_to_the_run(published):
    index, done = published
    run = sum(os.path.getsize(f"{path}/export/model.safetensors") for path in system_steps(index).values()
              if os.path.exists(f"{path}/export"))
    assert done.size < 0.7 * run + 30_000  # half of each weight, and configs
    assert done.equal_tokens > 0.9 and done.equal_codes > 0.8
    whole = b"".join(p.read_bytes() for p in Path(done.path).parent.rglob("*") if p.suffix in (".json", ".parquet"))
    assert str(Path(index).parents[1]).encode() not in whole  # no path of the machine


def test_it_is_known_by_its_name_wherever_a_run_is(known, published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "DEFAULT_SYSTEM", "mini")
    assert pretrained.names() == ("mini",) and find_run("mini") == find_run(None) == published[1].path
    system = audiolm.load("mini", "cpu")
    assert system.mean_run == RUN
    (sound,) = system.continue_(voice(1.0), seconds=0.4, prompt_s=0.6)
    assert np.isfinite(sound.wav_T).all() and len(sound.wav_T) <= 16_000
    assert codec_folder("mini") == f"{known}/mini/codec" and find_export(published[1].path, "codec") == f"{known}/mini/codec"
    # a run of the user's own wins over the name
    own = run_of(str(tmp_path / "outputs"), "mini")
    assert find_run("mini").removeprefix("./") == os.path.relpath(own)
    run_of(str(tmp_path / "outputs"), "quickstart")
    assert find_run(None).endswith("runs/quickstart.json")


def test_the_same_run_gives_the_same_bytes_and_a_card_is_kept(published, tmp_path):
    index, done = published
    again = publish_system(index, str(tmp_path), "mini", [voice(1.0)])
    files = {p.relative_to(tmp_path / "mini"): p.read_bytes() for p in (tmp_path / "mini").rglob("*") if p.is_file()}
    first = Path(done.path).parent
    assert files == {p.relative_to(first): p.read_bytes() for p in first.rglob("*") if p.is_file()} and again.size == done.size
    (tmp_path / "mini" / "README.md").write_text("card")
    with pytest.raises(ValueError, match="exists already"):
        publish_system(index, str(tmp_path), "mini", [voice(1.0)])
    publish_system(index, str(tmp_path), "mini", [voice(1.0)], force=True)
    assert (tmp_path / "mini" / "README.md").read_text() == "card" and os.listdir(tmp_path) == ["mini"]


def test_a_run_that_is_not_finished_is_not_published(published, tmp_path):
    index = str(tmp_path / "half.json")
    found = store.get_json(published[0])
    store.put_json(index, {**found, "steps": {n: s for n, s in found["steps"].items() if n != "lm_fine"}})
    with pytest.raises(ValueError, match="no finished step lm_fine"):
        publish_system(index, str(tmp_path / "out"), "half", [voice(1.0)])
    assert not (tmp_path / "out").exists()


def test_half_a_system_does_not_load(published, tmp_path):
    index, _ = published
    publish_system(index, str(tmp_path), "mini", [voice(1.0)])
    weights = tmp_path / "mini" / "codec" / "export" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"flip")
    with pytest.raises(ValueError, match="is not the file that config.json describes"):
        load(system_steps(str(tmp_path / "mini" / "mini.json")))


def test_a_system_draws_as_its_config_says(known, published, tmp_path):
    """Its own temperatures are the default of every command; what is asked for comes first."""
    index = published[1].path
    found = store.get_json(index)
    store.put_json(index, {**found, "config": {**found["config"], "samples": {"temperature_coarse": 0.3, "guidance": 2.0}}})
    drawn = audiolm.load("mini", "cpu").sampling
    assert [drawn[stage].temperature for stage in ("semantic", "coarse", "fine")] == [0.6, 0.3, 0.6]
    assert [drawn[stage].guidance for stage in ("semantic", "coarse", "fine")] == [1.0, 2.0, 2.0]
    args = generate.parser().parse_args(["--out", "x", "--temperature", "semantic=0.9"])
    assert dict(generate.sampling_params(args, index)) == {**drawn, "semantic": SamplingParams(0.9)}
    store.put_json(index, found)
