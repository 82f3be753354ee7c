"""Shards in memory: a bounded number of bytes, read ahead by a few threads, forgotten in the order of last use.

What is asked for is always served: where not even one shard fits, one is held.  Several threads may ask.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any

import numpy as np

READERS = 4  # waiting for a store, or decoding, which lets other threads run


class ShardCache:
    """read(k) is shard k, which takes sizes[k] bytes; `room` bytes are held at most."""

    def __init__(self, read: Callable[[int], Any], sizes: np.ndarray, room: int):
        self._read, self._sizes, self._room = read, sizes, room
        self._held: OrderedDict[int, Future] = OrderedDict()
        self._lock, self._readers = Lock(), ThreadPoolExecutor(READERS)
        self.bytes = 0

    def __getitem__(self, k: int) -> Any:
        with self._lock:
            if k not in self._held:
                self._make_room(k, ())
                self._start(k)
            self._held.move_to_end(k)
            found = self._held[k]
        try:
            return found.result()
        except BaseException:
            with self._lock:
                if self._held.get(k) is found:  # the next one to ask tries again
                    self._forget(k)
            raise

    def __len__(self) -> int:
        return len(self._held)

    def expect(self, now: Sequence[int], later: Sequence[int]) -> None:
        """Begins to read what is needed now, then what is needed later, as far as there is room."""
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
        self.bytes += int(self._sizes[k])

    def _make_room(self, k: int, keep: Any) -> bool:
        """Forgets what was used longest ago, but for `keep`; whether shard k fits now."""
        for old in list(self._held):
            if self.bytes + self._sizes[k] <= self._room:
                break
            if old not in keep:
                self._forget(old)
        return self.bytes + self._sizes[k] <= self._room

    def _forget(self, k: int) -> None:
        self._held.pop(k).cancel()
        self.bytes -= int(self._sizes[k])
