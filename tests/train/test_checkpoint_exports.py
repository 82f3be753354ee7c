"""Exports of checkpoints: the weights that the training itself would export, from its saved state and its recipe alone."""

from __future__ import annotations

import json

import pytest
import torch

from audiolm import store
from audiolm.config.base import identity
from audiolm.tokenizers.acoustic import load_codec
from audiolm.tokenizers.artifact import ArtifactError
from audiolm.tokenizers.semantic import load_extractor
from audiolm.train.checkpoint_exports import export_checkpoint
from tests.worlds.tiny_codec import SPECTRAL, run, tiny_codec, training
from tests.worlds.tiny_run import MASKED, saved_build, untrained_masked


@pytest.mark.parametrize("family", ["soundstream", "spectral"])
def test_a_codecs_export_is_the_trainings_own_to_the_last_bit(family, tmp_path):
    codec = tiny_codec(**(SPECTRAL if family == "spectral" else {}))
    objective, engines = training(codec)
    run(objective, engines, 0, 2)  # the average leaves the weights behind
    build, commit = saved_build(str(tmp_path), "codec", {"codec": identity(codec)},
                                {name: engine.state() for name, engine in engines.items()}, 2, {"mel": 0.5})
    folder = export_checkpoint("codec", build, commit, str(tmp_path / "made"))
    weights, about = objective.export()
    made = load_codec(folder).model.state_dict()
    assert made.keys() == weights.keys() and all(torch.equal(made[name], weights[name]) for name in weights)
    assert json.loads(json.dumps(about)).items() <= store.get_json(f"{folder}/export/config.json").items()
    assert store.get_json(f"{folder}/final.json") == {"exported_step": 2, "val.mel": 0.5}
    store.put(f"{build}/checkpoints/{commit['folder']}/generator.safetensors", b"cut")
    assert export_checkpoint("codec", build, commit, folder) == folder  # it is there
    with pytest.raises(ArtifactError, match="generator.safetensors is damaged"):
        export_checkpoint("codec", build, commit, str(tmp_path / "again"))


def test_a_masked_models_export_is_its_encoder(tmp_path):
    model, state = untrained_masked()
    build, commit = saved_build(str(tmp_path), "masked_model_2", {"model": identity(MASKED)}, {"model": state}, 5, {"loss": 2})
    folder = export_checkpoint("masked_model", build, commit, str(tmp_path / "made"))
    made = load_extractor(folder).state()
    assert all(torch.equal(made[name], value) for name, value in model.encoder.state_dict().items())
    store.remove(f"{tmp_path}/masked_model_2/abcdef/recipe.json")
    with pytest.raises(ArtifactError, match="recipe.json is missing, which says the sizes of the masked_model"):
        export_checkpoint("masked_model", build, commit, str(tmp_path / "again"))
