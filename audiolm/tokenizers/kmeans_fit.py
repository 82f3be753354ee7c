"""The step `kmeans`: features of one layer, sampled, z-scored, clustered (2209.03143, III-B, IV-B).

A task a shard samples train clips by rng (seed, "kmeans", shard) and writes one file of features.
One more task holds them all and fits: max_frames bounds it, 8 GB for 2 million frames of width 1024
in float32, 20 GB for 5 million. The result is the same bits on any number of workers. Leaves the
export that tokenizers/semantic.py reads.
Legend: N frames at 25 Hz, D dimensions, K clusters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from safetensors.torch import load, save

from audiolm import rng, store
from audiolm.config.corpus import ClipFilter
from audiolm.config.run import ClusterConfig
from audiolm.config.semantic import KMeansConfig
from audiolm.data.clip_groups import finished_groups
from audiolm.data.clip_table import read_clip_table
from audiolm.data.clips import Clip, clips_of, read_clip
from audiolm.data.parallel import Workers, cluster_device, parallel_map
from audiolm.data.sources import roots
from audiolm.models import kmeans
from audiolm.models.entropy import entropy
from audiolm.tokenizers.base import SAMPLE_RATE, SEMANTIC_HOP, pad_rows, padded_samples
from audiolm.tokenizers.extractor import Extractor, Window, window_of, windowed
from audiolm.tokenizers.semantic import SemanticTokenizer, load_extractor, load_semantic, save_semantic
from audiolm.tokenizers.start import StartWeights, require_same, require_unchanged

# Frames encoded for each one kept, at most. Frames of one clip resemble each other, so a few from
# each of many clips cover more than all frames of a few; encoding is what that costs.
OVERSAMPLE = 4
BATCH_S = 60.0  # padded audio encoded at once
MIN_STD = 1e-3  # a dimension that never changes is divided by this, not by zero
SHOW_S = 1.0  # between two progress reports of a fit

Report = Callable[[list], None]  # [iterations done, of how many, inertia per frame or None]


@dataclass(frozen=True)
class FeatureSource:
    """A layer of the encoder in the build `model`, applied to windows of the audio of train clips that `where` takes."""

    model: str
    layer: int
    window: Window
    manifest: str
    where: ClipFilter
    folders: dict[str, str]  # source name -> root of its audio
    seed: int
    device: str


def fit_kmeans(config: dict, inputs: dict, out) -> dict:
    """Step fn: config {"kmeans", "where", "corpus", "seed", "cluster"} and `start` where centroids are
    adapted, inputs: manifest, the masked model (masked_model or masked_model_N) and, where layer or k
    is auto, the step that chose it (layers or layers_N) -> facts.
    """
    settings, where, cluster = chosen(config["kmeans"], inputs), config["where"], config["cluster"]
    source = FeatureSource(model_of(inputs).path, settings.layer, window_of(settings.window_s, settings.overlap_s),
                           inputs["manifest"].path, where, roots(config["corpus"]), config["seed"],
                           cluster_device(cluster, out.inline))
    numbers = sample_features(source, settings.max_frames, out, cluster)
    return run_fit(fit_centroids, (source, settings, numbers, out.path, config.get("start")), source.device, out, cluster)


def model_of(inputs: dict):
    """The masked model among a step's inputs."""
    return next(a for name, a in inputs.items() if name.startswith("masked_model"))


def chosen(settings: KMeansConfig, inputs: dict) -> KMeansConfig:
    """`settings` with numbers in place of auto."""
    facts = next((a.facts for name, a in inputs.items() if name.startswith("layers")), {})
    return settings.model_copy(update={name: facts[name] for name in ("layer", "k") if getattr(settings, name) == "auto"})


# --- sampling, a task a shard

def sample_features(source: FeatureSource, max_frames: int, out, cluster: ClusterConfig) -> list[int]:
    """Samples about `max_frames` frames over the train shards; returns their numbers. Raises ValueError for no clips."""
    frames = frames_by_shard(source.manifest, source.where)
    if not frames:
        raise ValueError("k-means needs train clips and the manifest has none for semantic.where = "
                         f"{source.where.source}: widen it")
    numbers, frames = list(frames), list(frames.values())
    quotas = quotas_of(frames, max_frames)
    items = [(source, n, quota, out.path) for n, quota in zip(numbers, quotas, strict=True)]
    # For the progress: the audio that a shard's task encodes.
    sizes = [min(f, OVERSAMPLE * q) * SEMANTIC_HOP / SAMPLE_RATE for f, q in zip(frames, quotas, strict=True)]
    parallel_map(sample_shard, items, out=out, cluster=cluster, unit="audio s", sizes=sizes,
                 gpu=cluster.gpus_a_task if source.device == "cuda" else 0)
    out.check()
    return numbers


