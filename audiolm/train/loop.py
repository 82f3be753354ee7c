"""One training loop for masked model, codec and language models (DESIGN 1.5, 1.6).

The loop owns time: engines, learning rate, checkpoints, logs, resume; an Objective owns a step.  `train` starts Ray
Train's TorchTrainer, or runs the same worker function in this process (`--inline`).  Every draw depends on (seed,
step), so that a resumed run equals an uninterrupted one bit for bit on CPU at the same world size.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from audiolm import rng
from audiolm.config.run import ClusterConfig
from audiolm.config.training import TrainConfig
from audiolm.dag.lease import check_lease
from audiolm.data.parallel import cluster_device
from audiolm.metrics_log import MetricsFile, read_from
from audiolm.store import get_json, is_local, join, open_fs, put_json
from audiolm.tokenizers.artifact import write_export
from audiolm.train import checkpoint, guards
from audiolm.train.commits import newest, path_of, take_over
from audiolm.train.engine import learning_rate, load_weights, make_engine
from audiolm.train.hardware import matmul_rate, micro_batch
from audiolm.train.objectives.base import Context, Factory

LEASE_CHECK_S = 10.0


@dataclass(frozen=True)
class TrainJob:
    """What a training worker is told; travels to it whole."""

    factory: Factory
    config: Mapping[str, Any]
    train: TrainConfig
    inputs: Mapping[str, str]
    build: str
    attempt: int
    metrics: str
    seed: int
    device: str
    threads: int
    cache_mb: int
    compile: bool


def train(factory: Factory, config: Mapping[str, Any], train: TrainConfig, inputs: Mapping[str, Any], out, *,
          cluster: ClusterConfig, seed: int) -> dict:
    """Trains to the end (resuming this build's newest checkpoint) and returns the facts of {build}/final.json, which is
    written last: where it stands, nothing is left to do."""
    if final := get_json(join(out.path, "final.json")):
        return final
    world = 1 if out.inline else cluster.train_workers
    device = cluster_device(cluster, out.inline, world)
    if train.batch % world:
        raise ValueError(f"{out.step.name}: batch {train.batch} is not divisible by cluster.train_workers {world}")
    threads = cluster.threads or max(1, (os.cpu_count() or 1) // world)
    job = TrainJob(factory, config, train, {k: a.path for k, a in inputs.items()}, out.path, out.attempt, out.metrics_path,
              seed, device, threads, cluster.audio_cache_mb, cluster.compile and device == "cuda")
    take_over(out.path, out.attempt, out.kin, train.trunk_steps)
    out.progress(0, train.steps, "steps", "starting workers")
    with watch(job, out):
        if out.inline:
            run_worker(job, 0, 1, out.check)
        else:
            _fit(job, world, threads, out)
    final = get_json(join(out.path, "final.json"))
    if final is None:
        raise RuntimeError(f"{out.step.name}: training ended without {out.path}/final.json; run it again")
    return final


def _fit(job: TrainJob, world: int, threads: int, out) -> None:
    import ray.train
    from ray.train.torch import TorchTrainer

    gpu = job.device == "cuda"
    cpus = max(1, min(threads, int(ray.cluster_resources().get("CPU", 1)) // world))
    storage = join(job.build, "ray")
    fs, path = open_fs(storage)
    remote = None
    if not is_local(storage):  # one S3 client for everything: fsspec's, with the environment's endpoint and keys
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        remote = PyFileSystem(FSSpecHandler(fs))
    trainer = TorchTrainer(
        _ray_worker, train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(num_workers=world, use_gpu=gpu, resources_per_worker={
            "CPU": cpus, **({"GPU": 1} if gpu else {})}),
        run_config=ray.train.RunConfig(name=f"attempt-{job.attempt:04d}", storage_path=path, storage_filesystem=remote,
                                       failure_config=ray.train.FailureConfig(max_failures=0)))
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as e:  # Ray wraps the worker's error; its own text is what a user can act on
        error = next(iter(e.worker_failures.values()))
        raise getattr(error, "_base_exc", error) from e


def _ray_worker(config: dict) -> None:
    import ray.train

    context = ray.train.get_context()
    run_worker(config["job"], context.get_world_rank(), context.get_world_size())


class watch:
    """Turns the workers' metrics file into the driver's progress, while the block runs."""

    def __init__(self, job: TrainJob, out):
        self.job, self.out, self.stop = job, out, threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self.thread.start()

    def __exit__(self, *exc):
        self.stop.set()
        self.thread.join()

    def _run(self) -> None:
        offset, done, note, alarm, quiet = 0, 0, "starting workers", "", 0
        while not self.stop.wait(1.0):
            try:
                rows, offset = read_from(self.job.metrics, offset)
                for row in rows:
                    m = row["metrics"]
                    if "loss" in m:
                        done, note = row["step"], f"loss {m['loss']:.3f}"
                    if "units_per_s" in m:
                        note += f", {m['units_per_s']:,.0f} {self.job_unit(m)}/s"
                    if "rollbacks" in m:
                        note = f"rolled back from step {row['step']}, where the loss spiked"
                    if any(k.startswith("val.") for k in m):
                        alarm = "".join(f", ALARM {k.removeprefix('val.alarm/')} {v:g}" for k, v in m.items()
                                        if k.startswith("val.alarm/") and v > 0)
                if rows or quiet >= 10:
                    self.out.progress(done, self.job.train.steps, "steps", note + alarm)
                quiet = 0 if rows else quiet + 1
            except Exception:  # noqa: BLE001  progress is a courtesy; a lost lease is found by the workers
                continue

    @staticmethod
    def job_unit(metrics: dict) -> str:
        return "audio s" if "audio" in metrics else "tokens"


def run_worker(job: TrainJob, rank: int, world: int, check: Callable[[], None] = lambda: None) -> None:
    """One rank's whole run, begun again from the newest checkpoint where the loss spikes (train.rollback)."""
    metrics = MetricsFile(job.metrics) if rank == 0 else None
    skipped = None
    try:
        while True:
            try:
                return _run(job, rank, world, check, metrics, skipped)
            except guards.LossSpike as e:  # on every rank
                skipped = e.skipped
                if metrics:
                    metrics.add(e.step + 1, {"rollbacks": len(skipped)})
            gc.collect()  # the old engines
            if world > 1:
                dist.barrier()  # rank 0 has committed what it was going to
    finally:
        if metrics:
            metrics.close()


def _run(job: TrainJob, rank: int, world: int, check: Callable[[], None], metrics: MetricsFile | None,
         skipped: list[dict[str, int]] | None) -> None:
    """Trains to the end; all ranks take part in every step, evaluation and save."""
    torch.set_num_threads(job.threads)
    device = torch.device("cuda", torch.cuda.current_device()) if job.device == "cuda" else torch.device("cpu")
    cfg = job.train
    sharded = cfg.engine == "deepspeed" and cfg.zero == 3
    ctx = Context(rank, world, device, job.seed, job.cache_mb, job.compile and not sharded)
    torch.manual_seed(rng.derive(job.seed, "init"))
    objective = job.factory(job.config, job.inputs, ctx)
    if sharded and len(objective.modules) > 1:
        raise ValueError(f"train.zero 3 needs a step of one module, and this one has {', '.join(objective.modules)}: set "
                         "train.zero to 2")
    micro = micro_batch(cfg, objective, ctx)
    exported = getattr(objective, "exported", None)
    saver = checkpoint.Saver(job.build, job.attempt, cfg.keep, cfg.trunk_steps, exported and (
        exported, objective.export()[1])) if rank == 0 else None
    commit = newest(job.build)
    start = done = commit["step"] if commit else 0
    best = {"step": commit["best_step"], "loss": commit["best_loss"]} if commit else {"step": None, "loss": math.inf}
    regular = best  # by validations that a run of any length makes
    validation, validated = (commit["validation"], commit.get("validated")) if commit else ({}, None)
    engines = {name: make_engine(module, cfg, ctx, checkpoint.load(job.build, commit, name) if commit else None,
                                 commit["updates"][name] if commit else 0)
               for name, module in objective.modules.items()}
    spikes = guards.SpikeGuard(cfg, commit, skipped)
    share = cfg.batch // world
    rows = range(rank * share, (rank + 1) * share)
    flops = getattr(objective, "flops_per_unit", None) if job.device == "cuda" else None
    full_rate = matmul_rate(device) * world if flops else None

    def load(step: int) -> list:
        batch = guards.rows_of(step, spikes.skipped)
        return [objective.load(batch, rows[i:i + micro]) for i in range(0, share, micro)]

    checked = clock = time.monotonic()
    logged, units = start, 0.0
    with ThreadPoolExecutor(1) as loader, saver or contextlib.nullcontext():
        end = start if guards.out_of_patience(cfg, start, best["step"]) else cfg.steps  # it may have been killed at its last step
        pending = loader.submit(load, start) if start < end else None
        for step in range(start, end):
            batches, done = pending.result(), step + 1
            if done < cfg.steps:
                pending = loader.submit(load, done)
            lr = learning_rate(cfg, step)
            for engine in engines.values():
                engine.set_lr(lr)
            torch.manual_seed(rng.derive(job.seed, "step", step, rank))  # dropout
            result = objective.train_step(engines, batches, step)
            units = units + result.pop("units")
            spikes.add(step, result["loss"])
            save, last = done % cfg.save_every == 0 or done == cfg.trunk_steps, done == cfg.steps
            log = done % cfg.log_every == 0 or last or done == start + 1
            if log or save or done % cfg.eval_every == 0:  # nothing is kept of a loss that was not looked at
                spikes.look()
                values = {k: float(v) for k, v in result.items()}
                guards.check_loss(values["loss"], "loss", done, cfg)
                now = time.monotonic()
                per_s = float(units) / (now - clock)
                if metrics:
                    metrics.add(done, {**values, "lr": lr, "units_per_s": per_s, "step_s": (now - clock) / (done - logged),
                                       **({"mfu": per_s * flops / full_rate} if flops else {}),
                                       **({"audio": 1.0} if objective.unit == "audio s" else {})})
                clock, logged, units = now, done, 0.0
            improved = False
            if done % cfg.eval_every == 0 or last:
                pending.result()  # the loader's cache is not shared with a running load
                validation = {"step": done, **objective.evaluate()}
                guards.check_loss(validation.get("loss", 0.0), "validation loss", done, cfg)
                improved = validation.get("loss", math.inf) < best["loss"]
                if improved:
                    best = {"step": done, "loss": validation["loss"]}
                regular = best if done % cfg.eval_every == 0 else regular
                if metrics:
                    validated = metrics.add(done, {f"val.{k}": v for k, v in validation.items() if k != "step"})
                clock, logged, units = time.monotonic(), done, 0.0
                last = last or guards.out_of_patience(cfg, done, best["step"])
            if save or last or improved:
                guards.check_weights(objective.modules, done, cfg)
                if saver:
                    saver.wait()  # one copy of the state at a time
                states = {name: engine.state() for name, engine in engines.items()}
                if saver:
                    trunk = {"best_step": regular["step"], "best_loss": regular["loss"]}
                    saver.save(done, states, {
                        "best_step": best["step"], "best_loss": best["loss"], "validation": validation,
                        "validated": validated, "updates": {name: engine.updates for name, engine in engines.items()},
                        **spikes.record(), **({"trunk": trunk} if done <= cfg.trunk_steps else {})})
                del states
            if saver:
                saver.check()
            if time.monotonic() - checked > LEASE_CHECK_S:
                checked = time.monotonic()
                check()
                if rank == 0:
                    check_lease(job.build, job.attempt)
            if last:
                break
    with contextlib.ExitStack() as whole:
        for engine in engines.values():
            whole.enter_context(engine.gathered())
        if rank == 0:
            _finish(job, objective, done, best, validation, spikes.facts())


def _finish(job: TrainJob, objective, done: int, best: dict, validation: dict, facts: dict) -> None:
    """Exports what later steps load: the last weights, or the best by validation loss. Rank 0 only."""
    step = done
    if job.train.export == "best" and best["step"] is not None and best["step"] != step:
        commit = get_json(path_of(job.build, best["step"]))
        for name, module in objective.modules.items():
            load_weights(module, checkpoint.load(job.build, commit, name))
        step, validation = best["step"], commit["validation"]
    write_export(job.build, *objective.export())
    parameters = sum(p.numel() for m in objective.modules.values() for p in m.parameters())
    check_lease(job.build, job.attempt)
    put_json(join(job.build, "final.json"), {
        "steps": done, "exported_step": step, "best_step": best["step"], "best_loss": best["loss"],
        "parameters": parameters, **facts, **guards.stop_facts(job.train, done, best["step"]),
        **{f"val.{k}": v for k, v in validation.items() if k != "step"}})
