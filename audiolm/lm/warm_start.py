"""Warm start of stage 1 from a text language model of the same shape (TWIST, 2305.13009).

It takes the model's blocks and closing norm; embeddings and head stay new.  A model is a folder or URI with config.json and
one model.safetensors in transformers' format, of model_type llama: our block with gated: true, activation: silu, norm: rms
and rotary positions.  Keys and values that several heads share are copied to each.
"""

from __future__ import annotations

from typing import Any

import torch

from audiolm.config import lm
from audiolm.models.lm.block import EPS
from audiolm.models.lm.transformer import Transformer
from audiolm.models.positions import ROTARY_BASE
from audiolm.tokenizers import hf

URI_FIELD = hf.TEXT_MODEL.field


def start_from(model: Transformer, shape: lm.StageConfig, want: hf.PretrainedModel) -> None:
    """Copies the text model's body into `model`. Raises ValueError that names what differs where it does not fit."""
    data = hf.read_model(hf.TEXT_MODEL, want.uri, want.digest)
    about = data.json["config.json"]
    if wrong := _differences(about, shape):
        raise ValueError(f"{URI_FIELD}: {want.uri} is no model of this stage's shape: {'; '.join(wrong)}")
    # transformers' names to ours; q, k and v are one matrix here, gate and up another
    theirs = {name.removeprefix("model."): t.float() for name, t in data.weights.items()}
    shared = shape.heads // about.get("num_key_value_heads", shape.heads)
    try:
        body = {"norm.weight": theirs["norm.weight"]}
        for n in range(shape.layers):
            own, layer = f"blocks.{n}.", f"layers.{n}."
            q, k, v = (theirs[f"{layer}self_attn.{x}_proj.weight"] for x in "qkv")
            k, v = (x.unflatten(0, (-1, shape.dim // shape.heads)).repeat_interleave(shared, 0).flatten(0, 1) for x in (k, v))
            body |= {own + "qkv.weight": torch.cat([q, k, v]), own + "out.weight": theirs[layer + "self_attn.o_proj.weight"],
                     own + "up.weight": torch.cat([theirs[f"{layer}mlp.{x}_proj.weight"] for x in ("gate", "up")]),
                     own + "down.weight": theirs[layer + "mlp.down_proj.weight"],
                     own + "norm1.weight": theirs[layer + "input_layernorm.weight"],
                     own + "norm2.weight": theirs[layer + "post_attention_layernorm.weight"]}
        missing = model.load_state_dict(body, strict=False).missing_keys
    except (KeyError, RuntimeError) as e:
        raise ValueError(f"{URI_FIELD}: model.safetensors at {want.uri} does not fit its config.json: {e}; save the model "
                         "again with save_pretrained(folder)") from e
    assert set(missing) == {"embed.weight", "head.weight"}, missing


def _differences(about: dict[str, Any], shape: lm.StageConfig) -> list[str]:
    """Settings in which the two bodies differ as functions, each with the value to set."""
    rope = about.get("rope_parameters") or about.get("rope_scaling") or {}
    # `ours`: fields that a config may set to fit the model; `fixed`: properties that our code has once and for all
    ours = {"dim": about.get("hidden_size"), "layers": about.get("num_hidden_layers"),
            "heads": about.get("num_attention_heads"), "ff": about.get("intermediate_size"), "gated": True,
            "activation": "silu", "norm": "rms", "positions": "rotary"}
    fixed = {"model_type": (about.get("model_type"), "llama"), "hidden_act": (about.get("hidden_act", "silu"), "silu"),
             "rms_norm_eps": (about.get("rms_norm_eps", 1e-6), EPS),
             "rope_theta": (rope.get("rope_theta", about.get("rope_theta", ROTARY_BASE)), ROTARY_BASE),
             "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
             "attention_bias": (about.get("attention_bias", False), False), "mlp_bias": (about.get("mlp_bias", False), False),
             "head_dim": (about.get("head_dim") or shape.dim // shape.heads, shape.dim // shape.heads)}
    return [*(f"{name} is {got!r}, only {need!r} can be used" for name, (got, need) in fixed.items() if got != need),
            *(f"lm.semantic.{name} is {getattr(shape, name)!r}: set it to {need!r}" for name, need in ours.items()
              if getattr(shape, name) != need)]
