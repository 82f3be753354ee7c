"""The k-means step: the same export wherever the work runs, progress, a killed fit continued, broken features refused."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load, save

from audiolm import rng, store
from audiolm.config.base import ConfigError
from audiolm.config.corpus import ClipFilter, CorpusConfig
from audiolm.config.run import ClusterConfig
from audiolm.config.semantic import KMeansConfig
from audiolm.config.start import KMeansStartConfig, StartConfig
from audiolm.data import parallel
from audiolm.data.clips import Clip, Part, clips_parquet
from audiolm.models import kmeans
from audiolm.models.conformer import Encoder, EncoderSizes
from audiolm.tokenizers import kmeans_fit
from audiolm.tokenizers.artifact import MASKED_FORMAT, ArtifactError
from audiolm.tokenizers.extractor import ConformerExtractor
from audiolm.tokenizers.semantic import take_over
from audiolm.tokenizers.start import start_weights

RATE = 16_000
SIZES = KMeansConfig(layer=2, k=9, max_frames=200, iterations=20, restarts=2)
EXPORT = ("model.safetensors", "config.json")


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> str:
    """A masked model's export, with random weights."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderSizes(dim=16, layers=2, heads=2, ff=24))
    with torch.no_grad():
        encoder.statistics.std.fill_(1.0)
    path = str(tmp_path_factory.mktemp("masked"))
    store.put(f"{path}/export/model.safetensors", save({f"encoder.{n}": w for n, w in encoder.state_dict().items()}))
    store.put_json(f"{path}/export/config.json", {"format": MASKED_FORMAT, "sample_rate": RATE,
                                                  **ConformerExtractor(encoder).to_json()})
    return path


