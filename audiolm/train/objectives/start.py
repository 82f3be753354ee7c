"""Weights that a training starts from: reading them as planned, comparing sizes, loading them into a module.

Factories load before there are engines, alike on every rank.  A checkpoint of the build, where there is one, replaces
what was loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from audiolm.config.lm import ParallelConfig, StageConfig
from audiolm.lm.layouts import stage_from_json
from audiolm.lm.model import FORMAT, Model
from audiolm.lm.stages import Stage
from audiolm.models.conformer import LAYER_CONVENTION, Encoder
from audiolm.models.lm.parallel_decoder import ParallelDecoder
from audiolm.models.spectral.hearing import HearingDecoder
from audiolm.tokenizers.artifact import ArtifactError, read_export
from audiolm.tokenizers.start import StartWeights, require_same, require_unchanged
from audiolm.train.objectives.carry import carried, semantic_tables

ENCODER_FIELDS = ("dim", "layers", "heads", "ff", "conv_kernel")  # of semantic.model; no weight depends on dropout
STAGE_FIELDS = ("dim", "layers", "heads", "ff", "positions", "gated", "activation", "norm")  # of a StageConfig


def read_start(start: StartWeights) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(weights by name, config) of an export. Raises ArtifactError where it is not the planned one any more."""
    weights, about, digest = read_export(start.uri)
    require_unchanged(start, digest)
    return weights, about


@torch.no_grad()
def load_start(module: nn.Module, weights: Mapping[str, torch.Tensor], what: str) -> None:
    """Loads plain weights into a module whose layers may have weight norm, which exports have folded in.

    Raises ArtifactError, naming `what`, where names or shapes differ.
    """
    own = {_plain(name): value.shape for name, value in module.state_dict().items() if not name.endswith(".original0")}
    wrong = sorted(own.keys() ^ weights.keys()) or [name for name, shape in own.items() if weights[name].shape != shape]
    if wrong:
        raise ArtifactError(f"the weights to start from do not fit the {what}: {', '.join(wrong[:5])} differ"
                            f"{' and more' if len(wrong) > 5 else ''}")
    for name, value in weights.items():
        owner, _, leaf = name.rpartition(".")
        layer = module.get_submodule(owner)
        if parametrize.is_parametrized(layer, leaf):
            _set_normed(layer, leaf, value)
        else:
            getattr(layer, leaf).copy_(value)


def _plain(name: str) -> str:
    """The name of a weight under weight norm, whose direction, original1, has the weight's shape."""
    return name.replace("parametrizations.", "").removesuffix(".original1")


def _set_normed(layer: nn.Module, leaf: str, value: torch.Tensor) -> None:
    """Sets a weight under weight norm such that the layer computes with exactly this weight."""
    setattr(layer, leaf, value.clone())  # through the parametrization's right_inverse, which would keep the tensor itself
    norm = layer.parametrizations[leaf]
    # right_inverse takes the norms by another sum than the forward pass of dimensions 0 and -1: a last bit of some weights
    # would change, and with it a code. With the forward pass's own norms weight / norm * norm is the weight.
    if norm[0].dim in (0, value.ndim - 1):
        norm.original0.copy_(torch._weight_norm_interface(norm.original1, norm.original0, norm[0].dim)[1])


def start_encoder(encoder: Encoder, start: StartWeights) -> None:
    """Loads weights and input statistics into a masked model's encoder; what is above it stays new.

    Raises ValueError where the sizes differ.
    """
    weights, about = read_start(start)
    ours, theirs = encoder.sizes.to_json(), about["encoder"]
    require_same(start, {**{f"semantic.model.{name}": (ours[name], theirs.get(name)) for name in ENCODER_FIELDS},
                         "semantic.model.normalise": (encoder.sizes.normalise, theirs.get("normalise", "corpus")),
                         "semantic.model.spectrum": (encoder.sizes.spectrum, theirs.get("spectrum", "mel")),
                         "mel bands": (ours["n_mels"], theirs.get("n_mels")),
                         "layer convention": (LAYER_CONVENTION, about.get("layer_convention"))})
    prefix = "encoder."  # a tokenizer's export has z-scores and centroids beside it
    load_start(encoder, {n.removeprefix(prefix): value for n, value in weights.items() if n.startswith(prefix)}, "encoder")


