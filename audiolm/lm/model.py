"""Build, export and load of a stage: safetensors and JSON, loadable with torch and numpy alone; no pickle.

`{path}/export/model.safetensors` holds the float32 weights by parameter name, `{path}/export/config.json` the layout
and the shape: {"kind": "lm", "format": FORMAT, "stage": Stage, "model": TransformerSizes, or FrameSizes where positions
are frames}.  The parallel decoder, which replaces the acoustic stages, has kind "parallel" and ParallelSizes.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import load_file

from audiolm import store
from audiolm.config import lm
from audiolm.lm.layouts import stage_from_json
from audiolm.lm.run_lengths import MAX_RUN
from audiolm.lm.stages import Stage
from audiolm.models.lm.block import TransformerSizes
from audiolm.models.lm.depth import DepthSizes
from audiolm.models.lm.frame_transformer import FrameSizes, FrameTransformer
from audiolm.models.lm.parallel_decoder import ParallelDecoder, ParallelSizes
from audiolm.models.lm.tied import TiedCodes, place_ids
from audiolm.models.lm.transformer import Transformer

Model = Transformer | FrameTransformer | ParallelDecoder
FORMAT = 4  # 1 had one head over all ids, 2 no conditions, and T5 buckets up to the longest row, 3 a Transformer over levels
KINDS = ("lm", "parallel")


def build_lm(stage: Stage, shape: lm.StageConfig, codes_QVE: torch.Tensor | None = None,
             centroid_KC: torch.Tensor | None = None) -> Model:
    """The untrained model of a stage; draws its weights from torch's current generator.

    `codes_QVE`: the codec's code vectors (tokenizers.base.code_vectors), which an acoustic stage's tables are tied to;
    `centroid_KC`: of the clusters of semantic ids, where their embeddings begin there.
    """
    width = 0 if codes_QVE is None else codes_QVE.shape[2]
    sizes = _arguments(stage, shape, width)
    if stage.frames:
        model = _model("lm", {"backbone": {**sizes, "slots": []}, "depth": _depth_arguments(stage, shape, width)})
    else:
        model = _model("lm", sizes)
    for part in model.modules():
        if isinstance(part, Transformer):
            part.checkpointing = shape.checkpointing
        if isinstance(part, TiedCodes):
            part.set_codes(codes_QVE[:len(stage.columns)])
    if centroid_KC is not None:
        place_ids((model.backbone if stage.frames else model).embed, centroid_KC)
    return model


def _model(kind: str, sizes: dict[str, Any]) -> Model:
    """The untrained model of an export's `model`."""
    if kind == "parallel":
        return ParallelDecoder(ParallelSizes(**sizes))
    if "depth" in sizes:
        return FrameTransformer(FrameSizes(TransformerSizes(**sizes["backbone"]), DepthSizes(**sizes["depth"])))
    return Transformer(TransformerSizes(**sizes))


def _arguments(stage: Stage, shape: lm.StageConfig, code_width: int) -> dict[str, Any]:
    tied = [len(stage.columns), stage.vocab, code_width, stage.offset] if code_width else None
    return {"tied": tied, "vocab": stage.vocab_size, "slots": [len(ids) for ids in stage.slot_ids()],
            "no_cond": stage.no_cond, "run": MAX_RUN if stage.lengths else 0,
            **shape.model_dump(include={"dim", "layers", "heads", "ff", "dropout", "positions", "gated", "norm", "activation"})}


def _depth_arguments(stage: Stage, shape: lm.StageConfig, code_width: int) -> dict[str, Any]:
    return {"read": shape.dim, "slots": stage.slots, "vocab": stage.vocab, "code_width": code_width, "dropout": shape.dropout,
            **shape.depth_sizes.model_dump()}


def build_parallel(stage: Stage, shape: lm.ParallelConfig, codes_QVE: torch.Tensor | None = None,
                   centroid_KC: torch.Tensor | None = None) -> ParallelDecoder:
    """`build_lm` of the parallel decoder."""
    model = ParallelDecoder(ParallelSizes(
        stage.k, stage.vocab, stage.slots, code_width=0 if codes_QVE is None else codes_QVE.shape[2],
        **shape.model_dump(include={"dim", "layers", "heads", "ff", "conv_kernel", "dropout"})))
    if codes_QVE is not None:
        model.tied.set_codes(codes_QVE)
    if centroid_KC is not None:
        place_ids(model.embed, centroid_KC)
    return model


def export_lm(module: Model, stage: Stage) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(float32 weights on the CPU by name, JSON config) of a stage."""
    weights = {name: t.detach().to("cpu", torch.float32, copy=True).contiguous()
               for name, t in module.state_dict().items()}
    kind = KINDS[isinstance(module, ParallelDecoder)]
    return weights, {"kind": kind, "format": FORMAT, "stage": stage.to_json(), "model": asdict(module.sizes)}


def load_lm(path: str, device: str | torch.device = "cpu") -> tuple[Model, Stage]:
    """(model in eval mode, its Stage) from a training step's output folder.

    Raises FileNotFoundError where there is no export, ValueError where it is not a language model of this format.
    """
    about = store.get_json(store.join(path, "export", "config.json"))
    if about is None:
        raise FileNotFoundError(f"no export/config.json under {path}: is its training step done?")
    if about.get("kind") not in KINDS:
        raise ValueError(f"{path} holds a {about.get('kind')!r} export, expected one of {', '.join(KINDS)}: pass an lm_* "
                         "step's output")
    if about.get("format", 1) != FORMAT:
        raise ValueError(f"{path} holds a language model of format {about.get('format', 1)}, this code reads {FORMAT}: train "
                         "the stage again with this code, or use the code that made it")
    model = _model(about["kind"], about["model"])
    with tempfile.TemporaryDirectory() as folder:
        weights = load_file(store.local_copy(store.join(path, "export", "model.safetensors"), folder))
        model.load_state_dict(weights)
    model.fold_tied()
    return model.to(device).eval().requires_grad_(False), stage_from_json(about["stage"])
