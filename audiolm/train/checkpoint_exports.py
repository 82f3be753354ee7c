"""Exports of a training's checkpoints, for codecs and masked models, whose checkpoints hold the training's state alone.

The folder looks like a finished step's outputs: export/, and final.json with the checkpoint's step and validation.  The
sizes come from the build's recipe, so a training that still runs can be exported too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from audiolm import store
from audiolm.config.codec import CodecConfig
from audiolm.config.semantic import MaskedModelConfig
from audiolm.models.conformer import Encoder
from audiolm.tokenizers.artifact import CONFIG, ArtifactError, write_export
from audiolm.train import checkpoint
from audiolm.train.engine import Saved, load_weights
from audiolm.train.objectives.base import Context
from audiolm.train.objectives.codec import CodecObjective
from audiolm.train.objectives.masked_inputs import encoder_sizes, export_encoder
from audiolm.train.objectives.spectral import SpectralObjective

Export = tuple[dict[str, torch.Tensor], dict[str, Any]]


def export_checkpoint(kind: str, build: str, commit: Mapping[str, Any], folder: str) -> str:
    """Writes the export of a codec's or masked_model's (`kind`) checkpoint to `folder`, once; returns it.

    Raises ArtifactError for a damaged checkpoint, and where the build has no recipe.
    """
    if store.exists(store.join(folder, "export", CONFIG)):  # it is written last
        return folder
    root = build.rsplit("/", 1)[0]
    recipe = store.get_json(store.join(root, "recipe.json"))
    if recipe is None:
        raise ArtifactError(f"{root}/recipe.json is missing, which says the sizes of the {kind}: give a build of this store")
    make = {"codec": codec_of, "masked_model": encoder_of}[kind]
    exported = make(recipe["config"], lambda name: checkpoint.load(build, commit, name))
    store.put_json(store.join(folder, "final.json"), {
        "exported_step": commit["step"], **{f"val.{k}": v for k, v in commit["validation"].items() if k != "step"}})
    write_export(folder, *exported)
    return folder


def codec_of(config: Mapping[str, Any], load: Callable[[str], Saved]) -> Export:
    """The codec with the averaged weights and the checkpoint's codebooks. `load`: a module's saved state by its name."""
    settings = CodecConfig.model_validate({k: v for k, v in config["codec"].items() if k != "start"})
    kind = SpectralObjective if settings.family == "spectral" else CodecObjective
    objective = kind(settings, None, None, Context(0, 1, torch.device("cpu"), 0))  # it neither trains nor validates
    load_weights(objective.generator, load("generator"))
    return objective.export()


def encoder_of(config: Mapping[str, Any], load: Callable[[str], Saved]) -> Export:
    """The masked model's encoder, without the heads that its objective trains with."""
    sizes = MaskedModelConfig.model_validate({k: v for k, v in config["model"].items() if k != "start"})
    encoder = Encoder(encoder_sizes(sizes))
    encoder.load_state_dict(encoder_weights(load("model")))
    return export_encoder(encoder, sizes.objective, {})


def encoder_weights(state: Saved) -> dict[str, torch.Tensor]:
    """The encoder's weights by name, of a masked model's saved state."""
    return {name.partition("/encoder.")[2]: value for name, value in state.items()
            if name.startswith(("param/encoder.", "buffer/encoder."))}
