"""Crops of audio: the same sound whatever the cache holds, bounded memory, only what a crop needs is read."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile as sf
import torch

from audiolm.config.corpus import CorpusConfig
from audiolm.config.run import ClusterConfig
from audiolm.data import clips as clips_data
from audiolm.data.clip_table import read_clip_table
from audiolm.data.crops import AudioCrops
from audiolm.data.manifest import build_manifest
from audiolm.data.sources import roots
from tests.worlds.basics import RecordingOut

CROP, BATCH = 4000, 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(clips, roots) of flac, opus and a rate to be resampled, 2 to 4 s each."""
    folder = tmp_path_factory.mktemp("crops")
    draw = np.random.default_rng(0)
    for i, (name, rate, form) in enumerate((("a.flac", 16_000, {}), ("b.flac", 22_050, {}), ("c.wav", 16_000, {}),
                                            ("d.opus", 16_000, {"format": "OGG", "subtype": "OPUS"}), ("e.flac", 16_000, {}))):
        sf.write(folder / name, 0.1 * draw.standard_normal(rate * (2 + i % 3)), rate, **form)
    source = {"kind": "folder", "name": "x", "root": str(folder), "split": "train"}
    config = {"corpus": CorpusConfig(name="x", sources=[source]), "seed": 0, "cluster": ClusterConfig(device="cpu")}
    out = RecordingOut(folder / "manifest")
    build_manifest(config, {}, out)
    return read_clip_table(out.path, "train"), roots(config["corpus"])


def batches(corpus, cache_mb: float, steps: int = 8) -> tuple[list[torch.Tensor], AudioCrops]:
    crops = AudioCrops(*corpus, CROP, BATCH, 3, cache_mb)
    return [crops.batch(step, range(BATCH))[0] for step in range(steps)], crops


def test_crops_do_not_depend_on_the_cache_and_are_slices_of_their_clips(corpus):
    clips, places = corpus
    cached, crops = batches(corpus, 64)
    for cache_mb in (0, 0.1, 0.3):
        assert all(torch.equal(a, b) for a, b in zip(cached, batches(corpus, cache_mb)[0], strict=True)), cache_mb
    for step, wav_BT in enumerate(cached):
        for row in range(BATCH):
            i, start = crops.order.row(step, row)
            whole_T = clips_data.read_clip(clips[i], places)
            assert np.array_equal(wav_BT[row, :len(whole_T) - start].numpy(), whole_T[start:start + CROP])
    parts = [AudioCrops(*corpus, CROP, BATCH, 3, 64).batch(5, range(i, i + 2))[0] for i in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), cached[5])


def test_the_cache_keeps_to_its_size(corpus):
    _, crops = batches(corpus, 0.3, steps=20)
    assert crops._held <= 0.3 * 2**20 and crops._held == sum(w.nbytes for w in crops._cache.values())


def test_of_a_corpus_that_does_not_fit_only_the_crops_are_read(corpus, monkeypatch):
    frames = []
    read = sf.SoundFile.read
    monkeypatch.setattr(sf.SoundFile, "read", lambda f, n=-1, *a, **k: frames.append((f.name, n)) or read(f, n, *a, **k))
    batches(corpus, 0.3, steps=20)
    lossless = [n for name, n in frames if name.endswith(("a.flac", "c.wav", "e.flac"))]
    assert lossless and max(lossless) == CROP
    assert any(n > CROP for name, n in frames if name.endswith("b.flac"))  # what is resampled is read whole
