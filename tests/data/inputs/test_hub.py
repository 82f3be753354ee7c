"""hf:// roots and models, read from a stand-in of the Hub."""

from __future__ import annotations

import pytest
import torch

from audiolm.config.base import ConfigError
from audiolm.config.corpus import CorpusConfig
from audiolm.config.start import StartConfig
from audiolm.data import sources
from audiolm.tokenizers import hf
from audiolm.tokenizers.artifact import ArtifactError, read_export, write_export
from audiolm.tokenizers.start import start_weights
from tests.data.inputs.hub import hub
from tests.data.inputs.test_packed import build, loose, same, sounds, tar  # noqa: F401
from tests.worlds.basics import free_port

constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def at_hub(monkeypatch):
    """Lets HfFileSystem, in this process and in those that decode, ask another Hub."""
    from huggingface_hub import HfFileSystem

    def ask(url: str) -> None:
        for name, value in {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        HfFileSystem.clear_instance_cache()

    yield ask
    HfFileSystem.clear_instance_cache()


@pytest.fixture
def repo(tmp_path, at_hub, sounds):  # noqa: F811
    """The folder of the dataset me/speech, with the sounds in c/."""
    for name, data in sounds.items():
        (tmp_path / "repo/c" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repo/c" / name).write_bytes(data)
    (tmp_path / "repo/c/extra.wma").write_bytes(b"x")
    with hub(tmp_path / "repo", "me/speech") as url:
        at_hub(url)
        yield tmp_path / "repo"


def test_a_folder_of_a_dataset_gives_the_manifest_of_the_files(tmp_path, repo, loose):  # noqa: F811
    found = build(tmp_path, {"kind": "folder", "root": "hf://datasets/me/speech/c", "speaker": "grandparent"})
    same(found, loose)
    assert found[4] == {"extra.wma": ("left out", ".wma is no type that is read")}


def test_tars_of_a_dataset(tmp_path, repo, sounds, loose):  # noqa: F811
    tar(repo / "t/a.tar", sounds)
    same(build(tmp_path, {"kind": "webdataset", "root": "hf://datasets/me/speech/t", "speaker": "grandparent"}), loose)


def survey(root: str) -> list[sources.Found]:
    return sources.survey(CorpusConfig(name="c", sources=[{"kind": "folder", "name": "x", "root": root}]).sources[0])[0]


def test_what_is_not_there_and_a_hub_out_of_reach(repo, at_hub):
    for root in ("hf://datasets/me/speech/nowhere", "hf://datasets/me/other"):
        with pytest.raises(ConfigError, match=f"root '{root}' does not exist"):
            survey(root)
    at_hub(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ConfigError, match="'hf://datasets/me/speech/c' cannot be reached .* the network"):
        survey("hf://datasets/me/speech/c")


def test_models_of_the_hub_are_those_of_a_folder(tmp_path, at_hub):
    """A pretrained encoder, and a trained build to start from, whole, in a revision's folder and missing."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "conv_dim": [8] * 7,
             "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    transformers = pytest.importorskip("transformers")
    transformers.HubertModel(transformers.HubertConfig(**sizes)).save_pretrained(tmp_path / "hubert")
    write_export(str(tmp_path / "hubert" / "trained"), {"a": torch.ones(2)}, {"family": "masked-conformer"})
    with hub(tmp_path / "hubert", "me/hubert", "models") as url:
        at_hub(url)
        there, here = (hf.read_model(hf.ENCODER, uri) for uri in ("hf://me/hubert", str(tmp_path / "hubert")))
        assert there.digest == here.digest == hf.imported_encoder("hf://me/hubert").digest
        assert there.safetensors == here.safetensors and there.json == here.json
        start = start_weights("semantic.model.start.uri", StartConfig(uri="hf://me/hubert/trained"), "masked_model")
        assert start.digest == read_export(str(tmp_path / "hubert" / "trained"))[2] == read_export(start.uri)[2]
        with pytest.raises(ArtifactError, match="semantic.pretrained.uri: hf://me/hubert/trained holds no config.json"):
            hf.imported_encoder("hf://me/hubert/trained")
        with pytest.raises(ArtifactError, match="semantic.pretrained.uri: hf://me/nothing holds no config.json"):
            hf.imported_encoder("hf://me/nothing")
