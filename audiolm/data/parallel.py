"""Fans a step's work out over Ray tasks, one plain function call an item, and small reads over threads.

Tasks get paths and small values, decode where they compute and write whole files; only small results return.  A bounded
number is in flight, and results keep the items' order.  Ray moves a task off a node that died; an error of the function
itself ends the step.  Inline, the same calls run one after the other in this process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from audiolm.config.run import ClusterConfig

RETRIES = 3  # of a task whose node or process died
POLL_S = 2.0  # progress is reported at least this often, and with it the step's lease is checked
THREADS = 16  # waiting for an object store costs no CPU
AHEAD = 512  # items given to the threads at once, which bounds the results held


@dataclass(frozen=True)
class Workers:
    """The part of a step's context that `parallel_map` needs, for commands that run outside a step."""

    inline: bool  # run in this process, one item after the other, instead of as Ray tasks
    name: str  # names the Ray tasks
    progress: Callable[..., None]  # (done, total, unit, note="")


def parallel_map(fn: Callable, items: Sequence[tuple], *, out, cluster: ClusterConfig, unit: str,
                 sizes: Sequence[float] | None = None, gpu: float = 0) -> list[Any]:
    """[fn(*item) for item in items]. `out` is a StepContext or Workers; progress counts items, or `sizes` in `unit`.

    `gpu`: the share of a GPU that a Ray task holds; True is a whole one.
    """
    sizes = list(sizes) if sizes is not None else [1.0] * len(items)
    total, done, results = sum(sizes), 0.0, [None] * len(items)
    out.progress(0, total, unit)
    if out.inline:
        for i, item in enumerate(items):
            results[i] = _call(fn, item)
            done += sizes[i]
            out.progress(done, total, unit)
        return results
    import ray

    limit = cluster.workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    task = ray.remote(num_cpus=1, num_gpus=gpu, max_retries=RETRIES)(_call)
    todo, running = list(range(len(items)))[::-1], {}
    try:
        while todo or running:
            while todo and len(running) < limit:
                i = todo.pop()
                running[task.options(name=f"{out.name} {i}").remote(fn, items[i])] = i
            ready, _ = ray.wait(list(running), num_returns=1, timeout=POLL_S)
            for ref in ready:
                i = running.pop(ref)
                try:
                    results[i] = ray.get(ref)
                except ray.exceptions.RayTaskError as e:
                    raise e.cause from None  # the function's own error, without Ray's wrapping
                done += sizes[i]
            out.progress(done, total, unit)
    finally:  # after an error or a lost lease no task may go on writing
        for ref in running:
            ray.cancel(ref, force=True)
    return results


def thread_map(fn: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """fn of each item, in order, by 16 threads of this process: for many small reads from an object store."""
    with ThreadPoolExecutor(THREADS) as pool:
        for i in range(0, len(items), AHEAD):
            yield from pool.map(fn, items[i:i + AHEAD])


def cluster_device(cluster: ClusterConfig, inline: bool, gpus: int = 1) -> str:
    """cuda or cpu for a step's tasks: the config's device, else by what the cluster has (inline: this process).

    The driver itself may run on a node without a GPU."""
    if cluster.device != "auto":
        return cluster.device
    if inline:
        return pick_device("auto")
    import ray

    return "cuda" if ray.cluster_resources().get("GPU", 0) >= gpus else "cpu"


def pick_device(asked: str) -> str:
    """cpu or cuda of this process. Raises ValueError for a GPU that is not there."""
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no GPU that torch can use; give --device cpu or auto")
    return "cpu" if asked == "cpu" or not torch.cuda.is_available() else "cuda"


def _call(fn: Callable, item: tuple) -> Any:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with one_thread():
        return fn(*item)


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread: sums have one order on every machine, and as many tasks as CPUs may run at once."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
