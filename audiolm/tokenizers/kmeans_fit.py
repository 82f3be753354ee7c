"""The step `kmeans`: features of one layer, sampled over shards, z-scored and clustered (paper III-B, IV-B).

Each task samples its shard's training clips from (seed, "kmeans", shard) and writes one file of features; max_frames
bounds them whatever the corpus.  Up to max_local_frames are fitted in one task; more are joined into files of parts, and
every iteration is a task a part that leaves the features where they are.  Both give the same bits, on any number of
workers.  Leaves the artefact that tokenizers.semantic reads.  Legend: N frames, D dimensions, K clusters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from safetensors.torch import load, save

from audiolm import rng, store
from audiolm.config.run import ClusterConfig
from audiolm.config.semantic import KMeansConfig
from audiolm.data.clips import Clip, read_clip, read_clips
from audiolm.data.parallel import cluster_device, parallel_map
from audiolm.data.sources import roots
from audiolm.models import kmeans
from audiolm.models.entropy import entropy
from audiolm.tokenizers.base import SAMPLE_RATE, SEMANTIC_HOP, padded_samples
from audiolm.tokenizers.extractor import Extractor, Window, window_of, windowed
from audiolm.tokenizers.semantic import load_extractor, save_semantic

OVERSAMPLE = 4  # frames encoded for one kept, at most: many clips give a few frames each
BATCH_S = 60.0  # padded audio encoded at once
MIN_STD = 1e-3  # of a feature that never moves
SHOW_S = 1.0  # between two notes of a task that fits


def fit_kmeans(config: dict, inputs: dict, out) -> dict:
    """Step fn: config {"kmeans", "where", "corpus", "seed", "cluster"}, inputs: manifest, the masked model (masked_model or
    masked_model_N) and, where layer or k is auto, the step that chose it (layers or layers_N) -> facts."""
    settings, where = chosen(config["kmeans"], inputs), config["where"]
    cluster, seed = config["cluster"], config["seed"]
    model = model_of(inputs).path
    shards: dict[int, list[Clip]] = {}
    for clip in read_clips(inputs["manifest"].path, "train", where):
        shards.setdefault(clip.shard, []).append(clip)
    if not shards:
        raise ValueError(f"k-means needs train clips and the manifest has none for semantic.where = "
                         f"{where.source}: widen it")
    numbers = sorted(shards)
    frames = [sum(frames_in(c) for c in shards[n]) for n in numbers]
    quotas = quotas_of(frames, settings.max_frames)
    device = cluster_device(cluster, out.inline)
    window = window_of(settings.window_s, settings.overlap_s)
    items = [(model, settings.layer, window, shards[n], roots(config["corpus"]), n, quota, seed, out.path, device)
             for n, quota in zip(numbers, quotas, strict=True)]
    sizes = [min(f, OVERSAMPLE * q) * SEMANTIC_HOP / SAMPLE_RATE for f, q in zip(frames, quotas, strict=True)]
    kept = parallel_map(sample_shard, items, out=out, cluster=cluster, unit="audio s", sizes=sizes, gpu=device == "cuda")
    out.check()
    fit = fit_here if sum(kept) <= settings.max_local_frames else fit_parts
    return fit(model, settings, dict(zip(numbers, kept, strict=True)), seed, out, cluster, device)


def model_of(inputs: dict):
    """The masked model among a step's inputs."""
    return next(a for name, a in inputs.items() if name.startswith("masked_model"))


def chosen(settings: KMeansConfig, inputs: dict) -> KMeansConfig:
    """`settings` with numbers in place of auto."""
    facts = next((a.facts for name, a in inputs.items() if name.startswith("layers")), {})
    return settings.model_copy(update={name: facts[name] for name in ("layer", "k") if getattr(settings, name) == "auto"})


def sample_shard(model: str, layer: int, window: Window, clips: list[Clip], folders: dict[str, str], shard: int, quota: int,
                 seed: int, out_path: str, device: str) -> int:
    """Writes `quota` feature frames of a shard's train clips to features/{shard}.safetensors; returns their number."""
    path = features_file(out_path, shard)
    generator = rng.generator(seed, "kmeans", shard)
    taken, have = [], 0
    for i in generator.permutation(len(clips)).tolist():
        if have >= OVERSAMPLE * quota:
            break
        taken.append(clips[i])
        have += frames_in(clips[i])
    keep = torch.from_numpy(generator.permutation(have)[:quota]).sort().values
    if store.exists(path):  # whole, and of this build: an earlier attempt's
        return len(keep)
    extractor, parts, at = load_extractor(model, device), [], 0
    for group in _groups(taken):
        (x_ND,) = encode_frames(extractor, [layer], [read_clip(c, folders) for c in group], window)
        inside = keep[(keep >= at) & (keep < at + len(x_ND))] - at
        parts.append(x_ND[inside])
        at += len(x_ND)
    store.put(path, save({"features": torch.cat(parts)}))
    return len(keep)


