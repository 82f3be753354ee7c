"""A whole system with random weights, as the folders of its steps: for generation, prompts and evaluation."""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import save

from audiolm import store
from audiolm.config import lm as lm_config
from audiolm.config import training
from audiolm.data import tokens
from audiolm.lm.layouts import build_stages
from audiolm.lm.model import build_lm, export_lm
from audiolm.lm.run_lengths import MAX_RUN
from audiolm.models.conformer import Encoder, EncoderSizes
from audiolm.models.soundstream import SoundStream, SoundStreamSizes
from audiolm.tokenizers.extractor import ConformerExtractor, Window
from audiolm.tokenizers.semantic import save_semantic
from tests.worlds.layouts import PAPER

K, VOCAB, Q, COARSE = 12, 16, 4, 2
TRAIN = training.TrainConfig(steps=1, batch=1, lr=1e-3)
CROPS_S = {"semantic": 4.0, "coarse": 2.0, "fine": 0.4}
RUN = 1.5


def build(folder: str, coarse: int = COARSE, dedupe: bool = True, kind: str = "flat", **layout) -> dict[str, str]:
    """A whole system's exports with random weights; returns the steps' paths. `kind`: of the coarse stage; `layout`: LMConfig's
    fields, else the paper's."""
    torch.manual_seed(0)
    paths = {name: store.join(folder, name) for name in ("kmeans", "codec", "lm_semantic", "lm_coarse", "lm_fine")}
    sizes = EncoderSizes(dim=16, layers=1, heads=2, ff=32)
    save_semantic(paths["kmeans"], ConformerExtractor(Encoder(sizes)), 1, torch.zeros(16), torch.ones(16), torch.randn(K, 16),
                  Window(400, 50), {})
    codec = SoundStream(SoundStreamSizes((2, 4, 5, 8), 2, 2, 8, Q, VOCAB), norm=False)
    torch.nn.init.normal_(codec.quantizer.codebook_QND, std=0.3)
    export(paths["codec"], codec.state_dict(), {
        "kind": "soundstream", "sample_rate": 16_000, "strides": [2, 4, 5, 8], "enc_channels": 2, "dec_channels": 2,
        "dim": 8, "n_q": Q, "vocab": VOCAB, "quantizer": "ema", "code_dim": 8})
    shapes = {name: lm_config.StageConfig(crop_s=crop_s, dim=16, layers=2, heads=2, ff=32, train=TRAIN)
              for name, crop_s in CROPS_S.items()}
    layout = {**PAPER, "coarse_levels": coarse, "dedupe": dedupe, **layout}
    if kind == "frame":
        depth = lm_config.DepthConfig(dim=8, layers=1, ff=16)
        shapes["coarse"] = shapes["coarse"].model_copy(update={"kind": kind, "depth": depth})
        layout |= {"conditioning": "aligned", "condition_dropout": 0.1}
    stages = build_stages(lm_config.LMConfig(**layout, **shapes), Q, VOCAB, K)
    for step, stage in stages.items():
        model = build_lm(stage, shapes[stage.name])
        torch.nn.init.normal_((model.depth if stage.frames else model).head.weight, std=0.5)
        if stage.lengths:  # about RUN frames an id, whatever it is
            model.lengths.mix.weight.data.zero_()
            model.lengths.given.weight.data.fill_(2.0)
            model.lengths.head.weight.data = -torch.arange(1.0, MAX_RUN + 1)[:, None].expand(-1, 16) / 30
        export(paths[step], *export_lm(model, stage))
    return {name: path for name, path in paths.items() if not name.startswith("lm_") or name in stages}


def token_store(folder: str, mean_run: float = RUN) -> str:
    """A finished semantic_tokens step: its facts, in the build's `folder`, and one shard of one clip."""
    path = store.join(folder, "semantic_tokens")
    meta = {"which": "semantic", "spec": {"name": "semantic", "sample_rate": 16_000, "hop": 640, "n_q": 1, "vocab": K},
            "hash": "h", "manifest": "m.0001", "shards": 1, "device": "cpu", "dtype": "float32", "versions": {}}
    store.put(store.join(path, tokens.shard_name(0)), tokens.shard_bytes(["c"], [np.zeros((9, 1), int)], meta, 0, dedup=True))
    tokens.index_shards(path)
    store.put_json(store.join(folder, "done.json"), {"facts": {"mean_run": mean_run}})
    return path


def export(path: str, weights: dict, about: dict) -> None:
    store.put(store.join(path, "export", "model.safetensors"), save(weights))
    store.put_json(store.join(path, "export", "config.json"), about)


def voice(seconds: float, seed: int = 0) -> np.ndarray:
    rng, t = np.random.default_rng(seed), np.arange(round(seconds * 16_000)) / 16_000
    return (0.2 * np.sin(700 * t * (1 + np.sin(3 * t))) + 0.1 * rng.standard_normal(len(t))).astype(np.float32)


PLAIN = {"may_end": False, "window_s": 2.0, "overlap_s": 1.2}
