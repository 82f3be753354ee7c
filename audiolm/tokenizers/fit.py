"""The step `kmeans`: features of one layer, sampled over shards, z-scored and clustered (paper III-B, IV-B).

Each task samples its shard's training clips from (seed, "kmeans", shard) and writes one file of features; memory is
bounded by max_frames whatever the corpus.  The fit reads the files in shard order, so that workers change nothing.
Leaves the artefact that tokenizers.semantic reads.  Legend: N frames, D dimensions, K clusters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors.torch import load, save

from audiolm import rng, store
from audiolm.config import KMeans
from audiolm.data.audio import read_clip
from audiolm.data.manifest import Clip, read_clips, roots
from audiolm.data.shards import device_of, fan_out
from audiolm.models import kmeans
from audiolm.tokenizers.base import SAMPLE_RATE, SEMANTIC_HOP, padded_samples
from audiolm.tokenizers.semantic import load_encoder, mel_of, save_semantic

OVERSAMPLE = 4  # frames encoded for one kept, at most: many clips give a few frames each
BATCH_S = 60.0  # padded audio encoded at once
MIN_STD = 1e-3  # of a feature that never moves


def fit_kmeans(config: dict, inputs: dict, out) -> dict:
    """Step fn: config {"kmeans", "where", "corpus", "seed", "cluster"}, inputs {"manifest", "masked_model"} -> facts."""
    settings, where = config["kmeans"], config["where"]
    cluster, seed = config["cluster"], config["seed"]
    model = inputs["masked_model"].path
    shards: dict[int, list[Clip]] = {}
    for clip in read_clips(inputs["manifest"].path, "train", where):
        shards.setdefault(clip.shard, []).append(clip)
    if not shards:
        raise ValueError(f"k-means needs train clips and the manifest has none for semantic.where = "
                         f"{where.source}: widen it")
    numbers = sorted(shards)
    frames = [sum(_frames(c) for c in shards[n]) for n in numbers]
    quotas = _quotas(frames, settings.max_frames)
    device = device_of(cluster, out.inline)
    items = [(model, settings.layer, shards[n], roots(config["corpus"]), n, quota, seed, out.path, device)
             for n, quota in zip(numbers, quotas, strict=True)]
    sizes = [min(f, OVERSAMPLE * q) * SEMANTIC_HOP / SAMPLE_RATE for f, q in zip(frames, quotas, strict=True)]
    fan_out(sample_shard, items, out=out, cluster=cluster, unit="audio s", sizes=sizes, gpu=device == "cuda")
    out.check()
    return fan_out(fit_files, [(model, settings, numbers, seed, out.path, device)], out=out, cluster=cluster,
                   unit="fits", gpu=device == "cuda")[0]


def sample_shard(model: str, layer: int, clips: list[Clip], folders: dict[str, str], shard: int, quota: int, seed: int,
                 out_path: str, device: str) -> int:
    """Writes `quota` feature frames of a shard's train clips to features/{shard}.safetensors; returns their number."""
    path = _file(out_path, shard)
    generator = rng.generator(seed, "kmeans", shard)
    chosen, have = [], 0
    for i in generator.permutation(len(clips)).tolist():
        if have >= OVERSAMPLE * quota:
            break
        chosen.append(clips[i])
        have += _frames(clips[i])
    keep = torch.from_numpy(generator.permutation(have)[:quota]).sort().values
    if store.exists(path):  # whole, and of this build: an earlier attempt's
        return len(keep)
    encoder, _ = load_encoder(model)
    encoder, parts, at = encoder.to(device), [], 0
    for group in _groups(chosen):
        x_ND = encode_frames(encoder, layer, [read_clip(c, folders) for c in group], device)
        inside = keep[(keep >= at) & (keep < at + len(x_ND))] - at
        parts.append(x_ND[inside])
        at += len(x_ND)
    store.put(path, save({"features": torch.cat(parts)}))
    return len(keep)


@torch.no_grad()
def encode_frames(encoder, layer: int, wavs: Sequence, device: str) -> torch.Tensor:
    """x_ND (float32, CPU): all frames of some clips, one after the other."""
    lengths_B = torch.tensor([len(w) for w in wavs])
    wav_BT = torch.zeros(len(wavs), padded_samples(int(lengths_B.max())))
    for row, wav in zip(wav_BT, wavs, strict=True):
        row[:len(wav)] = torch.from_numpy(wav)
    mel_BTF, frames_B = mel_of(wav_BT.to(device), lengths_B)
    x_BTD = encoder(mel_BTF, frames_B, None, layer).float().cpu()
    return torch.cat([x[:n] for x, n in zip(x_BTD, frames_B.tolist(), strict=True)])


def fit_files(model: str, sizes: KMeans, numbers: list[int], seed: int, out_path: str, device: str) -> dict:
    """Z-score, k-means and artefact from the files of features; returns the step's facts."""
    shards = [load(store.get(_file(out_path, n)))["features"] for n in numbers]
    mean_D, std_D = zscore(shards)
    found = kmeans.fit([((x - mean_D) / std_D).to(device) for x in shards], sizes.k, rng.derive(seed, "kmeans"),
                       sizes.iterations, sizes.restarts)
    frames, used = sum(map(len, shards)), int((found.counts > 0).sum())
    encoder, _ = load_encoder(model)
    facts = {"k": sizes.k, "layer": sizes.layer, "frames": frames, "inertia": found.inertia / frames,
             "explained": 1.0 - found.inertia / (frames * int((std_D > MIN_STD).sum().clamp_min(1))),
             "iterations": found.iterations, "used_clusters": used, "dead_clusters": sizes.k - used,
             "entropy": kmeans.entropy(found.counts)}
    save_semantic(out_path, encoder, sizes.layer, mean_D, std_D, found.centroids, {"frames": frames, "seed": seed})
    return facts


def zscore(shards: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """mean_D, std_D (float32) over all frames; float64 sums in shard order, two passes."""
    n = sum(map(len, shards))
    mean = sum(x.double().sum(0) for x in shards) / n
    std = (sum((x.double() - mean).square().sum(0) for x in shards) / n).sqrt()
    return mean.float(), std.clamp_min(MIN_STD).float()


def _quotas(frames: list[int], most: int) -> list[int]:
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


def _frames(clip: Clip) -> int:
    return padded_samples(clip.samples) // SEMANTIC_HOP


def _file(out_path: str, shard: int) -> str:
    return store.join(out_path, "features", f"{shard:05d}.safetensors")
