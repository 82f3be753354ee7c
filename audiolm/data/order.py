"""The order of training data, planned from lengths alone (DESIGN 1.8).

A clip fills max(1, ceil(length / crop)) slots of an epoch.  An epoch permutes the shards, takes them in windows of W,
and permutes the slots inside each window; row i of step s is slot s x batch + i of the endless run of epochs.  Any row
is computed directly: no replay, no dependence on rank, world size or the total number of steps.  Memory holds the
lengths and the slots of a few windows.  Lengths, crop, align and starts share one unit (samples, or semantic frames).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from audiolm import rng

KEPT = 4  # window permutations held at once: the current one, its neighbours, and one for read-ahead


class Order:
    """Rows of global batches over clips of the given lengths, `shards[c]` being the shard number of clip c."""

    def __init__(self, lengths: Sequence[int], shards: Sequence[int], crop: int, batch: int, seed: int, window: int = 8,
                 align: int = 1):
        """Raises ValueError for no clips, empty clips, or sizes below 1."""
        self.lengths = np.asarray(lengths, np.int64)
        if self.lengths.size == 0:
            raise ValueError("no clips to order: the split is empty after `where`; widen `where` or add audio")
        if len(shards) != len(self.lengths):
            raise ValueError(f"got {len(self.lengths)} lengths but {len(shards)} shard numbers, expected one per clip")
        if self.lengths.min() < 1:
            at = int(self.lengths.argmin())
            raise ValueError(f"clip {at} has length {self.lengths[at]}, expected at least 1")
        for name, value in (("crop", crop), ("batch", batch), ("window", window), ("align", align)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self.crop, self.batch, self.seed, self.window, self.align = crop, batch, seed, window, align
        self._slots = np.maximum(1, -(-self.lengths // crop))
        self.slots = int(self._slots.sum())  # of one epoch
        _, index = np.unique(np.asarray(shards, np.int64), return_inverse=True)
        by_shard = np.argsort(index, kind="stable")  # clip numbers, shard after shard
        self._clips = np.split(by_shard, np.cumsum(np.bincount(index))[:-1])
        self._shard_slots = np.array([int(self._slots[c].sum()) for c in self._clips], np.int64)
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def row(self, step: int, i: int) -> tuple[int, int]:
        """(clip number, start) of row i of global batch `step`; starts are uniform over legal multiples of `align`."""
        if not 0 <= i < self.batch:
            raise ValueError(f"row {i} lies outside the global batch of {self.batch}")
        clip = self.clip_at(step * self.batch + i)
        starts = max(0, int(self.lengths[clip]) - self.crop) // self.align + 1
        if starts == 1:
            return clip, 0
        return clip, int(rng.generator(self.seed, "crop", step, i).integers(starts)) * self.align

    def clip_at(self, slot: int) -> int:
        """The clip in a slot of the endless run of epochs."""
        epoch, position = divmod(slot, self.slots)
        permuted, ends = self._epoch(epoch)
        window = int(np.searchsorted(ends, position, side="right"))
        begin = int(ends[window - 1]) if window else 0
        return int(self._window(epoch, window, permuted)[position - begin])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in this epoch's order and the slot number at which each window ends."""
        def make():
            permuted = rng.generator(self.seed, "order", epoch).permutation(len(self._clips))
            sizes = np.add.reduceat(self._shard_slots[permuted], np.arange(0, len(permuted), self.window))
            return permuted, np.cumsum(sizes)
        return _kept(self._epochs, epoch, make)

    def _window(self, epoch: int, window: int, permuted: np.ndarray) -> np.ndarray:
        def make():
            clips = np.concatenate([self._clips[s] for s in permuted[window * self.window:(window + 1) * self.window]])
            return rng.generator(self.seed, "order", epoch, window).permutation(np.repeat(clips, self._slots[clips]))
        return _kept(self._windows, (epoch, window), make)


def _kept(cache: OrderedDict, key, make):
    if key not in cache:
        cache[key] = make()
        while len(cache) > KEPT:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]
