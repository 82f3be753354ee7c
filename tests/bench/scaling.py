"""Weak scaling on this machine: tokens by one and two workers, 256 simulated workers, training by two ranks.

    python tests/bench/scaling.py                all three
    python tests/bench/scaling.py tokens         acoustic tokens of the published codec by real Ray tasks, 1 and 2 workers
    python tests/bench/scaling.py scheduler      tasks of fixed length on up to 8 Ray workers, and on up to 256 stand-ins
    python tests/bench/scaling.py training       a step of one rank on half a batch, and of two (gloo) on the whole batch

Overhead is the time beyond that of workers who never wait.  A stand-in is a thread that sleeps and answers through a module
with the part of Ray's interface that data/parallel.py calls, so its overhead is that of our own loop.  CPU seconds tell more
than the clock on a machine that others use.
"""

from __future__ import annotations

import argparse
import concurrent.futures as futures
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from audiolm.config.corpus import CorpusConfig  # noqa: E402
from audiolm.config.run import ClusterConfig  # noqa: E402
from audiolm.config.tokens import TokensConfig  # noqa: E402
from audiolm.config.training import TrainConfig  # noqa: E402
from audiolm.dag.lease import Lease  # noqa: E402
from audiolm.data.clips import read_clips  # noqa: E402
from audiolm.data.manifest import build_manifest  # noqa: E402
from audiolm.data.parallel import Workers, parallel_map  # noqa: E402
from audiolm.metrics_log import read_build  # noqa: E402
from audiolm.models.lm.block import TransformerSizes  # noqa: E402
from audiolm.models.lm.transformer import Transformer  # noqa: E402
from audiolm.pipeline.ray_cluster import start_ray  # noqa: E402
from audiolm.tokenizers import encode  # noqa: E402
from audiolm.train.loop import run_worker  # noqa: E402
from audiolm.train.rank import TrainJob  # noqa: E402
from tests.bench.ray_node import Node, environment  # noqa: E402
from tests.worlds.basics import RecordingOut  # noqa: E402
from tests.worlds.training import TinyLM, train_on_two  # noqa: E402

WORKERS = Workers(False, "bench", lambda done, total, unit, note="": None)
sleep = partial(parallel_map, time.sleep, out=WORKERS, cluster=ClusterConfig(), unit="tasks")
BATCH, TOKENS, STEPS = 8, 256, 12
SIZES = TransformerSizes(1024, 192, 4, 6, 768, 0.0)  # as the quickstart's semantic stage


@contextlib.contextmanager
def ray_of(cpus: int) -> Iterator[None]:
    """A Ray that thinks it has so many CPUs."""
    import ray

    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, environment()):
        node = Node(Path(folder), "bench", environment(), cpus)
        try:
            start_ray(ClusterConfig(address=node.address), folder, lambda text: None)
            yield
        finally:
            ray.shutdown()
            node.kill()


def tokens(folder: Path, repeats: int) -> None:
    """The quickstart's corpus, encoded anew by one and two workers in turn."""
    corpus = CorpusConfig(name="bench", sources=[{"kind": "librispeech", "name": "q", "root":
                                                  str(ROOT / "workflows/quickstart/flac")}], shard_s=30)
    build_manifest({"corpus": corpus, "seed": 0, "cluster": ClusterConfig()}, {}, RecordingOut(folder / "manifest"))
    inputs = {n: SimpleNamespace(path=str(p), build=f"{n}.0001") for n, p in (
        ("manifest", folder / "manifest"), ("codec", ROOT / "audiolm/pretrained/speech-16k"))}
    hours = sum(c.seconds for c in read_clips(str(folder / "manifest"))) / 3600

    def once(workers: int, n: int) -> float:
        out = RecordingOut(folder / f"tokens-{workers}-{n}")
        out.inline = False
        config = {"which": "acoustic", "tokens": TokensConfig(), "corpus": corpus, "seed": 0,
                  "cluster": ClusterConfig(device="cpu", workers=workers)}
        began = time.perf_counter()
        encode.encode_tokens(config, inputs, out)
        return time.perf_counter() - began

    with ray_of(2):
        once(2, -1)  # both worker processes have their imports
        took = [(once(1, n), once(2, n)) for n in range(repeats)]
    one, two = (min(t) for t in zip(*took, strict=True))
    print(f"tokens of {hours:.3f} h in shards of 30 s: 1 worker {one:.1f} s ({hours * 3600 / one:.0f} x real time), 2 workers "
          f"{two:.1f} s, {one / two:.2f} times as fast; fastest of {repeats}", flush=True)