def encode_frames(extractor: Extractor, layers: Sequence[int], wavs: Sequence, window: Window) -> list[torch.Tensor]:
    """x_ND (float32, CPU) of each layer: all frames of some clips, one after the other."""
    lengths_B = torch.tensor([len(w) for w in wavs])
    wav_BT = torch.zeros(len(wavs), padded_samples(int(lengths_B.max())))
    for row, wav in zip(wav_BT, wavs, strict=True):
        row[:len(wav)] = torch.from_numpy(wav)
    found, frames_B = windowed(extractor, wav_BT, lengths_B, layers, window)
    frames = frames_B.tolist()
    return [torch.cat([x[:n] for x, n in zip(x_BTD.cpu(), frames, strict=True)]) for x_BTD in found]


class Iterations:
    """An `out` that shows what `at` says, (iteration, of, inertia per frame), in place of fan_out's own count of tasks."""

    def __init__(self, out, at: Callable[[], list | None]):
        self.out, self.at, self.inline, self.step = out, at, out.inline, getattr(out, "step", None)

    def progress(self, *_) -> None:
        self.show(self.at() or [0, 1, None])

    def show(self, at: list) -> None:
        self.out.progress(at[0], at[1], "iterations", "" if at[2] is None else f"inertia {at[2]:.4g}")


def fit_here(model: str, settings: KMeansConfig, kept: dict[int, int], seed: int, out, cluster: ClusterConfig, device: str) -> dict:
    """The fit in one task, which holds all features; returns the step's facts. `kept`: shard -> frames."""
    note = store.join(out.path, "iterations.json")
    store.remove(note)
    shown = Iterations(out, partial(store.get_json, note))
    say = shown.show if out.inline else partial(store.put_json, note)  # a task on another machine leaves a file
    facts = parallel_map(fit_files, [(model, settings, list(kept), seed, out.path, device, say)], out=shown, cluster=cluster,
                    unit="fits", gpu=device == "cuda")[0]
    store.remove(note)
    return facts


def fit_files(model: str, settings: KMeansConfig, numbers: list[int], seed: int, out_path: str, device: str,
              say: Callable[[list], None]) -> dict:
    """Z-score, k-means and artefact from the files of features; `say` hears how far it is; returns the facts."""
    shards = [load(store.get(features_file(out_path, n)))["features"] for n in numbers]
    kmeans.check_finite(shards, numbers)
    frames, told = sum(map(len, shards)), time.monotonic()
    mean_D, std_D = zscore(kmeans.in_memory(shards)[0], frames)
    for i, x in enumerate(shards):  # shard by shard: the features are held once
        shards[i] = scaled(x, mean_D, std_D).to(device)

    def tell(run: int, done: int, inertia: float) -> None:
        nonlocal told
        if time.monotonic() - told > SHOW_S:
            told = time.monotonic()
            say([run * settings.iterations + done, settings.restarts * settings.iterations, inertia / frames])

    found = kmeans.fit(shards, settings.k, rng.derive(seed, "kmeans"), settings.iterations, settings.restarts,
                       method=settings.method, on_iteration=tell)
    return export(model, settings, found, mean_D, std_D, frames, seed, out_path)


def fit_parts(model: str, settings: KMeansConfig, kept: dict[int, int], seed: int, out, cluster: ClusterConfig, device: str) -> dict:
    """The same fit with a task a part and iteration; the driver sees centroids and sums. `kept`: shard -> frames."""
    groups = [[list(kept)[i] for i in group] for group in kmeans.parts(list(kept.values()))]
    frames, gpu = sum(kept.values()), device == "cuda"
    parallel_map(join_part, [(out.path, i, group) for i, group in enumerate(groups)], out=out, cluster=cluster, unit="parts")
    at = [0, settings.restarts * settings.iterations, None]
    shown = Iterations(out, lambda: at)

    def each_with(scale: tuple[torch.Tensor, torch.Tensor] | None, device: str) -> kmeans.Each:
        def each(fn: Callable, *args, only: Sequence[int] | None = None) -> list:
            which = range(len(groups)) if only is None else only
            return parallel_map(on_part, [(out.path, i, scale, device, fn, args) for i in which], out=shown, cluster=cluster,
                           unit="parts", gpu=device == "cuda")
        return each

    def tell(run: int, done: int, inertia: float) -> None:
        at[0], at[2] = run * settings.iterations + done, inertia / frames

    scale = zscore(each_with(None, "cpu"), frames)
    begin = parallel_map(start_parts, [(out.path, len(groups), scale, device, frames, settings, seed)], out=shown,
                    cluster=cluster, unit="starts", gpu=gpu)[0]
    found = kmeans.best(each_with(scale, device), len(groups), begin, settings.iterations, settings.method,
                        rng.derive(seed, "kmeans"), tell)
    facts = parallel_map(export, [(model, settings, found, *scale, frames, seed, out.path)], out=shown, cluster=cluster,
                    unit="fits")[0]
    out.check()
    store.remove(store.join(out.path, "parts"))  # the files of the shards stay
    return facts


