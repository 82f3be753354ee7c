"""Fans a step's work out over Ray tasks, one plain function call an item (DESIGN 1.9).

Tasks get paths and small values, decode where they compute and write whole files; only small results come back.
Bounded in flight; results keep the items' order.  Ray moves a task off a node that died; an error of the function
itself ends the step.  Inline, the same calls run one after the other in this process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from audiolm.config.run import ClusterConfig


@dataclass(frozen=True)
class Workers:
    """The three things `parallel_map` needs of a step's context, for commands that run outside a step."""

    inline: bool  # run in this process, one item after the other, instead of as Ray tasks
    name: str  # names the Ray tasks
    progress: Callable[..., None]  # (done, total, unit, note="")


def parallel_map(fn: Callable, items: Sequence[tuple], *, out, cluster: ClusterConfig, unit: str,
            sizes: Sequence[float] | None = None, gpu: bool = False) -> list[Any]:
    """[fn(*item) for item in items]; `sizes` (in `unit`) weigh the progress, else items are counted."""
    sizes = list(sizes) if sizes is not None else [1.0] * len(items)
    total, done, results = sum(sizes), 0.0, [None] * len(items)
    out.progress(0, total, unit)
    if out.inline:
        with _threads(1):
            for i, item in enumerate(items):
                results[i] = fn(*item)
                done += sizes[i]
                out.progress(done, total, unit)
        return results
    import ray

    limit = cluster.workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    task = ray.remote(num_cpus=1, num_gpus=1 if gpu else 0, max_retries=3)(_call)
    todo, running = list(range(len(items)))[::-1], {}
    try:
        while todo or running:
            while todo and len(running) < limit:
                i = todo.pop()
                running[task.options(name=f"{out.name} {i}").remote(fn, items[i])] = i
            ready, _ = ray.wait(list(running), num_returns=1, timeout=2.0)
            for ref in ready:
                i = running.pop(ref)
                try:
                    results[i] = ray.get(ref)
                except ray.exceptions.RayTaskError as e:
                    raise e.cause from None  # the function's own error, without Ray's wrapping
                done += sizes[i]
            out.progress(done, total, unit)
    finally:
        for ref in running:
            ray.cancel(ref, force=True)
    return results


def cluster_device(cluster: ClusterConfig, inline: bool, gpus: int = 1) -> str:
    """cuda or cpu: as the config says, else what the cluster (inline: this process) has; the driver may have no GPU."""
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
    with _threads(1):
        return fn(*item)


class _threads:
    """One torch thread a task: as many tasks as CPUs run at once, and the bits never depend on the machine."""

    def __init__(self, n: int):
        self.n = n

    def __enter__(self):
        import torch

        os.environ.setdefault("OMP_NUM_THREADS", str(self.n))
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.n)

    def __exit__(self, *exc):
        import torch

        torch.set_num_threads(self.before)
