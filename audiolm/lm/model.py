"""A trained stage as safetensors + JSON (DESIGN 1.6), loadable with torch and numpy alone; no pickle.

`{path}/export/model.safetensors` holds the float32 weights by parameter name, `{path}/export/config.json` the layout
and the shape: {"kind": "lm", "stage": Stage, "model": Transformer's arguments}.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from safetensors.torch import load_file

from audiolm import config, store
from audiolm.lm.stages import Stage, stage_from_json
from audiolm.models.transformer import Transformer


def build_lm(stage: Stage, shape: config.Stage) -> Transformer:
    """The untrained model of a stage; draws its weights from torch's current generator."""
    return Transformer(stage.vocab_size, shape.dim, shape.layers, shape.heads, shape.ff, shape.dropout)


def export_lm(module: Transformer, stage: Stage, shape: config.Stage) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(float32 weights on the CPU by name, JSON config) of a stage."""
    weights = {name: t.detach().to("cpu", torch.float32, copy=True).contiguous()
               for name, t in module.state_dict().items()}
    model = {"vocab": stage.vocab_size, "dim": shape.dim, "layers": shape.layers, "heads": shape.heads,
             "ff": shape.ff, "dropout": shape.dropout}
    return weights, {"kind": "lm", "stage": stage.to_json(), "model": model}


def load_lm(path: str, device: str | torch.device = "cpu") -> tuple[Transformer, Stage]:
    """(model in eval mode, its Stage) from a training step's output folder.

    Raises FileNotFoundError where there is no export, ValueError where it is not a language model.
    """
    about = store.get_json(store.join(path, "export", "config.json"))
    if about is None:
        raise FileNotFoundError(f"no export/config.json under {path}: is its training step done?")
    if about.get("kind") != "lm":
        raise ValueError(f"{path} holds a {about.get('kind')!r} export, expected 'lm': pass an lm_* step's output")
    model = Transformer(**about["model"])
    with tempfile.TemporaryDirectory() as folder:
        weights = load_file(store.local_copy(store.join(path, "export", "model.safetensors"), folder))
        model.load_state_dict(weights)
    return model.to(device).eval().requires_grad_(False), stage_from_json(about["stage"])
