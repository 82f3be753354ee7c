"""A tiny real codec on synthetic voices.

`training`, `run` and `saved_state` train it step by step; `built_codec` leaves an untrained build as the step's folder.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import safetensors.torch
import torch

from audiolm import rng, store
from audiolm.config.codec import CodecConfig, CodecDiscriminatorsConfig
from audiolm.config.training import TrainConfig
from audiolm.models.soundstream import SoundStream, SoundStreamSizes
from audiolm.models.spectral.codec import SpectralCodec, SpectralSizes
from audiolm.tokenizers.acoustic import AcousticTokenizer
from audiolm.train.engine import learning_rate, make_engine
from audiolm.train.objectives.base import Context
from audiolm.train.objectives.codec import CodecObjective
from audiolm.train.objectives.spectral import SpectralObjective

SPECTRAL = {"family": "spectral", "weights": {"reconstruction": 1, "commitment": 0.1},
            "spectral": {"n_mels": 20, "width": 16, "enc_layers": 1, "dec_layers": 1, "iterations": 4, "fsq": (8, 2)}}


def tiny_spectral(quantizer: str = "ema", n_q: int = 3, vocab: int = 16) -> SpectralCodec:
    """An untrained spectral codec whose statistics and codes come from voices; its networks are not at zero."""
    torch.manual_seed(0)
    model = SpectralCodec(SpectralSizes(n_q, vocab, n_mels=20, dim=12, width=16, enc_layers=1, dec_layers=1, iterations=8,
                                        quantizer=quantizer, fsq=(vocab // 2, 2)))
    for net in (model.encoder, model.decoder):
        torch.nn.init.normal_(net.last.weight, std=0.02)
    wav_BT = torch.stack([voice(64_000, i) for i in range(6)])
    x_MD = model.initialise(model.frames(wav_BT).flatten(0, 1))
    model.quantizer.initialise(x_MD, seed=0, reduce=lambda x: x)
    return model.eval().requires_grad_(False)


@functools.lru_cache(maxsize=32)
def voice(samples: int, index: int) -> torch.Tensor:
    """Harmonics of a gliding pitch under a syllable-like envelope, as loud as speech."""
    draw, t = rng.generator(0, "voice", index), torch.arange(samples) / 16_000
    pitch = draw.uniform(90, 220) * (1 + 0.2 * torch.sin(2 * math.pi * draw.uniform(0.5, 2) * t))
    phase = 2 * math.pi * torch.cumsum(pitch, 0) / 16_000
    tone = sum(torch.sin(k * phase) / k for k in range(1, 12))
    return (0.15 * tone * (0.55 + 0.45 * torch.sin(2 * math.pi * 4 * t + draw.uniform(0, 6)))).float()


class Voices:
    """Stands in for the corpus: row r of step s is a piece of one of a few voices."""

    crop = 3200

    def batch(self, step, rows):
        wavs = []
        for row in rows:
            draw = rng.generator(1, "piece", step, row)
            start = int(draw.integers(16_000))
            wavs.append(voice(32_000, int(draw.integers(6)))[start:start + self.crop])
        return torch.stack(wavs), torch.full((len(rows),), self.crop)


def tiny_codec(start_step: int = 1000, steps: int = 40, engine: str = "torch", zero: int = 0, **changes) -> CodecConfig:
    """DAC's losses with their weights, unless the changes say otherwise."""
    changes = {"losses": "dac", "weights": {"reconstruction": 15, "feature": 2}, "code_decay": 0.9, **changes}
    return CodecConfig(
        enc_channels=4, dec_channels=4, dim=16, n_q=3, vocab=16, crop_s=0.2, code_dim=4,
        disc=CodecDiscriminatorsConfig(periods=(2,), windows=(256,), channels=2, start_step=start_step),
        train=TrainConfig(steps=steps, batch=4, lr=3e-3, betas=(0.8, 0.99), weight_decay=0.01, clip=10.0,
                          engine=engine, zero=zero), **changes)


def training(codec: CodecConfig, saved: dict | None = None, updates: dict | None = None, rank: int = 0,
             world: int = 1, compile: bool = False,
             start: dict | None = None) -> tuple[CodecObjective | SpectralObjective, dict]:
    """An objective and its engines, from the start or from what `saved_state` gave; `start`: an export's weights."""
    torch.manual_seed(0)
    ctx = Context(rank, world, torch.device("cpu"), 0, compile=compile)
    held_out_BT = torch.stack([voice(6400, i) for i in (6, 7, 8)])
    kind = SpectralObjective if codec.family == "spectral" else CodecObjective
    objective = kind(codec, Voices(), held_out_BT, ctx, start)
    return objective, {name: make_engine(m, codec.train, ctx, saved and saved[name], updates[name] if saved else 0)
                       for name, m in objective.modules.items()}


def saved_state(engines: dict) -> tuple[dict, dict]:
    """(states, updates) of the engines, as a checkpoint keeps them."""
    return {n: e.state() for n, e in engines.items()}, {n: e.updates for n, e in engines.items()}


def run(objective: CodecObjective, engines: dict, start: int, end: int, pieces: int = 1) -> list[dict]:
    """Metrics of steps start .. end - 1 over this rank's rows in `pieces` micro-batches."""
    results, ctx, train = [], objective.ctx, objective.codec.train
    each = train.batch // ctx.world
    for step in range(start, end):
        for engine in engines.values():
            engine.set_lr(learning_rate(train, step))
        rows = range(ctx.rank * each, (ctx.rank + 1) * each)
        size = each // pieces
        batches = [objective.load(step, rows[i:i + size]) for i in range(0, each, size)]
        results.append({k: float(v) for k, v in objective.train_step(engines, batches, step).items()})
    return results


def noise(*shape: int, index: int = 0) -> np.ndarray:
    return (0.1 * rng.generator(0, "test-codec-files", index).standard_normal(shape)).astype(np.float32)


def built_codec(folder: str, seed: int = 0) -> str:
    """A codec build of the smallest width; its codebooks lie where its latents do, so that every code can appear."""
    torch.manual_seed(seed)
    model = SoundStream(SoundStreamSizes((2, 4, 5, 8), 2, 2, 8, 3, 16), norm=False).eval().requires_grad_(False)
    x_BDT = model.latents(torch.from_numpy(noise(4, 32_000)))
    model.quantizer.initialise(x_BDT.transpose(1, 2).flatten(0, 1), seed=seed, reduce=lambda x: x)
    store.put(f"{folder}/export/model.safetensors", safetensors.torch.save(model.state_dict()))
    store.put_json(f"{folder}/export/config.json", {
        "kind": "soundstream", "sample_rate": 16_000, "strides": (2, 4, 5, 8), "enc_channels": 2, "dec_channels": 2, "dim": 8,
        "n_q": 3, "vocab": 16, "quantizer": "ema", "code_dim": 8})
    return folder


def whole_codes(codec: AcousticTokenizer, wav_T: np.ndarray) -> torch.Tensor:
    return codec.encode(torch.from_numpy(wav_T)[None], torch.tensor([len(wav_T)]))[0]
