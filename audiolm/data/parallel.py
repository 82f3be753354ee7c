"""Fans a step's work out over Ray tasks, one plain function call an item, and small reads over threads.

Tasks get paths and small values, decode where they compute and write whole files; only small results return, and
`parallel_each` folds them as they come.  A bounded number is in flight, by the cluster's present size.  A task whose
process or node died runs again, after a pause; an error of the function itself ends the step.  Inline, the same calls run
one after the other.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from audiolm.config.base import ConfigError
from audiolm.config.run import ClusterConfig

DEATHS = 4  # of a task, without a result of any other in between: then the step ends
BACKOFF_S = 5.0  # before a task that died runs again; doubled with each death, up to BACKOFF_MOST_S
BACKOFF_MOST_S = 60.0
QUEUED = 2  # tasks in flight for a CPU: those that wait fill a node that joins, and make an autoscaler add one
POLL_S = 2.0  # progress is reported at least this often, and with it the step's lease is checked
PAUSE_S = 0.1  # between looks where all tasks that are left wait
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
    """[fn(*item) for item in items], as `parallel_each` runs them; for results that fit into memory together."""
    results: list[Any] = [None] * len(items)
    parallel_each(fn, items, results.__setitem__, out=out, cluster=cluster, unit=unit, sizes=sizes, gpu=gpu)
    return results


def parallel_each(fn: Callable, items: Sequence[tuple], take: Callable[[int, Any], None], *, out, cluster: ClusterConfig,
                  unit: str, sizes: Sequence[float] | None = None, before: float = 0.0, gpu: float = 0) -> None:
    """`take(i, fn(*items[i]))` in this process as each task ends, in any order; no result is kept.

    `out` is a StepContext or Workers; progress counts items, or `sizes` in `unit`, on top of what was done `before`.
    `gpu`: the share of a GPU that a Ray task holds; True is a whole one.
    """
    sizes = list(sizes) if sizes is not None else [1.0] * len(items)
    total, done = before + sum(sizes), before
    out.progress(done, total, unit)
    with closing(_in_turn(fn, items) if out.inline else _as_tasks(fn, items, out.name, cluster, gpu)) as news:
        for ready, note in news:
            for i, result in ready:
                take(i, result)
                done += sizes[i]
            out.progress(done, total, unit, note)


News = Iterator[tuple[list[tuple[int, Any]], str]]  # (results that are ready with their items' numbers, a note)


def _in_turn(fn: Callable, items: Sequence[tuple]) -> News:
    for i, item in enumerate(items):
        yield [(i, _call(fn, item))], ""


def _as_tasks(fn: Callable, items: Sequence[tuple], name: str, cluster: ClusterConfig, gpu: float) -> News:
    """Results as Ray's tasks end, at least one entry every POLL_S. Raises the function's own error, or TaskDied."""
    import ray

    task = ray.remote(num_cpus=1, num_gpus=gpu, max_retries=0)(_call)  # Ray would repeat without end what memory killed
    todo, running, deaths = list(range(len(items)))[::-1], {}, _Deaths(name)
    limit, looked = 0, float("-inf")
    try:
        while todo or running or deaths.waiting:
            if time.monotonic() - looked > POLL_S:  # nodes join and leave while a step runs
                looked, limit = time.monotonic(), cluster.workers or QUEUED * max(1, int(ray.cluster_resources().get("CPU", 1)))
            todo += deaths.due()
            while todo and len(running) < limit:
                i = todo.pop()
                running[task.options(name=f"{name} {i}").remote(fn, items[i])] = i
            if not running:
                time.sleep(PAUSE_S)
            ready = []
            for ref in ray.wait(list(running), num_returns=1, timeout=POLL_S)[0] if running else ():
                i = running.pop(ref)
                try:
                    ready.append((i, ray.get(ref)))
                    deaths.forget()
                except ray.exceptions.RayTaskError as e:
                    raise e.cause from None  # the function's own error, without Ray's wrapping
                except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError,
                        ray.exceptions.ObjectLostError) as e:
                    deaths.add(i, e)
            yield ready, deaths.note if deaths.waiting else ""
    finally:  # after an error or a lost lease no task may go on writing
        for ref in running:
            ray.cancel(ref, force=True)


class TaskDied(RuntimeError):
    """A task whose process died again and again while no other task ended."""


class _Deaths:
    """The tasks that died: each runs again after a pause. A result of any task forgets the deaths before it."""

    def __init__(self, name: str):
        self.name = name
        self.waiting: dict[int, float] = {}  # task -> when it runs again, by the monotonic clock
        self.note = ""  # of the last death
        self._ever, self._now = Counter(), Counter()

    def add(self, i: int, error: Exception) -> None:
        """Has task `i` wait. Raises TaskDied."""
        self._ever[i] += 1
        self._now[i] += 1
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        text = f"task {self.name} {i} died: {re.sub(r', ID: [0-9a-f]+', '', first)}"
        if self._now[i] >= DEATHS:
            fix = ("give its node more memory, or run fewer tasks at once (cluster.workers)"
                   if type(error).__name__ == "OutOfMemoryError" else "see the logs of Ray's workers")
            raise TaskDied(f"{text}; {DEATHS} times, and no task ended in between: {fix}")
        pause_s = min(BACKOFF_MOST_S, BACKOFF_S * 2 ** min(self._ever[i] - 1, 9))
        self.waiting[i] = time.monotonic() + pause_s
        self.note = f"{text}; again in {pause_s:g} s"

    def due(self) -> list[int]:
        """The tasks whose pause is over, no longer waiting."""
        due = [i for i, at in self.waiting.items() if at <= time.monotonic()]
        for i in due:
            del self.waiting[i]
        return due

    def forget(self) -> None:
        self._now.clear()


def thread_map(fn: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """fn of each item, in order, by 16 threads of this process: for many small reads from an object store."""
    with ThreadPoolExecutor(THREADS) as pool:
        for i in range(0, len(items), AHEAD):
            yield from pool.map(fn, items[i:i + AHEAD])


def cluster_device(cluster: ClusterConfig, inline: bool, gpus: int = 1) -> str:
    """cuda or cpu for a step's tasks: the config's device, else by what the cluster has (inline: this process).

    The driver itself may run on a node without a GPU. Raises ConfigError for cluster.device=cuda where there are not `gpus`,
    unless KubeRay's autoscaler adds nodes: it waits for tasks that need them, and tells Ray nothing of its groups before."""
    if inline:
        if cluster.device == "cuda" and pick_device("auto") == "cpu":
            raise ConfigError("cluster.device is cuda, and this machine has no GPU that torch can use: set it to auto or cpu")
        return pick_device(cluster.device)
    if cluster.device == "cpu":
        return "cpu"
    import ray

    has = ray.cluster_resources()
    if has.get("GPU", 0) >= gpus:
        return "cuda"
    scales = os.environ.get("RAY_enable_autoscaler_v2") == "true"  # KubeRay sets it in the head pod, where the driver runs
    if cluster.device == "cuda" and not scales:
        raise ConfigError(f"cluster.device is cuda, which needs {gpus} GPU(s); the cluster has {has.get('GPU', 0):g} GPUs and "
                          f"{has.get('CPU', 0):g} CPUs: set it to auto or cpu, or join a cluster with GPUs")
    return "cuda" if cluster.device == "cuda" else "cpu"


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