def stand_in(workers: int) -> ModuleType:
    """A module like `ray` whose tasks are threads: what data/parallel.py calls, and no more."""
    pool = futures.ThreadPoolExecutor(workers)

    def remote(**options) -> Callable:
        def decorate(fn: Callable) -> SimpleNamespace:
            return SimpleNamespace(options=lambda **named: SimpleNamespace(remote=partial(pool.submit, fn)))
        return decorate

    def wait(refs: list, num_returns: int, timeout: float) -> tuple[list, list]:
        done = next((r for r in refs if r.done()), None)
        if done is None:
            done = next(iter(futures.wait(refs, timeout, futures.FIRST_COMPLETED).done), None)
        return ([done] if done else []), []

    class Never(Exception):
        pass

    errors = {n: Never for n in ("RayTaskError", "WorkerCrashedError", "OutOfMemoryError", "NodeDiedError", "ObjectLostError")}
    fake = ModuleType("ray")
    fake.remote, fake.wait, fake.get = remote, wait, lambda ref: ref.result()
    fake.cluster_resources = lambda: {"CPU": workers}
    fake.exceptions, fake.cancel = SimpleNamespace(**errors), lambda ref, force: ref.cancel()
    return fake


def fixed(workers: int, seconds: float, rounds: int) -> tuple[float, float]:
    """(overhead, this process's CPU seconds a task) of `rounds` tasks of `seconds` for each worker."""
    items, cpu = [(seconds,)] * workers * rounds, time.process_time()
    began = time.perf_counter()
    list(sleep(items))
    took = time.perf_counter() - began
    return took / (seconds * rounds) - 1, (time.process_time() - cpu) / len(items)


def scheduler(seconds: float, rounds: int) -> None:
    """Tasks of one length, the same number for each worker."""
    for workers in (1, 4, 8):  # each process holds torch
        with ray_of(workers):
            list(sleep([(2,)] * workers * 2))  # all worker processes start
            overhead, cpu = fixed(workers, seconds, rounds)
        report("Ray", workers, seconds, overhead, cpu)
    for workers in (1, 16, 64, 256):
        with mock.patch.dict(sys.modules, ray=stand_in(workers)):
            overhead, cpu = fixed(workers, seconds, rounds)
        report("stand-ins", workers, seconds, overhead, cpu)


def report(kind: str, workers: int, seconds: float, overhead: float, cpu: float) -> None:
    print(f"{kind:9} {workers:4} workers, {seconds:g} s a task: overhead {overhead:.1%}, driver {1e3 * cpu:.1f} ms a task",
          flush=True)


class Stage(TinyLM):
    """A language model of the quickstart's size on random ids."""

    def __init__(self, config, inputs, ctx):
        super().__init__(config, inputs, ctx)
        self.modules = {"model": Transformer(SIZES)}

    def train_step(self, engines, batches, step):
        began = time.process_time()
        return {**super().train_step(engines, batches, step), "cpu_s": time.process_time() - began}

    def _ids(self, purpose, step, row):
        return torch.randint(SIZES.vocab, (TOKENS,), generator=torch.Generator().manual_seed(1000 * step + row)).numpy()


def stage(config, inputs, ctx):
    return Stage(config, inputs, ctx)


def training(folder: Path) -> None:
    """The same rows a rank, so that the difference is what two ranks wait for, and what they take from each other."""
    numel = sum(p.numel() for p in Transformer(SIZES).parameters())
    print(f"{numel / 1e6:.1f} M parameters, {TOKENS} tokens a row", flush=True)
    for ranks in (1, 2):
        build = str(folder / f"ranks-{ranks}")
        train = TrainConfig(steps=STEPS, batch=BATCH // 2 * ranks, lr=1e-3, engine="torch", eval_every=STEPS, save_every=STEPS,
                            log_every=1)
        lease = Lease(build)
        metrics = f"{build}/metrics-0001.jsonl"
        job = TrainJob(stage, {"seed": 0}, train, {}, build, lease.attempt, build, metrics, 0, "cpu", 1, 16, False)
        run_worker(job, 0, 1) if ranks == 1 else train_on_two(job)
        lease.close("done")
        rows = [r["metrics"] for r in read_build(build) if "cpu_s" in r["metrics"]][1:]  # without the first
        took, cpu = ([r[key] for r in rows] for key in ("step_s", "cpu_s"))
        print(f"{ranks} rank(s), batch {train.batch}: a step takes {min(took):.3f} s at best, {statistics.median(took):.3f} s "
              f"by the median; {min(cpu):.3f} and {statistics.median(cpu):.3f} CPU s of a rank", flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("parts", nargs="*", default=["tokens", "scheduler", "training"])
    p.add_argument("--repeats", type=int, default=3, help="of the tokens")
    p.add_argument("--seconds", type=float, default=5.0, help="of a simulated task")
    p.add_argument("--rounds", type=int, default=4, help="tasks for each simulated worker")
    args = p.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if "tokens" in args.parts:
            tokens(Path(folder), args.repeats)
        if "scheduler" in args.parts:
            scheduler(args.seconds, args.rounds)
        if "training" in args.parts:
            training(Path(folder))


if __name__ == "__main__":
    main()
