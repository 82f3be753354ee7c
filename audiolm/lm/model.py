"""Build, export and load of a stage: safetensors and JSON, loadable with torch and numpy alone; no pickle.

`{path}/export/model.safetensors` holds the float32 weights by parameter name, `{path}/export/config.json` the layout
and the shape: {"kind": "lm", "format": FORMAT, "stage": Stage, "model": TransformerSizes}.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from safetensors.torch import load_file

from audiolm import store
from audiolm.config import lm
from audiolm.lm.stages import Stage, stage_from_json
from audiolm.models.transformer import Transformer, TransformerSizes

FORMAT = 3  # 1 had one head over all ids, 2 buckets of distances up to the longest row


def build_lm(stage: Stage, shape: lm.StageConfig) -> Transformer:
    """The untrained model of a stage; draws its weights from torch's current generator."""
    model = Transformer(TransformerSizes(**_arguments(stage, shape)))
    model.checkpointing = shape.checkpointing
    return model


def _arguments(stage: Stage, shape: lm.StageConfig) -> dict[str, Any]:
    return {"vocab": stage.vocab_size, "slots": [len(ids) for ids in stage.slot_ids()],
            **shape.model_dump(include={"dim", "layers", "heads", "ff", "dropout", "positions", "gated", "norm", "activation"})}


def export_lm(module: Transformer, stage: Stage, shape: lm.StageConfig) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(float32 weights on the CPU by name, JSON config) of a stage."""
    weights = {name: t.detach().to("cpu", torch.float32, copy=True).contiguous()
               for name, t in module.state_dict().items()}
    return weights, {"kind": "lm", "format": FORMAT, "stage": stage.to_json(), "model": _arguments(stage, shape)}


def load_lm(path: str, device: str | torch.device = "cpu") -> tuple[Transformer, Stage]:
    """(model in eval mode, its Stage) from a training step's output folder.

    Raises FileNotFoundError where there is no export, ValueError where it is not a language model of this format.
    """
    about = store.get_json(store.join(path, "export", "config.json"))
    if about is None:
        raise FileNotFoundError(f"no export/config.json under {path}: is its training step done?")
    if about.get("kind") != "lm":
        raise ValueError(f"{path} holds a {about.get('kind')!r} export, expected 'lm': pass an lm_* step's output")
    if about.get("format", 1) != FORMAT:
        raise ValueError(f"{path} holds a language model of format {about.get('format', 1)}, this code reads {FORMAT}: train "
                         "the stage again with this code, or use the code that made it")
    model = Transformer(TransformerSizes(**about["model"]))
    with tempfile.TemporaryDirectory() as folder:
        weights = load_file(store.local_copy(store.join(path, "export", "model.safetensors"), folder))
        model.load_state_dict(weights)
    return model.to(device).eval().requires_grad_(False), stage_from_json(about["stage"])
