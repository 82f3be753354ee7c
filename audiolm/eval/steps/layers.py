"""The step `layers`: the layer to cluster and the number of clusters, chosen by ABX on held-out speakers (2209.03143, IV-B).

First it scores every layer by its features, z-scored over the held-out audio.  Then, for the best `sweep.top` layers and each
K, it scores the centroids of k-means fitted on a sample of training frames.  The chosen centroids have the lowest mean of
within and across; they are the step's facts.  Leaves ui/layers.json {"rows": [{layer, k (None: features), within, across,
interval_within, interval_across}], "choice", "speakers"} and ui/layers.png.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from audiolm import rng, store
from audiolm.config.corpus import ClipFilter
from audiolm.config.external import AbxFilesConfig
from audiolm.config.semantic import AbxConfig, LayerSweepConfig
from audiolm.dag.outputs import build_of
from audiolm.data.parallel import cluster_device, parallel_map
from audiolm.data.sources import roots
from audiolm.eval.metrics import abx
from audiolm.eval.metrics.frame_rate import at_multiple
from audiolm.eval.test_sets import audio_paths, groups_of, wav_of
from audiolm.models import kmeans
from audiolm.render import plots
from audiolm.tokenizers.artifact import ArtifactError
from audiolm.tokenizers.base import SAMPLE_RATE, SEMANTIC_HOP
from audiolm.tokenizers.extractor import Extractor, Window, window_of
from audiolm.tokenizers.kmeans_fit import MIN_STD, FeatureSource, encode_frames, frames_by_shard, model_of, sample_shard
from audiolm.tokenizers.semantic import extractor_from_export, load_extractor
from audiolm.train import checkpoint
from audiolm.train.checkpoint_exports import encoder_weights
from audiolm.train.commits import commits


def checkpoints(path: str, device: str = "cpu") -> Iterator[tuple[int, Extractor]]:
    """(step, encoder) of each kept checkpoint of a training, given its outputs.

    Raises ArtifactError for all but a finished masked model that was trained here."""
    config, build = store.get_json(store.join(path, "export", "config.json")), build_of(path)
    kept = [c for c in commits(build) if not c.get("pruned")]
    if config is None or "encoder" not in config or not kept:
        raise ArtifactError(f"{path} is no finished masked_model build with checkpoints: give one that was trained here")
    for commit in kept:
        weights = encoder_weights(checkpoint.load(build, commit, "model"))
        yield commit["step"], extractor_from_export(config, weights).to(device)


RATE_HZ = SAMPLE_RATE / SEMANTIC_HOP


@dataclass(frozen=True)
class AbxTask:
    """The common part of all tasks, which travels whole: the masked model, the item file, the path of each of its files'
    audio, held-out speakers, the model's windows, seed and device."""

    model: str
    items: str
    paths: dict[str, str]
    speakers: list[str]
    window: Window
    seed: int
    device: str


