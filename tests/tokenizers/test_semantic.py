"""Semantic tokens from files to artefact: the masked objective's factory, the k-means step, the tokenizer, refusals."""

from __future__ import annotations

import hashlib
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load, save

from audiolm import rng, store
from audiolm.config.corpus import CorpusConfig
from audiolm.config.run import ClusterConfig
from audiolm.config.semantic import KMeansConfig, MaskedModelConfig, SemanticConfig
from audiolm.config.training import TrainConfig
from audiolm.data import parallel
from audiolm.data.clips import Clip, Part, clips_parquet
from audiolm.tokenizers import kmeans_fit as fit_module
from audiolm.tokenizers.artifact import ArtifactError
from audiolm.tokenizers.kmeans_fit import fit_kmeans
from audiolm.tokenizers.semantic import load_extractor, load_semantic, save_semantic
from audiolm.train.objectives import masked as om
from audiolm.train.objectives import masked_inputs
from audiolm.train.objectives.base import Context

RATE = 16_000
MODEL = MaskedModelConfig(objective="hubert", dim=16, layers=3, heads=2, ff=24, targets_k=8, crop_s=1.0, mask_share=0.55,
                          train=TrainConfig(steps=10, batch=2, lr=1e-3))
SEMANTIC = SemanticConfig(model=MODEL, kmeans=KMeansConfig(layer=2, k=12, max_frames=150, iterations=20, restarts=2))


def syllables(seed: int, seconds: float) -> torch.Tensor:
    """Harmonic tones of 200 ms at pitches from a seed."""
    t, g = np.arange(int(0.2 * RATE)) / RATE, rng.generator(seed, "syllables")
    tones = [sum(np.sin(2 * np.pi * f * n * t) / n for n in (1, 2, 3)) * np.hanning(len(t)) * 0.2
             for f in g.uniform(100, 2000, math.ceil(seconds * 5))]
    return torch.from_numpy(np.concatenate(tones)[:int(seconds * RATE)]).float()


