"""hf:// roots, read from a stand-in of the Hub: a folder of sounds, a table, tars and rows with sounds."""

from __future__ import annotations

import pytest

from audiolm.config.base import ConfigError
from audiolm.config.corpus import CorpusConfig
from audiolm.data import sources
from tests.data.inputs.hub import hub
from tests.data.inputs.test_packed import build, loose, same, sounds, tar  # noqa: F401
from tests.worlds.basics import free_port

constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def repo(tmp_path, monkeypatch, sounds):  # noqa: F811
    """The folder of the dataset me/speech, with the sounds in c/."""
    from huggingface_hub import HfFileSystem

    for name, data in sounds.items():
        (tmp_path / "repo/c" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repo/c" / name).write_bytes(data)
    (tmp_path / "repo/c/extra.wma").write_bytes(b"x")
    with hub(tmp_path / "repo", "me/speech") as url:
        for name, value in {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}.items():
            monkeypatch.setenv(name, value)  # of the process that decodes
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        HfFileSystem.clear_instance_cache()
        yield tmp_path / "repo"
    HfFileSystem.clear_instance_cache()


def test_a_folder_of_a_dataset_gives_the_manifest_of_the_files(tmp_path, repo, loose):  # noqa: F811
    found = build(tmp_path, {"kind": "folder", "root": "hf://datasets/me/speech/c", "speaker": "grandparent"})
    same(found, loose)
    assert found[4] == {"extra.wma": ("left out", ".wma is no type that is read")}


def test_tars_of_a_dataset(tmp_path, repo, sounds, loose):  # noqa: F811
    tar(repo / "t/a.tar", sounds)
    same(build(tmp_path, {"kind": "webdataset", "root": "hf://datasets/me/speech/t", "speaker": "grandparent"}), loose)


def survey(root: str) -> list[sources.Found]:
    return sources.survey(CorpusConfig(name="c", sources=[{"kind": "folder", "name": "x", "root": root}]).sources[0])[0]


def test_what_is_not_there_and_a_hub_out_of_reach(repo, monkeypatch):
    from huggingface_hub import HfFileSystem

    for root in ("hf://datasets/me/speech/nowhere", "hf://datasets/me/other"):
        with pytest.raises(ConfigError, match=f"root '{root}' does not exist"):
            survey(root)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    HfFileSystem.clear_instance_cache()
    with pytest.raises(ConfigError, match="'hf://datasets/me/speech/c' cannot be reached .* the network"):
        survey("hf://datasets/me/speech/c")
