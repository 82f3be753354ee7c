"""The shard cache: bounded, ahead of its use, and never an obstacle."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from audiolm.lm.shard_cache import ShardCache

SIZES = np.array([3, 4, 5, 6, 7])


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_what_is_held_is_bounded_and_what_was_used_last_stays():
    read = []
    cache = ShardCache(lambda k: read.append(k) or k, SIZES, 12)
    for k in (0, 1, 2, 0, 3, 0, 4, 1, 2, 0):
        assert cache[k] == k and cache.bytes <= 12
        assert cache.bytes == sum(SIZES[list(cache._held)])
    assert read == [0, 1, 2, 3, 4, 1, 2, 0]  # 0 was in use while 1, 2 and 3 went


def test_what_fits_is_read_before_it_is_asked_for():
    read = []
    cache = ShardCache(lambda k: read.append(k) or k, SIZES, 12)
    cache.expect([0, 1], [2, 3])
    until(lambda: len(read) == 3)
    assert sorted(read) == [0, 1, 2] and cache.bytes == 12
    cache.expect([2], [3])  # the others are done with
    until(lambda: 3 in read)
    assert set(cache._held) == {2, 3} and cache[2] == 2 and cache[3] == 3 and len(read) == 4


def test_one_shard_is_held_where_none_fits():
    cache = ShardCache(lambda k: k, SIZES, 0)
    cache.expect([0, 1], [2])
    assert len(cache) == 0
    for k in (0, 1, 1, 4):
        assert cache[k] == k and len(cache) == 1 and cache.bytes == SIZES[k]


def test_readers_work_side_by_side_and_an_error_is_raised_once():
    both = threading.Barrier(2, timeout=20)
    cache = ShardCache(lambda k: both.wait(), SIZES, 100)
    cache.expect([0, 1], [])
    assert {cache[0], cache[1]} == {0, 1}
    asked = []

    def broken(k):
        asked.append(k)
        if len(asked) == 1:
            raise OSError("reset by peer")
        return k

    cache = ShardCache(broken, SIZES, 100)
    with pytest.raises(OSError, match="reset by peer"):
        cache[3]
    assert cache.bytes == 0 and cache[3] == 3