def choose_layer(config: dict[str, Any], inputs: dict[str, Any], out: Any) -> dict[str, Any]:
    """Step function. config: sweep, layer and k (a number or auto), window_s, overlap_s, abx, where, corpus, seed, cluster;
    inputs: manifest and the masked model. Facts: layer, k, within, across (% of the chosen centroids) and their floors.

    Raises ValueError where fewer than two speakers are held out or audio is missing."""
    sweep, cluster = config["sweep"], config["cluster"]
    model, device = model_of(inputs).path, cluster_device(cluster, out.inline)
    task = _abx_task(config, model, inputs["manifest"].path, device)

    def spread(fn, tasks: list[tuple], unit: str) -> list:
        return parallel_map(fn, tasks, out=out, cluster=cluster, unit=unit, gpu=device == "cuda")

    # Every layer by its features; MFCC is the floor and stands in row 0.
    layers = layers_of(sweep, config["layer"], load_extractor(model).layers)
    rows = [*spread(score_mfcc, [(task,)], "floor"), *spread(score_layer, [(task, n) for n in layers], "layers")]
    best = [row["layer"] for row in sorted(rows[1:], key=_mean_error)[:sweep.top]]

    # The best layers by the centroids of each K, fitted on a sample of the training frames.
    manifest, source_roots = inputs["manifest"].path, roots(config["corpus"])
    shards = list(frames_by_shard(manifest, config["where"]))
    quota = max(1, sweep.frames // len(shards))  # frames a shard
    spread(sample_shard, [(FeatureSource(model, layer, task.window, manifest, config["where"], source_roots, config["seed"],
                                         device), n, quota, _folder(out.path, layer)) for layer in best for n in shards],
           "samples")
    ks = list(sweep.k) if config["k"] == "auto" else [config["k"]]
    rows += spread(score_centroids, [(task, layer, k, _folder(out.path, layer), shards, sweep.iterations)
                                     for layer in best for k in ks], "candidates")
    choice = min((row for row in rows if row["k"]), key=_mean_error)

    out.check()
    store.put_json(store.join(out.path, "ui", "layers.json"), {
        "rows": rows, "choice": {"layer": choice["layer"], "k": choice["k"]}, "speakers": task.speakers})
    store.put(store.join(out.path, "ui", "layers.png"), plots.layers(rows))
    for layer in best:  # the samples are large and no later step reads them
        store.remove(_folder(out.path, layer))
    floor = rows[0]
    return {"layer": choice["layer"], "k": choice["k"], "within": choice["within"], "across": choice["across"],
            "mfcc_within": floor["within"], "mfcc_across": floor["across"], "candidates": len(rows) - 1,
            "speakers": len(task.speakers)}


def _abx_task(config: dict[str, Any], model: str, manifest: str, device: str) -> AbxTask:
    abx_set = config["abx"]
    speakers, paths = held_out_items(abx_set, manifest, config["where"])
    window = window_of(config["window_s"], config["overlap_s"])
    return AbxTask(model, abx_set.items, paths, speakers, window, config["seed"], device)


def held_out_items(abx_set: AbxFilesConfig | AbxConfig, manifest: str, where: ClipFilter) -> tuple[list[str], dict[str, str]]:
    """(speakers of the item file who are held out, {file id: path of its audio}).

    Raises ValueError for fewer than two speakers, and for audio that is missing."""
    items = abx.read_items(abx_set.items)
    speakers = list(groups_of(items, abx_set.speakers, manifest, where)[0].get("held_out", ()))
    if len(speakers) < 2:
        raise ValueError("semantic.abx: the choice is made within and across speakers who are neither trained on nor test; of "
                         f"the item file's these are {speakers}: hold at least two out with corpus.hold_out.dev=[...]")
    return speakers, audio_paths(abx_set.audio, set(items.of(speakers).file.tolist()))


def layers_of(sweep: LayerSweepConfig, layer: int | str, n: int) -> list[int]:
    """The layer that a config names; for auto those of the sweep, of a model with n."""
    if layer != "auto":
        return [layer]
    layers = list(sweep.layers or range(1, n + 1))
    if wrong := [layer for layer in layers if not 1 <= layer <= n]:
        raise ValueError(f"semantic.sweep.layers: {wrong} are not among the model's {n} layers, counted from 1")
    return layers


def _mean_error(row: dict) -> float:
    """Twice the mean of within and across: the lower, the better."""
    return row["within"] + row["across"]


def _folder(out_path: str, layer: int) -> str:
    return store.join(out_path, f"layer-{layer:02d}")


def _row(task: AbxTask, layer: int | None, k: int | None, features, rate_hz: float) -> dict[str, Any]:
    figures = abx.abx(features, abx.read_items(task.items).of(task.speakers), rate_hz, abx.Protocol(task.seed))
    return {"layer": layer, "k": k, **{key: figures[key] for mode in abx.MODES for key in (mode, f"interval_{mode}")}}


def score_mfcc(task: AbxTask) -> dict[str, Any]:
    """One task: the floor, with layer and k None."""
    extract, rate_hz = abx.extractor("mfcc")
    return _row(task, None, None, lambda file: extract(wav_of(task.paths[file])), rate_hz)


def score_layer(task: AbxTask, layer: int) -> dict[str, Any]:
    """One task: one layer's features."""
    x = frames_of(task.paths, load_extractor(task.model, task.device), layer, task.window)
    return _row(task, layer, None, zscored(x), RATE_HZ)


def zscored(x: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Features (T, D) of each file, z-scored per dimension over all files."""
    std_D, mean_D = torch.std_mean(torch.cat(list(x.values())), 0)
    return {file: ((v - mean_D) / std_D.clamp_min(MIN_STD)).numpy() for file, v in x.items()}


def score_centroids(task: AbxTask, layer: int, k: int, folder: str, shards: list[int], iterations: int) -> dict[str, Any]:
    """One task: the centroids of k clusters of one layer's sampled training frames."""
    from safetensors.torch import load

    parts = [load(store.get(store.join(folder, "features", f"{n:05d}.safetensors")))["features"] for n in shards]
    std_D, mean_D = torch.std_mean(torch.cat(parts), 0)
    std_D = std_D.clamp_min(MIN_STD)
    scaled = [((x - mean_D) / std_D).to(task.device) for x in parts]
    centroids_KD = kmeans.fit(scaled, k, rng.derive(task.seed, "sweep", layer, k), iterations).centroids.cpu()
    x = frames_of(task.paths, load_extractor(task.model, task.device), layer, task.window)
    codes = {f: kmeans.assign((v - mean_D) / std_D, centroids_KD) for f, v in x.items()}
    return _row(task, layer, k, {f: centroids_KD[c].numpy() for f, c in codes.items()}, RATE_HZ)


def frames_of(paths: dict[str, str], extractor: Extractor, layer: int, window: Window,
              times: int = 1) -> dict[str, torch.Tensor]:
    """features_TD of each file at a layer, at `times` RATE_HZ."""
    def extract(wav_T: np.ndarray) -> np.ndarray:
        return encode_frames(extractor, [layer], [wav_T], window)[0].numpy()

    features = at_multiple(extract, SEMANTIC_HOP, times)
    return {file: torch.from_numpy(features(wav_of(path))) for file, path in paths.items()}