def start_stage(model: Model, stage: Stage, shape: StageConfig, start: StartWeights, tokens: str | None = None) -> None:
    """Loads a trained stage's weights; the rows of semantic ids for the tokenizer of the store `tokens`.

    Raises ValueError where shape, vocabulary or layout differ.
    """
    weights, about = read_start(start)
    require_same(start, {"the export's format": (FORMAT, about.get("format", 1))})
    sizes, theirs, section = about["model"], stage_from_json(about["stage"]), f"lm.{stage.name}"
    require_same(start, {f"{section}.kind": (shape.kind, "frame" if theirs.frames else "flat")})
    settings = {}
    if stage.frames:
        depth, sizes = sizes["depth"], sizes["backbone"]
        settings = {f"{section}.depth.{name}": (value, depth[name]) for name, value in dict(shape.depth_sizes).items()}
    settings |= {f"{section}.{name}": (getattr(shape, name), sizes[name]) for name in STAGE_FIELDS}
    # Of the layout only what the stage's own ids depend on; the tokenizers' sizes as the token stores have them.
    if stage.needs_semantic:
        weights, k = carried(weights, semantic_tables(theirs), theirs.k, start, tokens)
        settings |= {"semantic.kmeans.k": (stage.k, k), "lm.dedupe": (stage.dedupe, theirs.dedupe)}
    if stage.needs_acoustic:
        settings |= {"codec.vocab": (stage.vocab, theirs.vocab), "lm.coarse_levels": (stage.n_coarse, theirs.n_coarse)}
    if stage.name == "fine":
        settings["codec.n_q"] = (stage.levels[1], theirs.levels[1])
    require_same(start, settings)
    load_start(model, weights, f"stage {stage.name}")


def start_decoder(decoder: HearingDecoder, start: StartWeights, tokens: str) -> None:
    """`start_stage` of a decoder, which may average over another time. Raises ValueError where other sizes differ."""
    weights, about = read_start(start)
    weights, k = carried(weights, ["unit_KU"], about["k"], start, tokens)
    ours = {name: value for name, value in vars(decoder.sizes).items() if name != "slow"}
    about |= {"k": k}
    fields = {"width": "lm.decoder.width", "layers": "lm.decoder.layers", "k": "semantic.kmeans.k", "latent": "codec.dim"}
    require_same(start, {fields.get(name, f"the decoder's {name}"): (value, about.get(name)) for name, value in ours.items()})
    load_start(decoder, weights, "decoder that hears")


def start_parallel(model: ParallelDecoder, shape: ParallelConfig, start: StartWeights, tokens: str) -> None:
    """`start_stage` of a parallel decoder. Raises ValueError where shape or vocabulary differ."""
    weights, about = read_start(start)
    require_same(start, {"the export's format": (FORMAT, about.get("format", 1))})
    theirs = about["model"]
    weights, k = carried(weights, ["embed.weight"], theirs["k"], start, tokens)
    settings = {f"lm.parallel.{name}": (getattr(shape, name), theirs[name]) for name in
                ("dim", "layers", "heads", "ff", "conv_kernel")}
    ours = model.sizes
    require_same(start, settings | {"semantic.kmeans.k": (ours.k, k), "codec.vocab": (ours.vocab, theirs["vocab"]),
                                    "codec.n_q": (ours.levels, theirs["levels"]),
                                    "the width of the codes that tables are tied to": (ours.code_width, theirs["code_width"])})
    load_start(model, weights, "parallel decoder")
