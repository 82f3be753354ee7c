"""Where each packed row of a training run begins, planned from lengths alone (DESIGN 1.8).

An epoch permutes the shards and takes them in windows; the clips of a window are permuted and laid end to end in a ring,
each as long as the ids it costs, and rows begin at even distances on it, from a drawn phase, in a drawn order.  Who fills
a row goes on from its beginning until it is full.  The number of rows follows from the sum of the costs, so that any row
of any step is found by arithmetic, whatever the number of workers.  A batch is split into lanes, and each lane walks a
stretch of its own of the windows: a worker with some of the rows needs some of the shards.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np

from audiolm import rng

WINDOW_SHARDS = 2  # at least; the manifest has dealt the clips to the shards by chance already
WINDOW_ROWS = 64  # at least, where the corpus has them: a window gets a whole number of rows
LANES = 64
IN_USE = 192 * 2**20  # bytes of all lanes' windows together, those being read ahead included

Place = tuple[int, int, int]  # epoch, window, row in the window


@dataclass(frozen=True)
class Ring:
    """A window: its clips in drawn order, where each ends on the ring, where its rows begin, and its shards."""

    clips: np.ndarray
    ends: np.ndarray
    begins: np.ndarray
    shards: np.ndarray

    def begin(self, row: int) -> tuple[int, int]:
        """(place in `clips`, ids into that clip)."""
        at = int(np.searchsorted(self.ends, self.begins[row], side="right"))
        return at, int(self.begins[row] - (self.ends[at - 1] if at else 0))


class PackingPlan:
    """costs: ids of each clip, shard after shard; shard s holds clips firsts[s] to firsts[s + 1]; `stride`: ids of a row."""

    def __init__(self, costs: np.ndarray, firsts: np.ndarray, stride: int, batch: int, seed: int, shard_bytes: float = 1):
        self.costs, self.firsts, self.batch, self.seed = costs, firsts, batch, seed
        self._shard_costs = np.add.reduceat(costs, firsts[:-1], dtype=np.int64)
        total, shards = int(self._shard_costs.sum()), len(self._shard_costs)
        self.rows = max(1, round(total / stride))  # of one epoch
        self.window = min(shards, max(WINDOW_SHARDS, -(-WINDOW_ROWS * stride * shards // total)))
        self.lanes = max(1, min(batch, LANES, int(IN_USE / (2 * self.window * shard_bytes))))
        self._lap = max(1, self.rows // batch)  # steps a lane walks on before it goes elsewhere
        windows = -(-shards // self.window)
        self.ahead = max(1, self.rows * self.lanes // (windows * batch))  # steps that a window lasts
        self._epochs: OrderedDict[Hashable, Any] = OrderedDict()
        self._rings: OrderedDict[Hashable, Any] = OrderedDict()

    def place(self, step: int, i: int) -> Place:
        """Row i of global batch `step`. Every row of every epoch has its turn once."""
        if not 0 <= i < self.batch:
            raise ValueError(f"row {i} lies outside the global batch of {self.batch}")
        lane = i * self.lanes // self.batch
        first, end = (-(-n * self.batch // self.lanes) for n in (lane, lane + 1))
        lap, t = divmod(step, self._lap)
        number = (lap * self.batch + first) * self._lap + t * (end - first) + i - first
        epoch, row = divmod(number, self.rows)
        ends = self._epoch(epoch)[1]
        window = int(np.searchsorted(ends, row, side="right"))
        return epoch, window, row - (int(ends[window - 1]) if window else 0)

    def ring(self, epoch: int, window: int) -> Ring:
        def make() -> Ring:
            order, ends = self._epoch(epoch)
            shards = order[window * self.window:(window + 1) * self.window]
            draw = rng.generator(self.seed, "window", epoch, window)
            clips = draw.permutation(np.concatenate([np.arange(self.firsts[s], self.firsts[s + 1]) for s in shards]))
            places = np.cumsum(self.costs[clips], dtype=np.int64)
            size, rows = int(places[-1]), int(ends[window] - (ends[window - 1] if window else 0))
            begins = (int(draw.integers(size)) + np.arange(rows) * size // rows) % size
            return Ring(clips, places, draw.permutation(begins), shards)
        return _kept(self._rings, (epoch, window), make, 4 * self.lanes)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in this epoch's order, and the number of rows up to the end of each window."""
        def make():
            order = rng.generator(self.seed, "epoch", epoch).permutation(len(self._shard_costs))
            sizes = np.add.reduceat(self._shard_costs[order], np.arange(0, len(order), self.window))
            until = np.cumsum(sizes)
            return order, np.rint(until / until[-1] * self.rows).astype(np.int64)
        return _kept(self._epochs, epoch, make, 3)


def _kept(cache: OrderedDict, key: Hashable, make: Callable[[], Any], most: int) -> Any:
    """A value made once, of which the `most` used last are kept; two threads may make one twice, and they are equal."""
    value = cache.pop(key, None) or make()
    cache[key] = value
    while len(cache) > most:
        cache.popitem(last=False)
    return value