def frames_by_shard(manifest: str, where: ClipFilter) -> dict[int, int]:
    """{shard: frames of its train clips that `where` takes}, in order."""
    clips = read_clip_table(manifest, "train", where)
    numbers, of = np.unique(clips.shards, return_inverse=True)
    frames = np.bincount(of, np.maximum(1, -(-clips.samples // SEMANTIC_HOP)), len(numbers)).astype(np.int64)
    return dict(zip(numbers.tolist(), frames.tolist(), strict=True))


def sample_shard(source: FeatureSource, shard: int, quota: int, out_path: str) -> None:
    """Writes `quota` frames x_ND float32 of a shard's train clips to features/{shard}.safetensors.
    """
    path = features_file(out_path, shard)
    if store.exists(path):  # files appear whole, and the folder is this build's: an earlier attempt wrote it
        return
    clips = clips_of(finished_groups(source.manifest).shard(shard, "train", source.where))
    # One generator a shard: the sample does not depend on which machine draws it, or on other
    # shards' draws. Clips in drawn order until they have OVERSAMPLE times the quota, then frames of
    # those, drawn without replacement.
    generator = rng.generator(source.seed, "kmeans", shard)
    taken, have = [], 0
    for i in generator.permutation(len(clips)).tolist():
        if have >= OVERSAMPLE * quota:
            break
        taken.append(clips[i])
        have += frames_in(clips[i])
    keep = torch.from_numpy(generator.permutation(have)[:quota]).sort().values
    extractor, parts, at = load_extractor(source.model, source.device), [], 0
    # Encode all frames of the clips taken; `at` counts them, so that `keep` finds its rows in each
    # group.
    for group in _groups(taken):
        wavs = [read_clip(c, source.folders) for c in group]
        (x_ND,) = encode_frames(extractor, [source.layer], wavs, source.window)
        inside = keep[(keep >= at) & (keep < at + len(x_ND))] - at
        parts.append(x_ND[inside])
        at += len(x_ND)
    store.put(path, save({"features": torch.cat(parts)}))


def encode_frames(extractor: Extractor, layers: Sequence[int], wavs: Sequence, window: Window) -> list[torch.Tensor]:
    """x_ND (float32, CPU) of each layer: the true frames of some clips, one after the other.
    """
    features, frames_B = windowed(extractor, *pad_rows(wavs), layers, window)
    frames = frames_B.tolist()
    return [torch.cat([x[:n] for x, n in zip(x_BTD.cpu(), frames, strict=True)]) for x_BTD in features]


def read_features(out_path: str, numbers: Sequence[int]) -> list[torch.Tensor]:
    """x_ND of each shard. Raises ValueError naming a shard with a value that is not finite."""
    shards = [load(store.get(features_file(out_path, n)))["features"] for n in numbers]
    kmeans.check_finite(shards, numbers)
    return shards


def quotas_of(frames: list[int], most: int) -> list[int]:
    """Each shard's share of `most` frames, by its length, at least 1."""
    total = sum(frames)
    return [f if total <= most else max(1, f * most // total) for f in frames]


def _groups(clips: list[Clip]) -> list[list[Clip]]:
    """Neighbours in the drawn order, up to BATCH_S of padded audio together.

    The groups depend on the shard alone: another batch may round features differently.
    """
    groups: list[list[Clip]] = []
    for clip in clips:
        group = groups[-1] if groups else []
        longest = max([clip.samples, *(c.samples for c in group)])
        if not group or longest * (len(group) + 1) > BATCH_S * SAMPLE_RATE:
            groups.append([clip])
        else:
            group.append(clip)
    return groups


def frames_in(clip: Clip) -> int:
    return padded_samples(clip.samples) // SEMANTIC_HOP


def features_file(out_path: str, shard: int) -> str:
    return store.join(out_path, "features", f"{shard:05d}.safetensors")


# --- the fit, one task

def show_iterations(out, at: list) -> None:
    """Reports [iterations done, of, inertia per frame] as the step's progress."""
    done, of, inertia = at
    out.progress(done, of, "iterations", "" if inertia is None else f"inertia {inertia:.4g}")


def run_fit(fit: Callable[..., dict], args: tuple, device: str, out, cluster: ClusterConfig) -> dict:
    """fit(*args, report) as one task, whose iterations stand as the step's progress in place of a count of tasks.

    A fit in this process reports at once; one on another machine through a JSON file, read at each poll.
    """
    note = store.join(out.path, "iterations.json")
    store.remove(note)  # an earlier attempt's
    report: Report = partial(show_iterations, out) if out.inline else partial(store.put_json, note)
    workers = Workers(out.inline, out.name, lambda *_: show_iterations(out, store.get_json(note) or [0, 1, None]))
    facts = parallel_map(fit, [(*args, report)], out=workers, cluster=cluster, unit="fits", gpu=device == "cuda")[0]
    store.remove(note)
    return facts


def throttled(report: Report, of: int, frames: int) -> Callable[[int, float], None]:
    """tell(iterations done, inertia), which reports at most every SHOW_S seconds.

    A note is a write to the store.
    """
    last = time.monotonic()

    def tell(done: int, inertia: float) -> None:
        nonlocal last
        if time.monotonic() - last > SHOW_S:
            last = time.monotonic()
            report([done, of, inertia / frames])

    return tell


def fit_centroids(source: FeatureSource, settings: KMeansConfig, numbers: list[int], out_path: str,
                  start: StartWeights | None, report: Report) -> dict:
    """Z-score, k-means and export from the shards' files of features; returns the step's facts.

    With `start` that tokenizer's z-score stays, and its centroids are adapted.  Raises ValueError where it has another k or
    layer.
    """
    shards = read_features(out_path, numbers)
    frames = sum(map(len, shards))
    old = _tokenizer(start, settings) if start else None
    mean_D, std_D = (old.mean_D, old.std_D) if old else zscore(shards)
    # Without the z-score the few dimensions of largest variance would decide which centroid is
    # nearest (III-B). Shard by shard: the features are in memory once.
    for i, x_ND in enumerate(shards):
        shards[i] = scaled(x_ND, mean_D, std_D).to(source.device)
    tell = throttled(report, settings.restarts * settings.iterations, frames)
    if old:
        found = kmeans.adapt(shards, old.centroids_KD, settings.start.frames, settings.iterations, tell)
    else:
        found = kmeans.fit(shards, settings.k, rng.derive(source.seed, "kmeans"), settings.iterations, settings.restarts,
                           method=settings.method,
                           on_iteration=lambda run, done, inertia: tell(run * settings.iterations + done, inertia))
    save_semantic(out_path, load_extractor(source.model), source.layer, mean_D, std_D, found.centroids, source.window,
                  {"frames": frames, "seed": source.seed})
    # Facts for the run's page: dead clusters and a low entropy show a collapse.
    used = int((found.counts > 0).sum())
    # After the z-score each dimension that moves has variance 1, so the features' energy is frames
    # x those dimensions.
    moving = int((std_D > MIN_STD).sum().clamp_min(1))
    return {"k": settings.k, "layer": source.layer, "frames": frames, "inertia": found.inertia / frames,
            "explained": 1.0 - found.inertia / (frames * moving), "iterations": found.iterations,
            "used_clusters": used, "dead_clusters": settings.k - used, "entropy": float(entropy(found.counts.double()))}


def _tokenizer(start: StartWeights, settings: KMeansConfig) -> SemanticTokenizer:
    """The tokenizer to start from. Raises ValueError where it has another k or layer."""
    old = load_semantic(start.uri)
    require_unchanged(start, old.hash)
    require_same(start, {"semantic.kmeans.k": (settings.k, old.spec.vocab),
                         "semantic.kmeans.layer": (settings.layer, old.layer)})
    return old


def zscore(shards: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """mean_D, std_D (float32) over all frames: float64 sums in the order of shards and parts.
    """
    # Two passes: the difference of large sums would lose the variance of a dimension with a large
    # mean.
    frames, parts = sum(map(len, shards)), kmeans.parts(shards)
    mean = sum(sum(x.double().sum(0) for x in part) for part in parts) / frames
    var = sum(sum((x.double() - mean).square().sum(0) for x in part) for part in parts) / frames
    return mean.float(), var.sqrt().clamp_min(MIN_STD).float()


def scaled(x_ND: torch.Tensor, mean_D: torch.Tensor, std_D: torch.Tensor) -> torch.Tensor:
    return (x_ND - mean_D).div_(std_D)  # in memory of its own: products may round by a view's alignment
