"""Memory of a GPU's samplers, kept from call to call, and the CUDA graphs of their steps.

A step reads and writes the same tensors each time, so that a graph of it can be replayed.  A call takes buffers that are
large enough and kept; the rows that it does not need are padding.  All graphs of some buffers share one memory pool, which
goes with them; no graph leaves anything in the pool for another, so they may follow each other in any order.
A graph is captured for each run of keys (models/lm/cache.py), after steps on the same side stream, outside the graph: with
them libraries choose and load their kernels, and torch.compile compiles.  The steps count, nothing is drawn twice.
A capture forbids unsafe CUDA calls (allocations, queries of events) in its own thread alone ("thread_local"), so threads
that read, pin or write go on; no thread may wait for the whole device meanwhile, and no two captures may be underway.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol, TypeVar

import torch

from audiolm.models.lm.cache import KVCache

WARM_UP = 3  # steps on the side stream before a capture, as torch.cuda.make_graphed_callables takes
SHARE = 0.25  # of a GPU's memory that may be kept; weights, prefill and other processes take the rest
SPARE = 4  # kept buffers may have so many times the rows of a call: their padding costs time, new ones their captures
LENGTH_STEP = 512  # a kept buffer's length is a multiple of this, so that calls of similar lengths share it
_CAPTURE = threading.Lock()  # torch.cuda.graph allows one capture at a time in a process


class Buffers(Protocol):
    """Device memory of a group of rows, whose size does not change."""

    rows: int
    length: int
    cache: KVCache
    graphs: Graphs


B = TypeVar("B", bound=Buffers)


@dataclass
class Graphs:
    """Replays of some buffers' step, by the number of keys that it attends to."""

    replays: dict[int, Callable[[], None]] = field(default_factory=dict)
    warmed: dict[int, int] = field(default_factory=dict)  # steps before a capture
    pool: Any = None


@dataclass
class Kept:
    """Buffers that are kept, the one used last at the end; together at most `limit` bytes, or the last one alone.

    Their graphs' pools, which hold what one token needs in between, are not counted.
    """

    limit: int
    held: list[tuple[Hashable, int, Buffers]] = field(default_factory=list)  # (what they are for, bytes, buffers)

    def take(self, key: Hashable, rows: int, length: int, make: Callable[[int, int, str | None], B]) -> B:
        """Empty buffers for `key`: the smallest that are kept and large enough, else make(rows, length, device).

        make's device "meta" asks for their size alone, None for the model's device.
        """
        fit = [entry for entry in self.held if entry[0] == key and rows <= entry[2].rows <= SPARE * rows
               and length <= entry[2].length]
        if fit:
            entry = min(fit, key=lambda e: (e[2].rows, e[2].length))
            self.held.remove(entry)
        else:
            entry = self._new(key, 1 << (rows - 1).bit_length(), -(-length // LENGTH_STEP) * LENGTH_STEP, make)
        self.held.append(entry)
        entry[2].cache.clear()
        return entry[2]

    def _new(self, key: Hashable, rows: int, length: int, make: Callable[[int, int, str | None], B]) -> tuple:
        """New buffers, whose memory is made free first; they replace shorter ones of the same rows."""
        size = size_of(make(rows, length, "meta"))
        self.held = [e for e in self.held if e[0] != key or e[2].rows != rows]
        while self.held and sum(e[1] for e in self.held) + size > self.limit:
            self.held.pop(0)
        return key, size, make(rows, length, None)


def kept_on(device: torch.device) -> Kept:
    """An empty store with a share of a GPU's memory; a CPU keeps nothing."""
    return Kept(int(SHARE * torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else 0)


def size_of(m: Buffers) -> int:
    """Bytes of the tensors of some buffers and their cache."""
    found = [*vars(m).values(), *m.cache.kv, *vars(m.cache).values()]
    return sum(x.nbytes for x in found if isinstance(x, torch.Tensor))


def replay(m: Buffers, step: Callable[[], None]) -> None:
    """Runs `step` as a graph, which is captured once for each run of keys."""
    graphs, held, keys = m.graphs, m.cache.longest, m.cache.keys(1)
    if keys not in graphs.replays:
        warmed = graphs.warmed.get(keys, 0)
        if warmed < WARM_UP:
            graphs.warmed[keys] = warmed + 1
            return run_aside(step)
        graphs.replays[keys] = capture(step, graphs)
    graphs.replays[keys]()
    m.cache.longest = held + 1  # the host's count: a replay does not run its code


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """The stream of warm-up and capture: what the first leaves (cuBLAS's workspace) serves the second."""
    return torch.cuda.Stream(device)


def run_aside(step: Callable[[], None]) -> None:
    """Runs a step on the side stream, in order with the current one."""
    side, current = _side_stream(torch.cuda.current_device()), torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        step()
    current.wait_stream(side)


def capture(step: Callable[[], None], graphs: Graphs) -> Callable[[], None]:
    """The replay of a step that is captured and not yet run; sets the pool of the first."""
    graphs.pool = graphs.pool or torch.cuda.graph_pool_handle()
    graph, side = torch.cuda.CUDAGraph(), _side_stream(torch.cuda.current_device())
    with _CAPTURE, torch.cuda.graph(graph, pool=graphs.pool, stream=side, capture_error_mode="thread_local"):
        step()
    return graph.replay
