"""The step `layers`: which layer to cluster and into how many clusters, by ABX on held-out speakers (paper IV-B).

First every layer by its features, z-scored over the held-out audio; then, for the best `sweep.top` layers and each K, the
centroids of k-means fitted on a sample of training frames.  The choice has the lowest mean of within and across, of
centroids; it is the step's fact.  Leaves ui/layers.json {"rows": [{layer, k (None: features), within, across,
interval_within, interval_across}], "choice", "speakers"} and ui/layers.png.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from audiolm import rng, store
from audiolm.config.semantic import LayerSweepConfig
from audiolm.data.clips import Clip, read_clips
from audiolm.data.parallel import cluster_device, parallel_map
from audiolm.data.sources import roots
from audiolm.eval.metrics import abx
from audiolm.eval.test_sets import audio_paths, groups_of, wav_of
from audiolm.models import kmeans
from audiolm.render import plots
from audiolm.tokenizers.artifact import ArtifactError
from audiolm.tokenizers.base import SAMPLE_RATE, SEMANTIC_HOP
from audiolm.tokenizers.extractor import Extractor, Window, window_of
from audiolm.tokenizers.kmeans_fit import MIN_STD, FeatureSource, encode_frames, model_of, sample_shard
from audiolm.tokenizers.semantic import extractor_from_export, load_extractor
from audiolm.train import checkpoint
from audiolm.train.commits import commits


def checkpoints(build: str, device: str = "cpu") -> Iterator[tuple[int, Extractor]]:
    """(step, encoder) of each checkpoint that the build keeps. Raises ArtefactError where it is no finished masked model of
    ours."""
    config = store.get_json(store.join(build, "export", "config.json"))
    kept = [c for c in commits(build) if not c.get("pruned")]
    if config is None or "encoder" not in config or not kept:
        raise ArtifactError(f"{build} is no finished masked_model build with checkpoints: give one that was trained here")
    for commit in kept:
        state = checkpoint.load(build, commit, "model")
        weights = {name.partition("/encoder.")[2]: value for name, value in state.items()
                   if name.startswith(("param/encoder.", "buffer/encoder."))}
        yield commit["step"], extractor_from_export(config, weights).to(device)


RATE_HZ = SAMPLE_RATE / SEMANTIC_HOP


@dataclass(frozen=True)
class Place:
    """What a task is told; travels whole."""

    model: str
    items: str
    paths: dict[str, str]
    speakers: list[str]
    window: Window
    seed: int
    device: str


def choose_layer(config: dict[str, Any], inputs: dict[str, Any], out: Any) -> dict[str, Any]:
    """Step fn: config {"sweep", "layer" and "k" (a number or auto), "window_s", "overlap_s", "abx" (AbxSet), "where", "corpus",
    "seed", "cluster"}, inputs: manifest and the masked model. Facts: layer, k, within, across (% of the centroids chosen) and
    their floors.

    Raises ValueError where fewer than two speakers are held out or audio is missing."""
    sweep, judged, cluster = config["sweep"], config["abx"], config["cluster"]
    model, manifest, device = model_of(inputs).path, inputs["manifest"].path, cluster_device(cluster, out.inline)
    items = abx.read_items(judged.items)
    speakers = list(groups_of(items, judged.speakers, manifest, config["where"])[0].get("held_out", ()))
    if len(speakers) < 2:
        raise ValueError("semantic.abx: the choice is made within and across speakers who are neither trained on nor test; of "
                         f"the item file's these are {speakers}: hold at least two out with corpus.hold_out.dev=[...]")
    items = items.of(speakers)
    place = Place(model, judged.items, audio_paths(judged.audio, set(items.file.tolist())), speakers,
                  window_of(config["window_s"], config["overlap_s"]), config["seed"], device)
    layers = _layers(sweep, config["layer"], load_extractor(model).layers)

    def spread(fn, tasks: list[tuple], unit: str) -> list:
        return parallel_map(fn, tasks, out=out, cluster=cluster, unit=unit, gpu=device == "cuda")

    rows = [*spread(score_mfcc, [(place,)], "floor"), *spread(score_layer, [(place, n) for n in layers], "layers")]
    best = sorted(rows[1:], key=_badness)[:sweep.top]
    shards: dict[int, list[Clip]] = {}
    for clip in read_clips(manifest, "train", config["where"]):
        shards.setdefault(clip.shard, []).append(clip)
    quota = max(1, sweep.frames // len(shards))
    sampled = [(FeatureSource(model, row["layer"], place.window, roots(config["corpus"]), config["seed"], device),
                shards[n], n, quota, _folder(out.path, row["layer"])) for row in best for n in sorted(shards)]
    spread(sample_shard, sampled, "samples")
    ks = list(sweep.k) if config["k"] == "auto" else [config["k"]]
    tasks = [(place, row["layer"], k, _folder(out.path, row["layer"]), sorted(shards), sweep.iterations)
             for row in best for k in ks]
    rows += spread(score_centroids, tasks, "candidates")
    choice = min((row for row in rows if row["k"]), key=_badness)
    found = {"rows": rows, "choice": {"layer": choice["layer"], "k": choice["k"]}, "speakers": speakers}
    out.check()
    store.put_json(store.join(out.path, "ui", "layers.json"), found)
    store.put(store.join(out.path, "ui", "layers.png"), plots.layers(rows))
    for row in best:
        store.remove(_folder(out.path, row["layer"]))
    floor = rows[0]
    return {**found["choice"], "within": choice["within"], "across": choice["across"], "mfcc_within": floor["within"],
            "mfcc_across": floor["across"], "candidates": len(rows) - 1, "speakers": len(speakers)}


def _layers(sweep: LayerSweepConfig, layer: int | str, n: int) -> list[int]:
    if layer != "auto":
        return [layer]
    wanted = list(sweep.layers or range(1, n + 1))
    if wrong := [layer for layer in wanted if not 1 <= layer <= n]:
        raise ValueError(f"semantic.sweep.layers: {wrong} are not among the model's {n} layers, counted from 1")
    return wanted


def _badness(row: dict) -> float:
    return row["within"] + row["across"]


def _folder(out_path: str, layer: int) -> str:
    return store.join(out_path, f"layer-{layer:02d}")


def _row(place: Place, layer: int | None, k: int | None, features, rate_hz: float) -> dict[str, Any]:
    found = abx.abx(features, abx.read_items(place.items).of(place.speakers), rate_hz, seed=place.seed)
    return {"layer": layer, "k": k, **{key: found[key] for mode in abx.MODES for key in (mode, f"interval_{mode}")}}


def score_mfcc(place: Place) -> dict[str, Any]:
    """The floor: layer and k None."""
    extract, rate_hz = abx.extractor("mfcc")
    return _row(place, None, None, lambda file: extract(wav_of(place.paths[file])), rate_hz)


def score_layer(place: Place, layer: int) -> dict[str, Any]:
    """One layer's features."""
    x = frames_of(place.paths, load_extractor(place.model, place.device), layer, place.window)
    return _row(place, layer, None, zscored(x), RATE_HZ)


