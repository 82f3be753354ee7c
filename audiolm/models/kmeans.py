"""k-means in torch: k-means++ (Arthur and Vassilvitskii 2007), then Lloyd or minibatches, the same result for a seed.

Points come as shards, tensors x_ND float32; neighbouring shards make a part.  Sums are float64, in chunks of fixed size
and in the order of shards and parts, so that neither the cutting of the work nor a device's atomics can change a
centroid.  An empty cluster restarts at the point farthest from its own centroid.
Legend: N points, D dimensions, K clusters.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from audiolm import rng
from audiolm.models.precision import no_tf32

CHUNK = 65_536  # rows at once: bounds memory, and is part of the order of summation
PART = 131_072  # rows of a part (0.5 GB at D = 1024) unless one shard has more; part of the order of summation too
INIT_ROWS_PER_K = 256  # k-means++ reads each of its rows once per centroid: a sample of this many x K is enough
BATCH_ROWS_PER_K = 16  # of a minibatch
EQUAL = 1e-6  # of both points' squared lengths: a squared distance below it is rounding
SETTLED = 1e-3  # minibatches end with a pass that lowers the inertia by less than this share

Part = list[torch.Tensor]


@dataclass(frozen=True)
class KMeans:
    """A finished fit."""

    centroids: torch.Tensor  # (K, D) float32
    inertia: float  # sum of squared distances to the nearest centroid
    counts: torch.Tensor  # (K,) int64, points of each cluster
    iterations: int  # of the best restart; passes over the points with minibatches


def assign(x_ND: torch.Tensor, centroids_KD: torch.Tensor) -> torch.Tensor:
    """labels_N (int64): the nearest centroid, Euclidean, in float32; the lowest index wins a tie."""
    with no_tf32(), torch.autocast(x_ND.device.type, enabled=False):
        c = centroids_KD.float()
        # |x - c|^2 / 2 without |x|^2 / 2, which is the same for all centroids: one matrix product
        offset_K = 0.5 * c.square().sum(-1)
        return torch.cat([(offset_K - x.float() @ c.T).argmin(-1) for x in x_ND.split(CHUNK)])


def margins(x_ND: torch.Tensor, centroids_KD: torch.Tensor) -> torch.Tensor:
    """margin_N in 0..1: the second nearest centroid's distance less the nearest's, over the former; 0 is a tie."""
    d = torch.cdist(x_ND.double(), centroids_KD.double()).topk(2, dim=-1, largest=False).values
    return ((d[:, 1] - d[:, 0]) / d[:, 1].clamp_min(1e-12)).float()


def parts(shards: Sequence[torch.Tensor]) -> list[Part]:
    """Neighbouring shards, up to PART rows together."""
    groups: list[Part] = []
    rows = 0
    for x_ND in shards:
        if not groups or rows + len(x_ND) > PART:
            groups.append([])
            rows = 0
        groups[-1].append(x_ND)
        rows += len(x_ND)
    return groups


def partial_sums(part: Part, centroids_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float, bytes]:
    """One part's share of an iteration, on the CPU: sums_KD (float64), counts_K (int64), inertia, a digest of the labels.

    float64, because a cluster's sum of millions of float32 points would lose the last of them.
    """
    c = centroids_KD.to(part[0].device)
    sums = torch.zeros(c.shape, dtype=torch.float64, device=c.device)
    counts = torch.zeros(len(c), dtype=torch.int64, device=c.device)
    inertias, digest = [], hashlib.blake2b(digest_size=16)
    for x_ND in part:
        distances = []
        for x in x_ND.split(CHUNK):
            label = assign(x, c)
            order, count = label.argsort(stable=True), torch.bincount(label, minlength=len(c))
            used = count.nonzero().flatten()  # a small shard touches few rows of the sums
            # Points sorted by label, then summed by segment: a fixed order of addition, where a GPU's scatter has none.
            sums[used] += torch.segment_reduce(x[order].double(), "sum", lengths=count[used])
            counts += count
            distances.append((x - c[label]).square().sum(-1))
            # The driver stops when no label changes: 16 bytes a part show it, instead of all labels.
            digest.update(label.cpu().numpy().tobytes())
        inertias.append(float(torch.cat(distances).double().sum()))
    return sums.cpu(), counts.cpu(), sum(inertias), digest.digest()


def farthest(part: Part, centroids_KD: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `most` points (fewer in a small part) farthest from their centroids, on the CPU: squared distances, rows."""
    c = centroids_KD.to(part[0].device)
    flat = torch.cat([(x - c[assign(x, c)]).square().sum(-1) for x_ND in part for x in x_ND.split(CHUNK)])
    # a stable sort, so that ties go to the earlier point on every device; rows are read in order, then put back
    far, at = (v[:most].cpu() for v in flat.sort(descending=True, stable=True))
    rows, back = at.sort()
    return far, take(part, rows)[back.argsort()].cpu()


