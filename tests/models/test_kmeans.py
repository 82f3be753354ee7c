"""k-means: against oracles, deterministic in every order of work, empty clusters, minibatches, clear errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from audiolm.models import kmeans
from audiolm.models.entropy import entropy


def blobs(k: int = 6, n: int = 60, d: int = 5, spread: float = 0.2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    centres = 4 * torch.randn(k, d, generator=generator)
    return (centres[:, None] + spread * torch.randn(k, n, d, generator=generator)).flatten(0, 1)


def plain_lloyd(x: np.ndarray, c: np.ndarray, iterations: int) -> np.ndarray:
    for _ in range(iterations):
        label = ((x[:, None] - c[None]) ** 2).sum(-1).argmin(1)
        c = np.stack([x[label == j].mean(0) for j in range(len(c))])
    return c


def fit_from(monkeypatch, init_KD: torch.Tensor, shards: list, iterations: int, method: str = "lloyd") -> kmeans.KMeans:
    """One run from given centroids in place of k-means++."""
    with monkeypatch.context() as patch:
        patch.setattr(kmeans, "starts", lambda *_: [init_KD])
        return kmeans.fit(shards, len(init_KD), 0, iterations, method=method)


def test_lloyd_equals_a_plain_implementation_and_sklearn(monkeypatch):
    x = blobs(spread=1.5)
    init = x[::60][:6].clone()
    result = fit_from(monkeypatch, init, [x], 300)
    plain = plain_lloyd(x.double().numpy(), init.double().numpy(), 100)
    assert np.allclose(result.centroids.numpy(), plain, atol=1e-5)
    sklearn = pytest.importorskip("sklearn.cluster")
    theirs = sklearn.KMeans(6, init=init.numpy(), n_init=1, max_iter=300, tol=0, algorithm="lloyd").fit(x.numpy())
    assert np.allclose(result.centroids.numpy(), theirs.cluster_centers_, atol=1e-5)
    assert result.inertia == pytest.approx(theirs.inertia_, rel=1e-5)
    assert np.array_equal(np.bincount(theirs.labels_, minlength=6), result.counts.numpy())


def test_same_seed_same_bits_and_shards_do_not_matter_much():
    x = blobs(spread=1.0)
    one, two = (kmeans.fit([x], 8, 3, restarts=2) for _ in range(2))
    assert torch.equal(one.centroids, two.centroids) and one.inertia == two.inertia
    cut = kmeans.fit(list(x.split(70)), 8, 3, restarts=2)
    assert torch.allclose(one.centroids, cut.centroids, atol=1e-5)


def test_plus_plus_finds_separated_clusters_and_restarts_never_hurt():
    x = blobs()
    result = kmeans.fit([x], 6, 0, restarts=4)
    assert sorted(result.counts.tolist()) == [60] * 6
    once = kmeans.fit([x], 9, 0, iterations=3).inertia
    assert kmeans.fit([x], 9, 0, iterations=3, restarts=5).inertia <= once


def test_empty_cluster_is_seeded_anew(monkeypatch):
    x = blobs(k=3)
    init = torch.cat([x[:1], x[60:61], torch.full((1, x.shape[1]), 1e4)])  # the third gets no point
    result = fit_from(monkeypatch, init, [x[:100], x[100:]], 100)
    assert sorted(result.counts.tolist()) == [60, 60, 60]


def test_plus_plus_spreads_where_a_uniform_draw_does_not():
    x = (100 * torch.eye(6)).repeat_interleave(50, 0) + 0.1 * torch.randn(300, 6, generator=torch.Generator().manual_seed(2))
    for seed in range(10):
        result = kmeans.plus_plus(x, 6, torch.Generator().manual_seed(seed))
        assert sorted(torch.cdist(result, x).argmin(1).div(50, rounding_mode="floor").tolist()) == list(range(6))
    uniform = [x[torch.randperm(300, generator=torch.Generator().manual_seed(seed))[:6]] for seed in range(10)]
    assert any(torch.pdist(u).min() < 5 for u in uniform)  # two starts in one blob


def test_starts_read_a_sample_only_and_differ_between_restarts(monkeypatch):
    monkeypatch.setattr(kmeans, "INIT_ROWS_PER_K", 5)
    x, asked, take = blobs(spread=1.0), [], kmeans.take

    def recorded(shards, rows):
        asked.append(rows)
        return take(shards, rows)

    monkeypatch.setattr(kmeans, "take", recorded)
    one, two = kmeans.starts(x.split(41), 7, 0, 2)
    assert [len(rows) for rows in asked] == [35, 35] and not torch.equal(one, two)
    assert (torch.cdist(one, x[asked[0]]).min(1).values < 1e-5).all()
    assert torch.equal(kmeans.starts(x.split(41), 7, 0, 1)[0], one)


@pytest.mark.parametrize("method", ["lloyd", "minibatch"])
def test_iterations_of_every_restart_are_reported_and_parts_change_little(monkeypatch, method):
    monkeypatch.setattr(kmeans, "PART", 90)
    shards = list(blobs(spread=1.0).split(40))
    assert len(kmeans.parts(shards)) == 5  # of two shards each, and one
    seen = []
    here = kmeans.fit(shards, 8, 3, restarts=2, method=method, on_iteration=lambda *at: seen.append(at))
    assert {run for run, *_ in seen} == {0, 1} and seen[-1][2] < seen[0][2]
    whole = kmeans.fit([torch.cat(shards)], 8, 3, restarts=2, method=method)
    assert whole.inertia == pytest.approx(here.inertia, rel=1e-5 if method == "lloyd" else 0.05)


def test_parts_are_neighbours_of_bounded_size(monkeypatch):
    monkeypatch.setattr(kmeans, "PART", 10)
    shards = [torch.full((n, 1), float(i)) for i, n in enumerate([4, 6, 1, 12, 9, 1, 1])]
    assert [[int(x[0]) for x in part] for part in kmeans.parts(shards)] == [[0, 1], [2], [3], [4, 5], [6]]


@pytest.mark.parametrize("spread", [0.2, 1.0, 3.0])
def test_minibatches_come_within_five_per_cent_of_lloyd(spread):
    x = blobs(k=20, n=200, d=8, spread=spread)
    lloyd = kmeans.fit([x], 20, 0, restarts=3)
    mini = kmeans.fit([x], 20, 0, restarts=3, method="minibatch")
    assert mini.inertia <= 1.05 * lloyd.inertia
    assert mini.counts.sum() == len(x) and mini.iterations < 40
    label = kmeans.assign(x, mini.centroids)  # what it reports is of its own centroids
    assert torch.equal(torch.bincount(label, minlength=20), mini.counts)
    assert mini.inertia == pytest.approx(float((x - mini.centroids[label]).square().sum()), rel=1e-5)


@pytest.mark.parametrize("method", ["lloyd", "minibatch"])
def test_several_empty_clusters_over_parts_are_seeded_by_distance(monkeypatch, method):
    monkeypatch.setattr(kmeans, "PART", 70)
    shards = list(blobs(k=6).split(35))
    init = torch.cat([shards[0][:1], torch.full((5, 5), 1e4) + torch.arange(5)[:, None]])  # five without a point
    one, two = (fit_from(monkeypatch, init, s, 100, method) for s in (shards, [x.clone() for x in shards]))
    assert (one.counts > 0).all() and torch.equal(one.centroids, two.centroids)


def test_farthest_points_of_a_part_in_order_of_distance():
    x = torch.tensor([[0.0], [3.0], [9.0], [3.0], [-7.0]])
    far, rows = kmeans.farthest([x[:2], x[2:]], torch.tensor([[0.0]]), 4)
    assert far.tolist() == [81, 49, 9, 9] and rows.flatten().tolist() == [9, -7, 3, 3]


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


def test_adapted_centroids_are_means_with_the_old_place_as_so_many_points():
    x = torch.tensor([[1.0], [2.0], [9.0]])
    old = torch.tensor([[0.0], [10.0], [50.0]])
    found = kmeans.adapt([x[:1], x[1:]], old, frames=2.0, iterations=1)
    assert found.centroids.tolist() == [[(1 + 2) / 4], [pytest.approx((9 + 2 * 10) / 3)], [50.0]]
    assert found.counts.tolist() == [2, 1, 0]
    assert kmeans.adapt([x], old, frames=0.0, iterations=5).centroids.tolist() == [[1.5], [9.0], [50.0]]
    assert torch.equal(kmeans.adapt([x], old, frames=2.0, iterations=0).centroids, old)
    with pytest.raises(ValueError, match="not finite in shard 1"):
        kmeans.adapt([x, x * torch.nan], old, 1.0, 1)


def test_entropy_of_use():
    assert float(entropy(torch.tensor([5, 5, 0, 0]))) == pytest.approx(np.log(2))
    assert float(entropy(torch.tensor([9, 0]))) == 0