def zscored(x: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """features (T, D) of each file, per dimension over all files."""
    std_D, mean_D = torch.std_mean(torch.cat(list(x.values())), 0)
    return {file: ((v - mean_D) / std_D.clamp_min(MIN_STD)).numpy() for file, v in x.items()}


def score_centroids(place: Place, layer: int, k: int, folder: str, shards: list[int], iterations: int) -> dict[str, Any]:
    """The centroids of k clusters of one layer's sampled training frames."""
    from safetensors.torch import load

    parts = [load(store.get(store.join(folder, "features", f"{n:05d}.safetensors")))["features"] for n in shards]
    std_D, mean_D = torch.std_mean(torch.cat(parts), 0)
    std_D = std_D.clamp_min(MIN_STD)
    scaled = [((x - mean_D) / std_D).to(place.device) for x in parts]
    centroids_KD = kmeans.fit(scaled, k, rng.derive(place.seed, "sweep", layer, k), iterations).centroids.cpu()
    x = frames_of(place.paths, load_extractor(place.model, place.device), layer, place.window)
    codes = {f: kmeans.assign((v - mean_D) / std_D, centroids_KD) for f, v in x.items()}
    return _row(place, layer, k, {f: centroids_KD[c].numpy() for f, c in codes.items()}, RATE_HZ)


def frames_of(paths: dict[str, str], extractor: Extractor, layer: int, window: Window) -> dict[str, torch.Tensor]:
    """features_TD of each file at a layer."""
    return {file: encode_frames(extractor, [layer], [wav_of(path)], window)[0] for file, path in paths.items()}