def take(shards: Iterable[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """The points at sorted `rows` of all shards together, read one shard at a time."""
    points, at = [], 0
    for x in shards:
        low, high = torch.searchsorted(rows, torch.tensor([at, at + len(x)])).tolist()
        points.append(x[(rows[low:high] - at).to(x.device)])
        at += len(x)
    return torch.cat(points)


def plus_plus(x_ND: torch.Tensor, k: int, generator: torch.Generator) -> torch.Tensor | None:
    """(k, D) rows, each drawn with probability proportional to its squared distance to the rows drawn before it.

    None where fewer than k rows differ.
    """
    picks = [int(torch.randint(len(x_ND), (1,), generator=generator))]
    nearest = torch.full((len(x_ND),), math.inf, device=x_ND.device)
    size_N = x_ND.square().sum(-1)
    while len(picks) < k:
        point_D, size = x_ND[picks[-1]], size_N[picks[-1]]
        with no_tf32():  # |x - c|^2 by one product, which reads the points once
            away_N = torch.addmv(size_N, x_ND, point_D, alpha=-2) + size
        nearest = torch.minimum(nearest, torch.where(away_N > EQUAL * (size_N + size), away_N, 0.0))
        total = nearest.double().cumsum(0)  # float64: the inverse of the distribution function needs small steps
        if total[-1] <= 0:
            return None
        at = torch.rand(1, generator=generator, dtype=torch.float64).to(total.device) * total[-1]
        pick = int(torch.searchsorted(total, at, right=True).clamp(max=len(x_ND) - 1))
        picks.append(pick if nearest[pick] > 0 else int(nearest.argmax()))  # rounding at the end of the sum
    return x_ND[picks].clone()


def starts(shards: Sequence[torch.Tensor], k: int, seed: int, restarts: int) -> list[torch.Tensor]:
    """centroids_KD of each restart, by k-means++ on a sample of the points.

    Raises ValueError where fewer than k points of the sample differ.
    """
    generator, n, centroids = torch.Generator().manual_seed(seed), sum(map(len, shards)), []
    for _ in range(restarts):
        # k-means++ passes over its points k times, so it gets a sample
        some = min(n, INIT_ROWS_PER_K * k)
        points = take(shards, torch.randperm(n, generator=generator)[:some].sort().values if some < n else torch.arange(n))
        start = plus_plus(points, k, generator) if some >= k else None
        if start is None:
            raise ValueError(f"k-means with k = {k} needs that many distinct points, got {len(points.unique(dim=0))} among "
                             f"{some}; lower k, or fit on more or less uniform data")
        centroids.append(start.cpu())
    return centroids


def _reseeded(groups: list[Part], means: torch.Tensor, centroids: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """`means` with each empty cluster at the farthest point not taken yet; fewer where all points sit on centroids."""
    empty = (counts == 0).nonzero().flatten()
    if not len(empty):
        return means
    far_points = [farthest(part, centroids, len(empty)) for part in groups]
    far, order = torch.cat([f[0] for f in far_points]).sort(descending=True, stable=True)
    # a distance of 0 means that all points sit on centroids: such a cluster stays empty
    order = order[:len(empty)][far[:len(empty)] > 0]
    means = means.clone()
    means[empty[:len(order)]] = torch.cat([f[1] for f in far_points])[order].to(means.dtype)
    return means


def _lloyd(groups: list[Part], centroids: torch.Tensor, iterations: int, report: Callable[[int, float], None],
           moved: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None) -> KMeans:
    """Iterations until no label changes. The last pass only measures: counts and inertia are those of its centroids.

    `moved(sums_KD, counts_K, centroids_KD)` gives the next centroids; by default means, and empty clusters are seeded anew.
    """
    def means(sums: torch.Tensor, counts: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        found = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], old.double())
        return _reseeded(groups, found, old, counts).float()

    before = None
    for done in range(iterations + 1):
        shares = [partial_sums(part, centroids) for part in groups]
        sums, counts, inertia = (sum(share[i] for share in shares) for i in range(3))
        digests = [share[3] for share in shares]
        report(done, inertia)
        if done == iterations or digests == before:
            break  # settled (an empty cluster that could not be seeded stays), or out of iterations
        before = digests
        centroids = (moved or means)(sums, counts, centroids)
    return KMeans(centroids, inertia, counts, done)


def adapt(shards: Sequence[torch.Tensor], centroids_KD: torch.Tensor, frames: float, iterations: int,
          on_iteration: Callable[[int, float], None] = lambda *_: None) -> KMeans:
    """Centroids moved towards the points by MAP (Gauvain and Lee 1994): each old one counts as `frames` points in its mean.

    So one without points stays, and each keeps its number.  Raises ValueError where a value is not finite.
    """
    shards = [x.float() for x in shards if len(x)]
    check_finite(shards, range(len(shards)))
    old_KD = centroids_KD.double()

    def moved(sums_KD: torch.Tensor, counts_K: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        counts_K1 = counts_K[:, None]
        return torch.where(counts_K1 > 0, (sums_KD + frames * old_KD) / (counts_K1 + frames).clamp_min(1e-9), old_KD).float()

    return _lloyd(parts(shards), centroids_KD.float(), iterations, on_iteration, moved)


def minibatches(part: Part, centroids_KD: torch.Tensor, seen_K: torch.Tensor, seed: int,
                index: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """One pass over a part in drawn order: centroids_KD and points seen_K (both float64) after it, counts_K, inertia."""
    x_ND, c, seen = torch.cat(part), centroids_KD.clone(), seen_K.clone()
    total, inertia = torch.zeros(len(c), dtype=torch.int64), 0.0
    order = torch.from_numpy(rng.generator(seed, "minibatch", *index).permutation(len(x_ND)))
    for rows in order.split(BATCH_ROWS_PER_K * len(c)):
        sums, counts, share, _ = partial_sums([x_ND[rows.to(x_ND.device)]], c.float())
        seen += counts
        c += (sums - counts[:, None] * c) / seen.clamp_min(1e-9)[:, None]  # the mean of all points seen
        total, inertia = total + counts, inertia + share
    return c, seen, total, inertia


def _minibatch(groups: list[Part], centroids: torch.Tensor, iterations: int, seed: int, run: int,
               report: Callable[[int, float], None]) -> KMeans:
    """Passes of minibatches (Sculley 2010), part after part in drawn order, until a pass brings little.

    The result is measured by a pass over all points, as Lloyd's is.
    """
    c, seen, before = centroids.double(), torch.zeros(len(centroids), dtype=torch.float64), math.inf
    for done in range(1, iterations + 1):
        counts, inertia = torch.zeros(len(c), dtype=torch.int64), 0.0
        for part in rng.generator(seed, "minibatch-parts", run, done).permutation(len(groups)).tolist():
            # one part after the other: each batch starts from the centroids of the one before
            c, seen, share, part_inertia = minibatches(groups[part], c, seen, seed, (run, done, part))
            counts, inertia = counts + share, inertia + part_inertia
        report(done, inertia)
        empty = counts == 0
        c = _reseeded(groups, c, c.float(), counts)
        if inertia > (1 - SETTLED) * before and not empty.any():
            break
        # Early points were assigned to poor centroids, so they count half; a reseeded cluster starts anew.
        before, seen = inertia, (seen / 2).masked_fill(empty, 0)
    return replace(_lloyd(groups, c.float(), 0, lambda *_: None), iterations=done)


def fit(shards: Sequence[torch.Tensor], k: int, seed: int, iterations: int = 100, restarts: int = 1,
        method: str = "lloyd", on_iteration: Callable[[int, int, float], None] = lambda *_: None) -> KMeans:
    """The best of `restarts` runs by inertia, by `method` lloyd or minibatch.

    `on_iteration(run, iteration, inertia)` is called each iteration; `iterations` are passes over the points in both methods.
    Raises ValueError where a value is not finite or fewer than k points differ.
    """
    shards = [x.float() for x in shards if len(x)]
    if not shards:
        raise ValueError(f"k-means with k = {k} got no points")
    check_finite(shards, range(len(shards)))
    groups = parts(shards)
    runs = [_minibatch(groups, start, iterations, seed, run, partial(on_iteration, run)) if method == "minibatch"
            else _lloyd(groups, start, iterations, partial(on_iteration, run))
            for run, start in enumerate(starts(shards, k, seed, restarts))]
    return min(runs, key=lambda run: run.inertia)  # the first of equals


def check_finite(shards: Sequence[torch.Tensor], numbers: Sequence[int]) -> None:
    """Raises ValueError naming the number of a shard with a value that is not finite."""
    for i, x in zip(numbers, shards, strict=True):
        if not torch.isfinite(x).all():
            raise ValueError(f"k-means got values that are not finite in shard {i}; the features before it are broken")
