"""Voices on disk, a random tokenizer fitted on them, its residual levels and a vocoder, all of the smallest width."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import soundfile
import torch
from safetensors.torch import save

from audiolm import store
from audiolm.config import semantic as cv
from audiolm.config.corpus import ClipFilter, CorpusConfig
from audiolm.config.run import ClusterConfig
from audiolm.config.training import TrainConfig
from audiolm.data.clips import Clip, Part, clips_parquet
from audiolm.models import kmeans
from audiolm.models.conformer import Encoder, EncoderSizes
from audiolm.tokenizers import residual
from audiolm.tokenizers.extractor import ConformerExtractor, Window
from audiolm.tokenizers.kmeans_fit import encode_frames
from audiolm.tokenizers.semantic import save_semantic
from audiolm.train import gan
from tests.worlds.tiny_codec import voice

RATE, K, DIM, LAYER = 16_000, 12, 16, 2
WINDOW = Window(400, 50)


def corpus(folder) -> SimpleNamespace:
    """Six voices to train on, two a shard, and two others to validate: `config`, `manifest`, `clips`, `wavs`."""
    clips, wavs = [], []
    for i in range(8):
        wav = voice(RATE * 2 + 3700 * i, i).numpy()
        soundfile.write(f"{folder}/{i}.wav", wav, RATE, subtype="FLOAT")
        part = Part(id=str(i), uri=f"{i}.wav", start=0, frames=len(wav), offset=0, text="")
        clips.append(Clip(id=str(i), origin="s", source="s", speaker=str(i), split="train" if i < 6 else "dev",
                          sample_rate=RATE, frames=len(wav), parts=(part,), shard=i // 2, row=i % 2))
        wavs.append(wav)
    return SimpleNamespace(config=CorpusConfig(name="t", sources=({"kind": "folder", "name": "s", "root": str(folder)},)),
                           manifest=write_manifest(f"{folder}/manifest", clips), clips=clips, wavs=wavs)


def write_manifest(folder: str, clips: list[Clip]) -> str:
    """A manifest's folder, without its step."""
    store.put(f"{folder}/clips.parquet", clips_parquet(clips))
    return folder


def few_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four held-out pieces, as PESQ is slow."""
    pieces = gan.held_out_crops
    monkeypatch.setattr(gan, "held_out_crops", lambda *args: pieces(*args)[::4])


def built_tokenizer(folder: str, wavs: list, seed: int = 0) -> str:
    """A kmeans build: an encoder with random weights, z-score and centroids of its features of the voices."""
    torch.manual_seed(seed)
    encoder = Encoder(EncoderSizes(dim=DIM, layers=LAYER, heads=2, ff=24))
    with torch.no_grad():
        encoder.statistics.mean.fill_(-6.0)
        encoder.statistics.std.fill_(3.0)
    extractor = ConformerExtractor(encoder)
    x_ND, = encode_frames(extractor, [LAYER], wavs, WINDOW)
    std_D, mean_D = torch.std_mean(x_ND, 0)
    fit = kmeans.fit([(x_ND - mean_D) / std_D], K, seed)
    save_semantic(folder, extractor, LAYER, mean_D, std_D, fit.centroids, WINDOW, {})
    return folder


def run_residual(corpus: SimpleNamespace, kmeans_path: str, out, manifest: str | None = None, **settings) -> dict:
    config = {"residual": cv.ResidualConfig(**{"levels": 4, "iterations": 15, **settings}), "where": ClipFilter(),
              "corpus": corpus.config, "seed": 3, "cluster": ClusterConfig(device="cpu")}
    paths = {"manifest": manifest or corpus.manifest, "kmeans": kmeans_path}
    inputs = {name: SimpleNamespace(path=path) for name, path in paths.items()}
    return residual.fit_residual(config, inputs, out)


def tiny_vocoder(levels: int = 3, start_step: int = 1000, steps: int = 60, **changes) -> cv.VocoderConfig:
    train = {"steps": steps, "batch": 4, "lr": 3e-3, "betas": (0.8, 0.99), "clip": 10.0, "engine": "torch", "eval_every": 1000}
    return cv.VocoderConfig(levels=levels, dim=16, layers=2, channels=2, heard_s=1.2, crop_s=0.2, ema=0.9,
                      disc=cv.VocoderDiscriminatorsConfig(periods=(2,), windows=(256,), channels=2, start_step=start_step),
                      train=TrainConfig(**{**train, **changes}))


def write_export(objective, folder: str) -> str:
    """Writes an objective's export as the loop does."""
    weights, config = objective.export()
    store.put(f"{folder}/export/model.safetensors", save({n: w.contiguous() for n, w in weights.items()}))
    store.put_json(f"{folder}/export/config.json", config)
    return folder