def join_part(out_path: str, part: int, numbers: list[int]) -> None:
    """Writes parts/{part}.safetensors, `features` of some shards and their `lengths`: one file to read an iteration."""
    path = _part(out_path, part)
    if store.exists(path):
        return
    shards = [load(store.get(features_file(out_path, n)))["features"] for n in numbers]
    kmeans.check_finite(shards, numbers)
    store.put(path, save({"features": torch.cat(shards), "lengths": torch.tensor([len(x) for x in shards])}))


def on_part(out_path: str, part: int, scale: tuple[torch.Tensor, torch.Tensor] | None, device: str, fn: Callable,
            args: tuple):
    """fn(shards of a part, *args); `scale` (mean_D, std_D) z-scores them first."""
    found = load(store.get(_part(out_path, part)))
    shards = found["features"].split(found["lengths"].tolist())
    return fn([(x if scale is None else scaled(x, *scale)).to(device) for x in shards], *args)


def start_parts(out_path: str, parts: int, scale: tuple[torch.Tensor, torch.Tensor], device: str, frames: int,
                settings: KMeansConfig, seed: int) -> list[torch.Tensor]:
    """centroids_KD of each restart; holds a sample of the frames and one part at a time."""
    def rows_of(rows: torch.Tensor) -> torch.Tensor:
        return kmeans.take((on_part(out_path, i, scale, device, torch.cat, ()) for i in range(parts)), rows)

    return kmeans.starts(rows_of, frames, settings.k, rng.derive(seed, "kmeans"), settings.restarts)


def export(model: str, settings: KMeansConfig, found: kmeans.KMeans, mean_D: torch.Tensor, std_D: torch.Tensor, frames: int,
          seed: int, out_path: str) -> dict:
    """Writes the artefact; returns the step's facts."""
    used = int((found.counts > 0).sum())
    facts = {"k": settings.k, "layer": settings.layer, "frames": frames, "inertia": found.inertia / frames,
             "explained": 1.0 - found.inertia / (frames * int((std_D > MIN_STD).sum().clamp_min(1))),
             "iterations": found.iterations, "used_clusters": used, "dead_clusters": settings.k - used,
             "entropy": float(entropy(found.counts.double()))}
    save_semantic(out_path, load_extractor(model), settings.layer, mean_D, std_D, found.centroids,
                  window_of(settings.window_s, settings.overlap_s), {"frames": frames, "seed": seed})
    return facts


def zscore(each: kmeans.Each, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """mean_D, std_D (float32) over all frames; float64 sums in the order of the shards, two passes."""
    mean = sum(each(_sums)) / frames
    std = (sum(each(_squares, mean)) / frames).sqrt()
    return mean.float(), std.clamp_min(MIN_STD).float()


def scaled(x_ND: torch.Tensor, mean_D: torch.Tensor, std_D: torch.Tensor) -> torch.Tensor:
    return (x_ND - mean_D).div_(std_D)  # in memory of its own: products may round by a view's alignment


def _sums(part: kmeans.Part) -> torch.Tensor:
    return sum(x.double().sum(0) for x in part)


def _squares(part: kmeans.Part, mean: torch.Tensor) -> torch.Tensor:
    return sum((x.double() - mean).square().sum(0) for x in part)


def quotas_of(frames: list[int], most: int) -> list[int]:
    """Each shard's share of `most` frames, by its length, at least 1."""
    total = sum(frames)
    return [f if total <= most else max(1, f * most // total) for f in frames]


def _groups(clips: list[Clip]) -> list[list[Clip]]:
    """Neighbours in the drawn order, up to BATCH_S of padded audio together: a rule of the shard alone."""
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


def _part(out_path: str, part: int) -> str:
    return store.join(out_path, "parts", f"{part:05d}.safetensors")
