"""Packing plan of a training run: the clip and offset where every packed row begins, from lengths alone.

An epoch permutes the shards and deals them into windows.  The clips of a window, permuted, are laid end to end on a ring,
each as long as its cost in ids.  Rows start at even distances on the ring, from a random phase, in random order; a row
is filled from its start until it is full (`TokenBatches.spans`).  The number of rows follows from the summed costs, so any
row of any step is found by arithmetic, whatever the number of workers.

A global batch is split into lanes.  Each lane walks through its own windows, so a worker reads only the shards of its rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from audiolm import rng

WINDOW_SHARDS = 2  # at least: the manifest has already dealt clips to shards at random, two mix them anew every epoch
WINDOW_ROWS = 64  # at least: a window gets a whole number of rows, an error of half a row in 64
LANES = 64  # at most: bounds the windows, and so the shards, that one batch has open
LANE_BYTES = 192 * 2**20  # of all lanes' windows, current and next: three quarters of the default cache of TokenBatches
EPOCHS_KEPT = 3  # the current epoch, the next one while it is read ahead, and the one before at their border

RowAddress = tuple[int, int, int]  # epoch, window, row in the window


@dataclass(frozen=True)
class Window:
    """Ring of one window: clips in random order, the ring position where each ends, and where the rows start."""

    clips: np.ndarray
    ends: np.ndarray
    row_starts: np.ndarray
    shards: np.ndarray

    def start_of(self, row: int) -> tuple[int, int]:
        """(index into `clips`, ids into that clip) where a row starts."""
        at = int(np.searchsorted(self.ends, self.row_starts[row], side="right"))
        return at, int(self.row_starts[row] - (self.ends[at - 1] if at else 0))


class PackingPlan:
    """Rows of every step from costs, the ids of each clip, shard after shard; shard s holds the clips firsts[s] to
    firsts[s + 1]. `stride`: ids of the ring from row to row; shard_bytes: mean size of a shard in memory."""

    def __init__(self, costs: np.ndarray, firsts: np.ndarray, stride: int, batch: int, seed: int, shard_bytes: float = 1):
        self.costs, self.firsts, self.batch, self.seed = costs, firsts, batch, seed
        self._shard_costs = np.add.reduceat(costs, firsts[:-1], dtype=np.int64)
        total, shards = int(self._shard_costs.sum()), len(self._shard_costs)
        self.rows = max(1, round(total / stride))  # of one epoch
        self.window_shards = min(shards, max(WINDOW_SHARDS, -(-WINDOW_ROWS * stride * shards // total)))
        self.lanes = max(1, min(batch, LANES, int(LANE_BYTES / (2 * self.window_shards * shard_bytes))))
        self._lap = max(1, self.rows // batch)  # steps that a lane walks through consecutive rows
        windows = -(-shards // self.window_shards)
        self.ahead = max(1, self.rows * self.lanes // (windows * batch))  # steps that a lane stays in one window
        # a lane needs its window and the one read ahead; twice that, as several threads may be at different steps
        self.window = lru_cache(4 * self.lanes)(self._window)
        self.epoch = lru_cache(EPOCHS_KEPT)(self._epoch)

    def address(self, step: int, i: int) -> RowAddress:
        """Row i of global batch `step`. Every row of every epoch comes once. Raises ValueError outside the batch."""
        if not 0 <= i < self.batch:
            raise ValueError(f"row {i} lies outside the global batch of {self.batch}")
        # lane n has the rows first to end of every batch; in a lap of _lap steps it reads (end - first) x _lap
        # consecutive rows of the epoch, and the lanes side by side read batch x _lap
        lane = i * self.lanes // self.batch
        first, end = (-(-n * self.batch // self.lanes) for n in (lane, lane + 1))
        lap, t = divmod(step, self._lap)
        number = (lap * self.batch + first) * self._lap + t * (end - first) + i - first
        epoch, row = divmod(number, self.rows)
        row_ends = self.epoch(epoch)[1]
        window = int(np.searchsorted(row_ends, row, side="right"))
        return epoch, window, row - (int(row_ends[window - 1]) if window else 0)

    def _window(self, epoch: int, window: int) -> Window:
        """The ring of a window; decided by (seed, epoch, window)."""
        order, row_ends = self.epoch(epoch)
        shards = order[window * self.window_shards:(window + 1) * self.window_shards]
        draw = rng.generator(self.seed, "window", epoch, window)
        clips = draw.permutation(np.concatenate([np.arange(self.firsts[s], self.firsts[s + 1]) for s in shards]))
        ends = np.cumsum(self.costs[clips], dtype=np.int64)
        size, rows = int(ends[-1]), int(row_ends[window] - (row_ends[window - 1] if window else 0))
        # even distances: every id is about equally often in a row; the phase moves the cuts from epoch to epoch
        row_starts = (int(draw.integers(size)) + np.arange(rows) * size // rows) % size
        return Window(clips, ends, draw.permutation(row_starts), shards)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(shards in this epoch's order, rows up to the end of each window), rows in proportion to the windows' costs."""
        order = rng.generator(self.seed, "epoch", epoch).permutation(len(self._shard_costs))
        costs = np.add.reduceat(self._shard_costs[order], np.arange(0, len(order), self.window_shards))
        until = np.cumsum(costs)
        return order, np.rint(until / until[-1] * self.rows).astype(np.int64)
