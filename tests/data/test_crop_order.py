"""The planned order of data: complete, reproducible, independent of workers and of the total number of steps."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from audiolm.data.crops import CropSampler

LENGTHS = [5, 30, 11, 10, 1, 25, 7, 40, 3, 9, 10, 21]
SHARDS = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def order(batch=4, seed=0, window=2, align=1):
    return CropSampler(LENGTHS, SHARDS, crop=10, batch=batch, seed=seed, window=window, align=align)


def test_every_slot_once_per_epoch():
    o = order()
    expected = Counter({c: max(1, -(-n // 10)) for c, n in enumerate(LENGTHS)})
    for epoch in range(3):
        assert Counter(o.clip_at(epoch * o.slots + k) for k in range(o.slots)) == expected
    first, second = ([o.clip_at(e * o.slots + k) for k in range(o.slots)] for e in (0, 1))
    assert first != second  # epochs differ


def test_an_epoch_reads_few_shards_at_a_time():
    o = CropSampler([10] * 400, np.repeat(np.arange(40), 10), crop=10, batch=8, seed=0, window=4)
    for begin in range(0, 400, 40):
        assert len({o.clip_at(k) // 10 for k in range(begin, begin + 40)}) == 4
    assert len(o._windows) <= 4  # memory does not grow with the steps taken


@pytest.mark.parametrize("world", [1, 2, 4])
def test_workers_together_see_the_batches_of_one(world):
    whole = order()
    expected = [[whole.row(s, i) for i in range(4)] for s in range(30)]
    ranks = [order() for _ in range(world)]  # each worker plans on its own and asks for its slice only
    share = 4 // world
    got = [[o.row(s, r * share + i) for r, o in enumerate(ranks) for i in range(share)] for s in range(30)]
    assert got == expected


def test_direct_access_equals_replay():
    replay = order()
    rows = {(s, i): replay.row(s, i) for s in range(200) for i in range(4)}
    for s, i in ((199, 3), (0, 0), (57, 2), (56, 1), (120, 0)):
        assert order().row(s, i) == rows[s, i]


def test_seed_and_process_decide_alone():
    code = ("from audiolm.data.crops import CropSampler; o = CropSampler([5, 30, 11], [0, 1, 1], 10, 2, 7); "
            "print([o.row(s, i) for s in range(9) for i in range(2)])")
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    o = CropSampler([5, 30, 11], [0, 1, 1], 10, 2, 7)
    assert again == str([o.row(s, i) for s in range(9) for i in range(2)])
    assert [order(seed=0).row(s, 0) for s in range(50)] != [order(seed=1).row(s, 0) for s in range(50)]


@pytest.mark.parametrize("align", [1, 4])
def test_starts_are_legal_aligned_and_spread(align):
    o = CropSampler([50], [0], crop=10, batch=1, seed=3, align=align)
    starts = Counter(o.row(s, 0)[1] for s in range(3000))
    legal = range(0, 41, align)
    assert set(starts) == set(legal)
    assert max(starts.values()) < 2 * 3000 / len(legal)
    assert all(CropSampler([10, 4], [0, 0], 10, 1, 0).row(s, 0)[1] == 0 for s in range(20))


def test_refusals_name_the_fault():
    with pytest.raises(ValueError, match="no clips"):
        CropSampler([], [], 10, 1, 0)
    with pytest.raises(ValueError, match="clip 1 has length 0"):
        CropSampler([3, 0], [0, 0], 10, 1, 0)
    with pytest.raises(ValueError, match="crop is 0"):
        CropSampler([3], [0], 0, 1, 0)
    with pytest.raises(ValueError, match="outside the global batch"):
        order().row(0, 4)