@pytest.fixture
def corpus(tmp_path) -> CorpusConfig:
    """Eight clips of noise in changing colours, two a shard, and manifests of all and of half, without their step."""
    clips = []
    for i in range(8):
        g = rng.generator(1, "noise", i)
        wav = np.concatenate([np.convolve(g.normal(0, 0.1, 3200), g.normal(size=8), "same") for _ in range(6 + i)])
        soundfile.write(tmp_path / f"{i}.wav", wav, RATE, subtype="FLOAT")
        part = Part(id=str(i), uri=f"{i}.wav", start=0, frames=len(wav), offset=0, text="")
        clips.append(Clip(id=str(i), origin="s", source="s", speaker=str(i), split="train", sample_rate=RATE,
                          frames=len(wav), parts=(part,), shard=i // 2, row=i % 2))
    store.put(f"{tmp_path}/manifest/clips.parquet", clips_parquet(clips))
    store.put(f"{tmp_path}/half/clips.parquet", clips_parquet(clips[:4]))
    return CorpusConfig(name="t", sources=({"kind": "folder", "name": "s", "root": str(tmp_path)},))


def run(corpus: CorpusConfig, masked: str, out, manifest: str = "manifest", **change) -> dict:
    config = {"kmeans": SIZES.model_copy(update=change), "where": ClipFilter(), "corpus": corpus, "seed": 3,
              "cluster": ClusterConfig(device="cpu")}
    if start := config["kmeans"].start:
        config["start"] = start_weights("semantic.kmeans.start.uri", start, "kmeans")
    path = f"{corpus.sources[0].root}/{manifest}"
    inputs = {"manifest": SimpleNamespace(path=path), "masked_model": SimpleNamespace(path=masked)}
    return kmeans_fit.fit_kmeans(config, inputs, out)


def export(out, name: str = EXPORT[0]) -> bytes:
    return store.get(store.join(out.path, "export", name))


def another(out, name: str):
    return type(out)(f"{out.path}-{name}")


def through_pickle(fn, items, *, out, **_):
    """parallel_map as on another machine, tasks done last to first; the driver polls once."""
    results = [fn(*pickle.loads(pickle.dumps(item))) for item in items[::-1]][::-1]
    out.progress(len(items), len(items), "tasks")
    return results


@pytest.mark.parametrize("method", ["lloyd", "minibatch"])
def test_other_machines_in_any_order_leave_the_same_export(corpus, masked, recording_out, monkeypatch, method):
    monkeypatch.setattr(kmeans, "PART", 70)
    here = run(corpus, masked, recording_out, method=method)
    assert 190 <= here["frames"] <= 200 and here["used_clusters"] == 9
    monkeypatch.setattr(kmeans_fit, "parallel_map", through_pickle)
    other = another(recording_out, "elsewhere")
    other.inline = False
    assert run(corpus, masked, other, method=method) == here
    for name in EXPORT:
        assert export(other, name) == export(recording_out, name)
    assert store.names(other.path) == ["export", "features"]
    assert store.names(store.join(other.path, "features")) == [f"{i:05d}.safetensors" for i in range(4)]


def test_features_stay_in_files_and_only_facts_come_back(corpus, masked, recording_out, monkeypatch):
    results, forwards = {}, parallel.parallel_map

    def watched(fn, items, **how):
        results.setdefault(fn.__name__, []).extend(found := forwards(fn, items, **how))
        return found

    monkeypatch.setattr(kmeans_fit, "parallel_map", watched)
    facts = run(corpus, masked, recording_out)
    assert results == {"sample_shard": [None] * 4, "fit_centroids": [facts]}
    assert not any(isinstance(value, torch.Tensor) for value in facts.values())


def test_every_iteration_is_shown(corpus, masked, recording_out, monkeypatch):
    monkeypatch.setattr(kmeans_fit, "SHOW_S", -1.0)
    run(corpus, masked, recording_out)
    seen = [done for done, total, unit in recording_out.seen if unit == "iterations" and total == 40]
    assert {1, 2, 3, 20, 21, 22} <= set(seen) and seen == sorted(seen)  # both restarts


def test_a_task_elsewhere_reports_through_a_file(corpus, masked, recording_out, monkeypatch):
    monkeypatch.setattr(kmeans_fit, "SHOW_S", -1.0)
    monkeypatch.setattr(kmeans_fit, "parallel_map", through_pickle)
    recording_out.inline = False
    run(corpus, masked, recording_out)
    done, total, unit = recording_out.seen[-1]
    assert unit == "iterations" and total == 40 and 20 < done <= 40


def test_a_killed_fit_takes_up_what_was_sampled(corpus, masked, recording_out, monkeypatch):
    whole = another(recording_out, "whole")
    run(corpus, masked, whole)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(kmeans, "fit", killed)
        run(corpus, masked, recording_out)
    written, put = [], store.put
    monkeypatch.setattr(store, "put", lambda path, data, **how: written.append(path) or put(path, data, **how))
    run(corpus, masked, recording_out)
    assert [path.rsplit("/", 1)[1] for path in written] == list(EXPORT)
    assert export(recording_out) == export(whole)


def test_broken_and_collapsed_features_are_refused(corpus, masked, recording_out):
    run(corpus, masked, recording_out)
    path = store.join(recording_out.path, "features", "00001.safetensors")
    x = load(store.get(path))["features"]
    store.put(path, save({"features": x.index_fill(0, torch.tensor([5]), float("nan"))}))
    with pytest.raises(ValueError, match="not finite in shard 1"):
        run(corpus, masked, recording_out)
    for shard in range(4):
        path = store.join(recording_out.path, "features", f"{shard:05d}.safetensors")
        store.put(path, save({"features": torch.ones_like(load(store.get(path))["features"])}))
    with pytest.raises(ValueError, match="k = 9 needs that many distinct points, got 1 among"):
        run(corpus, masked, recording_out)


def test_a_start_keeps_z_scores_and_numbers(corpus, masked, recording_out):
    """Adapted tokens are the old ones where the old place counts for everything, and other layers and sizes are refused."""
    first, second, third = (another(recording_out, name) for name in ("first", "second", "third"))
    run(corpus, masked, first)
    start = KMeansStartConfig(uri=first.path, frames=1e9)
    facts = run(corpus, masked, second, start=start, iterations=1)
    assert export(second) == export(first) and facts["k"] == SIZES.k
    run(corpus, masked, third, "half", start=KMeansStartConfig(uri=first.path, frames=1.0), iterations=3)
    old, new = (load(export(out)) for out in (first, third))
    assert torch.equal(old["zscore.mean"], new["zscore.mean"]) and not torch.equal(old["centroids"], new["centroids"])
    assert torch.equal(torch.cdist(new["centroids"], old["centroids"]).argmin(1), torch.arange(SIZES.k))
    with pytest.raises(ValueError, match=r"kmeans\.start\.uri: .*kmeans\.k is 5: set it to 9; .*layer is 1: set it to 2"):
        run(corpus, masked, another(recording_out, "x"), start=start, k=5, layer=1)
    with pytest.raises(ConfigError, match="export of a 'masked-conformer', and this step starts from that of a step kmeans"):
        start_weights("semantic.kmeans.start.uri", KMeansStartConfig(uri=masked), "kmeans")


def test_a_tokenizer_is_taken_over_as_it_is(corpus, masked, recording_out):
    first, second = (another(recording_out, name) for name in ("first", "second"))
    run(corpus, masked, first)
    planned = start_weights("semantic.tokenizer.uri", StartConfig(uri=first.path), "kmeans")
    facts = take_over({"start": planned}, {}, second)
    assert facts["k"] == SIZES.k and [export(second, n) for n in EXPORT] == [export(first, n) for n in EXPORT]
    with pytest.raises(ArtifactError, match=r"^semantic\.tokenizer\.uri: .*changed since this run was planned"):
        take_over({"start": planned.model_copy(update={"digest": "0"})}, {}, another(recording_out, "third"))
