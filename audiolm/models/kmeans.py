"""k-means in torch: k-means++ (Arthur and Vassilvitskii 2007), then full Lloyd iterations, the same result for a seed.

Points come as shards, a list of x_ND float32; sums are float64, taken in chunks of fixed size in shard order, so that
neither the number of workers nor the device's atomics can change a centroid.  An empty cluster is seeded anew with the
point farthest from its own centroid.  Legend: N points, D dimensions, K clusters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

CHUNK = 65_536  # rows at once: bounds memory, and is part of the order of summation
INIT_ROWS_PER_K = 256  # k-means++ reads each of its rows once per centroid: a sample of this many x K is enough


@dataclass(frozen=True)
class KMeans:
    centroids: torch.Tensor  # (K, D) float32
    inertia: float  # sum of squared distances to the nearest centroid
    counts: torch.Tensor  # (K,) int64, points of each cluster
    iterations: int  # of the best restart


@contextmanager
def _exact_matmul(device: torch.device) -> Iterator[None]:
    """float32 products in float32: no TF32 and no autocast, whatever the training run chose."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def assign(x_ND: torch.Tensor, centroids_KD: torch.Tensor) -> torch.Tensor:
    """labels_N (int64): the nearest centroid, Euclidean, in float32; the lowest index wins a tie."""
    with _exact_matmul(x_ND.device):
        c = centroids_KD.float()
        offset_K = 0.5 * c.square().sum(-1)
        return torch.cat([(offset_K - x.float() @ c.T).argmin(-1) for x in x_ND.split(CHUNK)])


def margins(x_ND: torch.Tensor, centroids_KD: torch.Tensor) -> torch.Tensor:
    """margin_N in 0..1: how much farther the second nearest centroid is, as a share of its distance; 0 is a tie."""
    d = torch.cdist(x_ND.double(), centroids_KD.double()).topk(2, dim=-1, largest=False).values
    return ((d[:, 1] - d[:, 0]) / d[:, 1].clamp_min(1e-12)).float()


def partial_sums(x_ND: torch.Tensor, centroids_KD: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """One shard's share of a Lloyd iteration: sums_KD (float64), counts_K (int64), labels_N, squared distance_N."""
    k, d = centroids_KD.shape
    sums = torch.zeros(k, d, dtype=torch.float64, device=x_ND.device)
    counts = torch.zeros(k, dtype=torch.int64, device=x_ND.device)
    labels, distances = [], []
    for x in x_ND.split(CHUNK):
        label = assign(x, centroids_KD)
        order, count = label.argsort(stable=True), torch.bincount(label, minlength=k)
        sums += torch.segment_reduce(x[order].double(), "sum", lengths=count)  # no atomics: a fixed order of addition
        counts += count
        labels.append(label)
        distances.append((x - centroids_KD[label]).square().sum(-1))
    return sums, counts, torch.cat(labels), torch.cat(distances)


def plus_plus(x_ND: torch.Tensor, k: int, generator: torch.Generator) -> torch.Tensor | None:
    """k rows drawn by squared distance to those drawn before: (k, D), or None where fewer than k rows differ."""
    picks = [int(torch.randint(len(x_ND), (1,), generator=generator))]
    nearest = torch.full((len(x_ND),), math.inf, device=x_ND.device)
    while len(picks) < k:
        nearest = torch.minimum(nearest, (x_ND - x_ND[picks[-1]]).square().sum(-1))
        total = nearest.double().cumsum(0)
        if total[-1] <= 0:
            return None
        at = torch.rand(1, generator=generator, dtype=torch.float64).to(total.device) * total[-1]
        pick = int(torch.searchsorted(total, at, right=True).clamp(max=len(x_ND) - 1))
        picks.append(pick if nearest[pick] > 0 else int(nearest.argmax()))  # rounding at the end of the sum
    return x_ND[picks].clone()


def _initial(points: torch.Tensor, k: int, generator: torch.Generator) -> torch.Tensor:
    some = INIT_ROWS_PER_K * k
    if len(points) > some:
        rows = torch.randperm(len(points), generator=generator)[:some].sort().values
        found = plus_plus(points[rows.to(points.device)], k, generator)
        if found is not None:
            return found
    found = plus_plus(points, k, generator) if len(points) >= k else None
    if found is None:
        distinct = len(points.unique(dim=0))
        raise ValueError(f"k-means with k = {k} needs that many distinct points, got {distinct} among {len(points)}; "
                         "lower k, or fit on more or less uniform data")
    return found


def _reseed(shards: Sequence[torch.Tensor], means: torch.Tensor, counts: torch.Tensor,
            distances: list[torch.Tensor]) -> None:
    """Moves each empty cluster to the farthest point not taken yet (in place)."""
    flat = torch.cat(distances).clone()
    ends = torch.tensor([len(x) for x in shards]).cumsum(0)
    for cluster in (counts == 0).nonzero().flatten().tolist():
        far = int(flat.argmax())
        if flat[far] <= 0:
            return  # every point sits on a centroid: nothing left to give away
        shard = int(torch.searchsorted(ends, far, right=True))
        means[cluster] = shards[shard][far - (int(ends[shard - 1]) if shard else 0)].to(means.dtype)
        flat[far] = 0


def _lloyd(shards: Sequence[torch.Tensor], centroids: torch.Tensor, iterations: int) -> KMeans:
    labels = None
    for done in range(iterations + 1):
        parts = [partial_sums(x, centroids) for x in shards]
        sums, counts = parts[0][0], parts[0][1]
        for s, c, *_ in parts[1:]:
            sums, counts = sums + s, counts + c
        now = torch.cat([p[2] for p in parts])
        if done == iterations or (labels is not None and torch.equal(labels, now)):
            break  # settled (an empty cluster that could not be seeded stays), or out of iterations
        labels = now
        means = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centroids.double())
        if (counts == 0).any():
            _reseed(shards, means, counts, [p[3] for p in parts])
        centroids = means.float()
    inertia = sum(float(p[3].double().sum()) for p in parts)
    return KMeans(centroids.cpu(), inertia, counts.cpu(), done)


def fit(shards: Sequence[torch.Tensor], k: int, seed: int, iterations: int = 100, restarts: int = 1,
        init_KD: torch.Tensor | None = None) -> KMeans:
    """The best of `restarts` runs by inertia. With init_KD there is one run, from those centroids.

    Raises ValueError where a value is not finite or fewer than k points differ.
    """
    shards = [x.float() for x in shards if len(x)]
    if not shards:
        raise ValueError(f"k-means with k = {k} got no points")
    for i, x in enumerate(shards):
        if not torch.isfinite(x).all():
            raise ValueError(f"k-means got values that are not finite in shard {i}; the features before it are broken")
    if init_KD is not None:
        return _lloyd(shards, init_KD.float().to(shards[0].device), iterations)
    generator = torch.Generator().manual_seed(seed)
    points, best = torch.cat(shards), None
    for _ in range(restarts):
        run = _lloyd(shards, _initial(points, k, generator), iterations)
        best = run if best is None or run.inertia < best.inertia else best
    return best


def entropy(counts_K: torch.Tensor) -> float:
    """Of the shares of use, in nats; exp of it is the perplexity."""
    p = counts_K.double() / counts_K.sum().clamp_min(1)
    return max(0.0, -float((p * p.clamp_min(1e-30).log()).sum()))
