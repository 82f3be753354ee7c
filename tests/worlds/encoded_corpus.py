"""From audio to tokens, with real tokenizers and stages that have not been trained.

Fixtures: `world` (audio, manifest, two tokenizers as the folders of their steps) and `encoded` (facts of both token
steps, whose stores lie in the world).  tests/conftest.py makes them known to every room.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch

from audiolm import rng, store
from audiolm.config.corpus import CorpusConfig
from audiolm.config.lm import LMConfig, StageConfig
from audiolm.config.run import ClusterConfig
from audiolm.config.tokens import TokensConfig
from audiolm.config.training import TrainConfig
from audiolm.data.audio_check import file_hash
from audiolm.data.clips import Clip, Part, clips_parquet
from audiolm.models.conformer import Encoder, EncoderSizes
from audiolm.models.soundstream import SoundStream, SoundStreamSizes
from audiolm.tokenizers import encode
from audiolm.tokenizers.extractor import ConformerExtractor, Window
from audiolm.tokenizers.semantic import save_semantic
from tests.worlds.basics import RecordingOut
from tests.worlds.layouts import PAPER

RATE, K, N_Q, VOCAB = 16_000, 8, 3, 16
SECONDS = {"train": (1.3, 0.9, 1.04, 1.1), "dev": (0.8, 1.2), "test": (1.5, 1.21, 0.6)}
SIZES = {"strides": (2, 4, 5, 8), "enc_channels": 2, "dec_channels": 2, "dim": 8, "n_q": N_Q, "vocab": VOCAB}
SHAPE = StageConfig(crop_s=1.0, dim=16, layers=1, heads=2, ff=32, train=TrainConfig(steps=1, batch=2, lr=1e-3))
STAGES = LMConfig(**PAPER, coarse_levels=2, semantic=SHAPE, coarse=SHAPE, fine=SHAPE)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Audio, manifest and two untrained tokenizers as the steps' folders."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    clips = []
    for shard, (split, lengths) in enumerate(SECONDS.items()):
        for row, seconds in enumerate(lengths):
            t, draw = np.arange(int(seconds * RATE)) / RATE, rng.generator(0, split, row)
            wav = sum(0.1 * np.sin(2 * np.pi * f * t * (1 + 0.3 * t)) for f in draw.uniform(100, 3000, 5))
            wav = (wav + 0.02 * draw.standard_normal(len(t))).astype(np.float32)
            name = f"{split}-{row}"
            (root / "audio").mkdir(exist_ok=True)
            soundfile.write(root / "audio" / f"{name}.wav", wav, RATE)
            part = Part(name, f"{name}.wav", 0, len(wav), 0, None, hash=file_hash(str(root / "audio" / f"{name}.wav")))
            clips.append(Clip(f"a/{name}", "a", "a", name, split, RATE, len(wav), (part,), shard, row))
    store.put(str(root / "manifest" / "clips.parquet"), clips_parquet(clips))
    encoder = Encoder(EncoderSizes(dim=8, layers=1, heads=2, ff=16, conv_kernel=3, dropout=0.0))
    frames = torch.randn(4000, 8)
    save_semantic(str(root / "kmeans"), ConformerExtractor(encoder), 1, frames.mean(0), frames.std(0), torch.randn(K, 8),
                  Window(400, 50), {})
    codec = SoundStream(SoundStreamSizes(SIZES["strides"], 2, 2, 8, N_Q, VOCAB), norm=False)
    codec.quantizer.load_state_dict({k: torch.randn_like(v) * 0.3 if v.is_floating_point() else v
                                     for k, v in codec.quantizer.state_dict().items()})
    weights = {k: v.contiguous() for k, v in codec.state_dict().items()}
    store.put(str(root / "codec" / "export" / "model.safetensors"), safetensors.torch.save(weights))
    about = {"kind": "soundstream", "sample_rate": RATE, "quantizer": "ema", "code_dim": 8, **SIZES}
    store.put_json(str(root / "codec" / "export" / "config.json"), about)
    source = {"kind": "folder", "name": "a", "root": str(root / "audio")}
    return SimpleNamespace(root=root, clips=clips, corpus=CorpusConfig(name="t", sources=[source]))


def run_encode(world, which, out, batch_s=4.0, speeds=()):
    inputs = {n: SimpleNamespace(path=str(world.root / n), build=f"{n}.0001") for n in ("manifest", "kmeans", "codec")}
    config = {"which": which, "tokens": TokensConfig(batch_s=batch_s, speeds=speeds), "corpus": world.corpus, "seed": 0,
              "cluster": ClusterConfig(device="cpu")}
    return encode.encode_tokens(config, inputs, out)


@pytest.fixture(scope="module")
def encoded(world):
    facts = {w: run_encode(world, w, RecordingOut(world.root / f"{w}_tokens")) for w in ("semantic", "acoustic")}
    store.put_json(str(world.root / "done.json"), {"facts": facts["semantic"]})
    return facts
