"""Shards in memory: a bounded number of bytes, read ahead by a few threads, dropped in the order of last use.

A shard that is asked for is always served: where not even one fits, one is held.  Thread-safe.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any

import numpy as np

READERS = 4  # threads: they wait for the store or decode Parquet, both without Python's lock


class ShardCache:
    """read(k) is shard k, which takes sizes[k] bytes; at most `capacity` bytes are held."""

    def __init__(self, read: Callable[[int], Any], sizes: np.ndarray, capacity: int):
        self._read, self._sizes, self._capacity = read, sizes, capacity
        self._held: OrderedDict[int, Future] = OrderedDict()  # by last use, the oldest first
        self._lock, self._readers = Lock(), ThreadPoolExecutor(READERS)
        self.bytes = 0

    def __getitem__(self, k: int) -> Any:
        """Shard k; waits for its read. Raises what `read` raised, and the next access reads again."""
        with self._lock:
            if k not in self._held:
                self._make_room(k, ())
                self._start(k)
            self._held.move_to_end(k)
            future = self._held[k]
        try:
            return future.result()
        except BaseException:
            with self._lock:
                if self._held.get(k) is future:  # unless another thread has already started it anew
                    self._drop(k)
            raise

    def __len__(self) -> int:
        return len(self._held)

    def expect(self, now: Sequence[int], later: Sequence[int]) -> None:
        """Starts to read the shards needed now, then those needed later, as far as there is room; does not wait."""
        with self._lock:
            wanted = dict.fromkeys([*now, *later])
            for k in wanted:
                if k in self._held:
                    self._held.move_to_end(k)
            for k in wanted:
                if k not in self._held:
                    if not self._make_room(k, wanted):
                        return
                    self._start(k)

    def _start(self, k: int) -> None:
        self._held[k] = self._readers.submit(self._read, k)
        self.bytes += int(self._sizes[k])  # counted from the start, so that reads under way cannot exceed the room

    def _make_room(self, k: int, keep: Container[int]) -> bool:
        """Drops the shards used longest ago, except those in `keep`; True where shard k fits now."""
        for old in list(self._held):
            if self.bytes + self._sizes[k] <= self._capacity:
                break
            if old not in keep:
                self._drop(old)
        return self.bytes + self._sizes[k] <= self._capacity

    def _drop(self, k: int) -> None:
        self._held.pop(k).cancel()
        self.bytes -= int(self._sizes[k])
