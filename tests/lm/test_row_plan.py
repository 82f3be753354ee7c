"""The plan of packed rows: complete, reproducible, local, and the same whatever asks for it."""

from __future__ import annotations

import numpy as np
import pytest

from audiolm.lm.row_plan import LANES, PackingPlan

COSTS = np.random.default_rng(0).integers(20, 700, 400).astype(np.int32)
FIRSTS = np.arange(0, 401, 10)  # 40 shards of 10 clips
STRIDE = 30


def plan(batch=8, seed=0, costs=COSTS, firsts=FIRSTS, stride=STRIDE, **sizes):
    return PackingPlan(costs, firsts, stride, batch, seed, **sizes)


@pytest.mark.parametrize("batch, stride", [(1, 30), (7, 30), (8, 30), (200, 30), (3, 900_000), (8, 30_000)])
def test_every_row_of_every_epoch_has_its_turn_once(batch, stride):
    p = plan(batch, stride=stride)
    steps = 3 * p.rows // batch + 2 * p._lap
    seen = [p.address(s, i) for s in range(steps) for i in range(batch)]
    assert len(set(seen)) == len(seen)
    for epoch in range(2):
        windows = -(-40 // p.window_shards)
        rows = [len(p.window(epoch, w).row_starts) for w in range(windows) if any(x[:2] == (epoch, w) for x in seen)]
        assert sum(rows) == p.rows == sum(x[0] == epoch for x in seen)


def test_rows_begin_at_even_distances_over_all_clips_of_the_window():
    p = plan()
    for epoch in range(3):
        for w in range(40 // p.window_shards):
            ring = p.window(epoch, w)
            assert sorted(ring.clips) == sorted(c for s in ring.shards for c in range(10 * s, 10 * s + 10))
            places = np.sort([ring.ends[at] - p.costs[ring.clips[at]] + into for at, into in
                              map(ring.start_of, range(len(ring.row_starts)))])
            gaps = np.diff([*places, places[0] + ring.ends[-1]])
            assert gaps.max() - gaps.min() <= 1 and abs(gaps.mean() / STRIDE - 1) < 0.02


def test_epochs_and_seeds_differ_and_a_process_does_not():
    p, same, other = plan(), plan(), plan(seed=1)
    assert [p.address(s, i) for s in (900, 3) for i in range(8)] == [same.address(s, i) for s in (900, 3) for i in range(8)]
    first, again = p.window(2, 1), same.window(2, 1)
    assert np.array_equal(first.clips, again.clips) and np.array_equal(first.row_starts, again.row_starts)
    assert not np.array_equal(first.row_starts, other.window(2, 1).row_starts)
    assert set(p.window(0, 0).shards) != set(p.window(1, 0).shards)


def test_a_worker_needs_its_share_of_the_shards():
    p = plan(batch=8)
    assert p.lanes == 8
    for rank in range(4):
        rows = range(2 * rank, 2 * rank + 2)
        windows = {p.address(s, i)[:2] for s in range(p._lap) for i in rows}
        assert len(windows) <= 20 // 4 + 2  # of 20 windows


def test_lanes_follow_from_the_memory_their_windows_take():
    assert plan(batch=500).lanes == LANES
    assert plan(batch=500, shard_bytes=4e6).lanes == 12
    assert plan(batch=500, shard_bytes=4e9).lanes == 1


def test_memory_does_not_grow_with_the_steps_taken():
    p = plan()
    for step in range(0, 3 * p._lap):
        p.window(*p.address(step, step % 8)[:2])
    assert p.window.cache_info().currsize <= 4 * p.lanes and p.epoch.cache_info().currsize <= 3


def test_a_corpus_shorter_than_a_row_is_one_row():
    p = plan(4, costs=np.array([5, 9], np.int32), firsts=np.array([0, 1, 2]), stride=1000)
    assert p.rows == 1 and {p.address(s, i) for s in range(2) for i in range(4)} == {(e, 0, 0) for e in range(8)}
    assert {p.window(e, 0).start_of(0) for e in range(60)} > {(0, 0), (1, 0)}
    with pytest.raises(ValueError, match="outside the global batch of 4"):
        p.address(0, 4)