class Out:
    """A step's running output, inline."""

    inline, name = True, "step"

    def __init__(self, path):
        self.path, self.seen = str(path), []

    def check(self):
        pass

    def progress(self, done, total, unit, note=""):
        self.seen.append((done, total, unit))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    clips = []
    for i in range(9):
        wav = syllables(50 + i, 1.0 + 0.37 * i).numpy()
        soundfile.write(root / f"{i}.wav", wav, RATE, subtype="FLOAT")
        part = Part(id=str(i), uri=f"{i}.wav", start=0, frames=len(wav), offset=0, text="")
        clips.append(Clip(id=str(i), origin="s", source="s", speaker=str(i), split="dev" if i > 6 else "train",
                          sample_rate=RATE, frames=len(wav), parts=(part,), shard=i // 3, row=i % 3))
    config = CorpusConfig(name="t", sources=({"kind": "folder", "name": "s", "root": str(root)},))
    for name, members in (("manifest", clips), ("train", clips[:7])):  # without their step
        store.put(f"{root}/{name}/clips.parquet", clips_parquet(members))
    return SimpleNamespace(config=config, root=str(root))


def make_objective(corpus, rank=0, world=1, manifest="manifest") -> om.MaskedObjective:
    torch.manual_seed(0)
    config = {"model": SEMANTIC.model, "train": SEMANTIC.model.train, "iteration": None, "kmeans": SEMANTIC.kmeans,
              "where": SEMANTIC.where, "corpus": corpus.config, "seed": 3}
    inputs = {"manifest": f"{corpus.root}/{manifest}"}
    return om.masked_objective(config, inputs, Context(rank, world, torch.device("cpu"), seed=3))


def export(objective, path) -> str:
    weights, config = objective.export()
    store.put(store.join(str(path), "export", "model.safetensors"), save(weights))
    store.put_json(store.join(str(path), "export", "config.json"), config)
    return str(path)


def run_kmeans(corpus, model: str, path) -> dict:
    config = {"model": SEMANTIC.model, "kmeans": SEMANTIC.kmeans, "where": SEMANTIC.where, "corpus": corpus.config, "seed": 3,
              "cluster": ClusterConfig(device="cpu")}
    inputs = {"manifest": SimpleNamespace(path=f"{corpus.root}/manifest"), "masked_model": SimpleNamespace(path=model)}
    return fit_kmeans(config, inputs, Out(path))


@pytest.fixture
def artefact(corpus, tmp_path) -> str:
    run_kmeans(corpus, export(make_objective(corpus), tmp_path / "masked"), tmp_path / "kmeans")
    return str(tmp_path / "kmeans")


def test_factory_is_the_same_on_every_rank_and_measures_its_inputs(corpus):
    one, two = make_objective(corpus), make_objective(corpus, rank=1, world=2)
    state, other = one.model.state_dict(), two.model.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state)
    assert not torch.equal(one.model.encoder.statistics.mean, torch.zeros(80))
    a, b = one.load(4, [0, 1]), two.load(4, [1])
    assert torch.equal(a.wav_BT[1:], b.wav_BT) and torch.equal(a.mask_BT[1, :b.mask_BT.shape[1]], b.mask_BT[0])
    figures = one.evaluate()
    assert math.isfinite(figures["loss"]) and figures["target_entropy"] > 0.5
    assert sorted(one.inputs.held) == sorted([*make_objective(corpus, 0, 2).inputs.held, *two.inputs.held])


def test_silence_cannot_make_targets(corpus, monkeypatch):
    monkeypatch.setattr(masked_inputs, "read_clip", lambda clip, roots, start=0, samples=None: np.zeros(samples, np.float32))
    with pytest.raises(ValueError, match="targets_k.*distinct"):
        make_objective(corpus)


def test_targets_of_a_collapsed_tokenizer_are_refused(corpus, artefact, tmp_path):
    """Targets of a second iteration, where nearly all frames are nearest to one centroid."""
    good, pieces = load_semantic(artefact), [*make_objective(corpus).inputs.pieces()]
    cpu = torch.device("cpu")
    assert om.teacher(artefact, cpu, "float32", pieces)[1] == 12
    far_KD = torch.cat([torch.zeros(1, 16), 1e3 + torch.arange(11.0)[:, None].expand(-1, 16)])
    save_semantic(str(tmp_path / "one"), good.extractor, 2, good.mean_D, good.std_D, far_KD, good.window, {})
    with pytest.raises(ValueError, match="all but constant.*1 of 12 in use.*semantic.iterations' k"):
        om.teacher(str(tmp_path / "one"), cpu, "float32", pieces)


def test_no_dev_clips_is_a_clear_error(corpus):
    with pytest.raises(ValueError, match="needs dev clips"):
        make_objective(corpus, manifest="train")


def test_round_trip_batch_equals_single_and_every_length(artefact):
    tokenizer = load_semantic(artefact)
    assert tokenizer.spec.to_json() == {"name": "semantic", "sample_rate": RATE, "hop": 640, "n_q": 1, "vocab": 12}
    assert len(tokenizer.hash) == 16 and load_semantic(artefact).hash == tokenizer.hash
    lengths = [1, 639, 640, 641, 1999, 16_000, 31_337]
    wav_BT = torch.full((len(lengths), 31_337), 0.3)
    for row, n in zip(wav_BT, lengths, strict=True):
        row[:n] = syllables(n, 2.0)[:n]
    codes = tokenizer.encode(wav_BT, torch.tensor(lengths))
    for n, row, c in zip(lengths, wav_BT, codes, strict=True):
        assert c.shape == (math.ceil(n / 640), 1) and c.dtype == torch.int64 and 0 <= int(c.min()) <= int(c.max()) < 12
        alone, = tokenizer.encode(row[None, :n], torch.tensor([n]))
        assert torch.equal(alone, c)
    assert len(codes[-1].unique()) > 3


def test_features_are_zscored_and_blocks_above_the_layer_left_out(corpus, artefact, tmp_path):
    tokenizer = load_semantic(artefact)
    assert tokenizer.extractor.layers == 2
    parts = []
    for i in range(7):
        wav, _ = soundfile.read(f"{corpus.config.sources[0].root}/{i}.wav", dtype="float32")
        parts.append(tokenizer.features(torch.from_numpy(wav)[None], torch.tensor([len(wav)]))[0][0])
    x = torch.cat(parts)  # of all train frames; the statistics are of a sample of them
    assert x.mean(0).abs().max() < 0.3 and (x.std(0) - 1).abs().max() < 0.35
    assert load_extractor(str(tmp_path / "masked")).layers == 3


def test_kmeans_step_facts_and_independence_of_order(corpus, artefact, tmp_path, monkeypatch):
    facts = run_kmeans(corpus, str(tmp_path / "masked"), tmp_path / "again")
    assert facts["k"] == 12 and facts["layer"] == 2 and 140 <= facts["frames"] <= 150
    assert facts["used_clusters"] + facts["dead_clusters"] == 12
    assert 0 < facts["entropy"] <= math.log(12) and 0 < facts["explained"] < 1
    assert store.names(str(tmp_path / "again" / "features")) == [f"{i:05d}.safetensors" for i in range(3)]
    forwards = parallel.parallel_map

    def backwards(fn, items, **how):  # workers may finish in any order
        return forwards(fn, items[::-1], **{**how, "sizes": how.get("sizes") and how["sizes"][::-1]})[::-1]

    monkeypatch.setattr(fit_module, "parallel_map", backwards)
    run_kmeans(corpus, str(tmp_path / "masked"), tmp_path / "backwards")
    for name in ("model.safetensors", "config.json"):
        first = store.get(store.join(artefact, "export", name))
        assert store.get(str(tmp_path / "again" / "export" / name)) == first
        assert store.get(str(tmp_path / "backwards" / "export" / name)) == first


def test_features_of_a_killed_attempt_are_taken_up(corpus, artefact, monkeypatch):
    before = store.get(store.join(artefact, "export", "model.safetensors"))
    store.remove(store.join(artefact, "export"))
    store.remove(store.join(artefact, "features", "00001.safetensors"))
    encoded = []
    encode = fit_module.encode_frames
    monkeypatch.setattr(fit_module, "encode_frames", lambda *a: encoded.append(1) or encode(*a))
    run_kmeans(corpus, artefact.replace("kmeans", "masked"), artefact)
    assert len(encoded) == 1
    assert store.get(store.join(artefact, "export", "model.safetensors")) == before


def edit(artefact: str, weights=lambda w: w, config=lambda c: c) -> None:
    """Rewrites the artefact with a right checksum, as a well-meaning converter would."""
    path = store.join(artefact, "export", "model.safetensors")
    data = save(weights(load(store.get(path))))
    found = store.get_json(store.join(artefact, "export", "config.json"))
    store.put(path, data)
    store.put_json(store.join(artefact, "export", "config.json"),
                   config({**found, "weights_sha256": hashlib.sha256(data).hexdigest()}))


@pytest.mark.parametrize("name", ["centroids", "zscore.mean", "encoder.blocks.1.norm.weight", "encoder.statistics.std"])
def test_golden_tokens_refuse_parts_that_do_not_belong_together(artefact, name):
    edit(artefact, weights=lambda w: {**w, name: w[name].flip(0) + 0.5})
    with pytest.raises(ArtifactError, match="of the 50 golden tokens differ"):
        load_semantic(artefact)


def test_other_mismatches_are_named(artefact):
    path = store.join(artefact, "export", "model.safetensors")
    whole, config = store.get(path), store.get(store.join(artefact, "export", "config.json"))

    def restore():
        store.put(path, whole)
        store.put(store.join(artefact, "export", "config.json"), config)

    store.put(path, whole[:-4] + b"\0\0\0\1")
    with pytest.raises(ArtifactError, match="not the file that config.json describes"):
        load_semantic(artefact)
    for field, value in (("sample_rate", 24_000), ("layer_convention", "before the norm"), ("family", "other")):
        restore()
        edit(artefact, config=lambda c, f=field, v=value: {**c, f: v})
        with pytest.raises(ArtifactError, match="layer_convention is" if field == "family" else f"{field} is {value!r}"):
            load_semantic(artefact)
    for change, text in (({"k": 13}, "k = 13"), ({"layer": 3}, "layer 3 is not one"), ({"layer": 1}, "golden tokens")):
        restore()
        edit(artefact, config=lambda c, change=change: {**c, **change})
        with pytest.raises(ArtifactError, match=text):
            load_semantic(artefact)
    for name, text in (("encoder.mask_embedding", "mask_embedding"), ("centroids", "lacks centroids;")):
        restore()
        edit(artefact, weights=lambda w, name=name: {n: v for n, v in w.items() if n != name})
        with pytest.raises(ArtifactError, match=text):
            load_semantic(artefact)
    restore()
    edit(artefact, config=lambda c: {n: v for n, v in c.items() if n not in ("golden", "layer")})
    with pytest.raises(ArtifactError, match="lacks layer, golden;"):
        load_semantic(artefact)
    restore()
    edit(artefact, weights=lambda w: {**w, "zscore.std": w["zscore.std"][:5]})
    with pytest.raises(ArtifactError, match=r"zscore.std has shape \(5,\).*dim = 16"):
        load_semantic(artefact)
    store.remove(path)
    with pytest.raises(ArtifactError, match="model.safetensors is missing"):
        load_semantic(artefact)


def test_artefact_is_plain_and_says_what_it_is(artefact):
    config = json.loads(store.get(store.join(artefact, "export", "config.json")))
    assert config["layer"] == 2 and config["k"] == 12 and "LayerNorm" in config["layer_convention"]
    assert len(config["golden"]["tokens"]) == 50 and len(set(config["golden"]["tokens"])) > 2
    assert sum(config["golden"]["sure"]) > 25
    weights = load(store.get(store.join(artefact, "export", "model.safetensors")))
    assert weights["centroids"].shape == (12, 16) and weights["zscore.std"].dtype == torch.float32


def test_saving_on_another_layer_gives_other_tokens(corpus, artefact, tmp_path):
    whole = load_extractor(str(tmp_path / "masked"))
    old = load_semantic(artefact)
    save_semantic(str(tmp_path / "other"), whole, 3, old.mean_D, old.std_D, old.centroids_KD, old.window, {})
    other = load_semantic(str(tmp_path / "other"))
    wav_BT, n = syllables(7, 2.0)[None], torch.tensor([32_000])
    assert other.hash != old.hash and not torch.equal(other.encode(wav_BT, n)[0], old.encode(wav_BT, n)[0])
