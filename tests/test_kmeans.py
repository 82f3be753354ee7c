"""k-means: against an oracle, deterministic, empty clusters, clear errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from audiolm.models import kmeans


def blobs(k: int = 6, n: int = 60, d: int = 5, spread: float = 0.2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    centres = 4 * torch.randn(k, d, generator=generator)
    return (centres[:, None] + spread * torch.randn(k, n, d, generator=generator)).flatten(0, 1)


def plain_lloyd(x: np.ndarray, c: np.ndarray, iterations: int) -> np.ndarray:
    for _ in range(iterations):
        label = ((x[:, None] - c[None]) ** 2).sum(-1).argmin(1)
        c = np.stack([x[label == j].mean(0) for j in range(len(c))])
    return c


def test_lloyd_equals_a_plain_implementation_and_sklearn():
    x = blobs(spread=1.5)
    init = x[::60][:6].clone()
    found = kmeans.fit([x], 6, 0, iterations=300, init_KD=init)
    plain = plain_lloyd(x.double().numpy(), init.double().numpy(), 100)
    assert np.allclose(found.centroids.numpy(), plain, atol=1e-5)
    sklearn = pytest.importorskip("sklearn.cluster")
    theirs = sklearn.KMeans(6, init=init.numpy(), n_init=1, max_iter=300, tol=0, algorithm="lloyd").fit(x.numpy())
    assert np.allclose(found.centroids.numpy(), theirs.cluster_centers_, atol=1e-5)
    assert found.inertia == pytest.approx(theirs.inertia_, rel=1e-5)
    assert np.array_equal(np.bincount(theirs.labels_, minlength=6), found.counts.numpy())


def test_same_seed_same_bits_and_shards_do_not_matter_much():
    x = blobs(spread=1.0)
    one, two = (kmeans.fit([x], 8, 3, restarts=2) for _ in range(2))
    assert torch.equal(one.centroids, two.centroids) and one.inertia == two.inertia
    cut = kmeans.fit(list(x.split(70)), 8, 3, restarts=2)
    assert torch.allclose(one.centroids, cut.centroids, atol=1e-5)


def test_plus_plus_finds_separated_clusters_and_restarts_never_hurt():
    x = blobs()
    found = kmeans.fit([x], 6, 0, restarts=4)
    assert sorted(found.counts.tolist()) == [60] * 6
    once = kmeans.fit([x], 9, 0, iterations=3).inertia
    assert kmeans.fit([x], 9, 0, iterations=3, restarts=5).inertia <= once


def test_empty_cluster_is_seeded_anew():
    x = blobs(k=3)
    init = torch.cat([x[:1], x[60:61], torch.full((1, x.shape[1]), 1e4)])  # the third gets no point
    found = kmeans.fit([x[:100], x[100:]], 3, 0, init_KD=init)
    assert sorted(found.counts.tolist()) == [60, 60, 60]


def test_assign_is_the_nearest_centroid_across_chunks(monkeypatch):
    monkeypatch.setattr(kmeans, "CHUNK", 7)
    x, c = blobs(spread=1.0), torch.randn(11, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kmeans.assign(x, c), torch.cdist(x.double(), c.double()).argmin(-1))


def test_too_few_distinct_points_and_broken_values_are_refused():
    x = torch.randn(3, 4).repeat(50, 1)
    with pytest.raises(ValueError, match="k = 4 needs .* got 3 among 150"):
        kmeans.fit([x], 4, 0)
    with pytest.raises(ValueError, match="got no points"):
        kmeans.fit([], 4, 0)
    x[5, 1] = float("nan")
    with pytest.raises(ValueError, match="not finite in shard 0"):
        kmeans.fit([x], 2, 0)


def test_entropy_of_use():
    assert kmeans.entropy(torch.tensor([5, 5, 0, 0])) == pytest.approx(np.log(2))
    assert kmeans.entropy(torch.tensor([9, 0])) == 0
