"""One training loop for masked model, codec, vocoder and language models.

The loop owns time: engines, learning rate, checkpoints, logs, resume; an Objective owns a step.  `train` starts Ray
Train's TorchTrainer; a single worker is a Ray task, and with `--inline` a call in this process.  Every draw depends on
(seed, step), so that a resumed run equals an uninterrupted one bit for bit on CPU at the same world size.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from audiolm.config.run import ClusterConfig
from audiolm.config.training import TrainConfig
from audiolm.dag.lease import check_lease
from audiolm.data.parallel import cluster_device
from audiolm.metrics_log import MetricsFile, read_from
from audiolm.store import clean_up, get_json, is_local, join, open_fs, patience
from audiolm.train import guards
from audiolm.train.commits import copy_trunk, drop_damaged, remove_uncommitted
from audiolm.train.objectives.base import Factory
from audiolm.train.rank import TrainJob, Worker, export

LEASE_CHECK_S = 10.0  # between looks at the lease, as often as its owner's heartbeat


def train(factory: Factory, config: Mapping[str, Any], train: TrainConfig, inputs: Mapping[str, Any], out, *,
          cluster: ClusterConfig) -> dict:
    """Trains to the end, from this build's newest checkpoint where there is one; returns the facts of final.json.

    `config` is the objective's and has the "seed".  final.json is written last: a build that has it is done.  The driver
    alone calls this.
    """
    if final := get_json(join(out.path, "final.json")):
        return final
    world = 1 if out.inline else cluster.train_workers
    device = cluster_device(cluster, out.inline, world)
    if train.batch % world:
        raise ValueError(f"{out.step.name}: batch {train.batch} is not divisible by cluster.train_workers {world}")
    threads = cluster.threads or max(1, (os.cpu_count() or 1) // world)
    job = TrainJob(factory, config, train, {k: a.path for k, a in inputs.items()}, out.build, out.attempt, out.path,
                   out.metrics_path, config["seed"], device, threads, cluster.audio_cache_mb,
                   cluster.compile and device == "cuda")
    clean_up(None, lambda: remove_uncommitted(out.build, out.attempt))
    for remark in (remarks := drop_damaged(out.build, with_best=train.export == "best")):
        logging.getLogger(__name__).warning(remark)
    # Before any worker starts: a longer run of the same trunk may have checkpoints that this one can begin from.
    copy_trunk(out.build, out.attempt, out.siblings, train.trunk_steps)
    out.progress(0, train.steps, "steps", "starting workers")
    with report_progress(job, out):
        if out.inline:
            run_worker(job, 0, 1, out.check)
        elif world == 1:
            _as_task(job, threads, out)
        else:
            _fit(job, world, threads, out)
    final = get_json(join(out.path, "final.json"))
    if final is None:
        raise RuntimeError(f"{out.step.name}: training ended without {out.path}/final.json; run it again")
    return {**final, "notes": [*final.get("notes", ()), *remarks]} if remarks else final


def _as_task(job: TrainJob, threads: int, out) -> None:
    """Runs a single worker as a Ray task; the driver waits. Raises the worker's own error.

    Ray Train would start five more processes, each with its imports; on a CPU Ray gives a task the process of an earlier one.
    """
    import ray

    cpus = max(1, min(threads, int(ray.cluster_resources().get("CPU", 1))))
    task = ray.remote(num_cpus=cpus, num_gpus=int(job.device == "cuda"), max_retries=0)(run_worker)
    try:
        ray.get(task.options(name=out.name).remote(job, 0, 1))
    except ray.exceptions.RayTaskError as e:
        raise e.cause from None


def _fit(job: TrainJob, world: int, threads: int, out) -> None:
    """Runs the workers under Ray Train; the driver waits. Raises a dead worker's error, else the first failed worker's own."""
    import ray.train
    from ray.train.torch import TorchTrainer

    gpu = job.device == "cuda"
    cpus = max(1, min(threads, int(ray.cluster_resources().get("CPU", 1)) // world))
    storage = join(job.build, "ray")  # Ray's own records; checkpoints do not pass through Ray
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
                                       # The step is retried as a whole, with a new lease, from its newest checkpoint.
                                       failure_config=ray.train.FailureConfig(max_failures=0)))
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as e:  # Ray wraps the worker's error; its own text is what a user can act on
        errors = list(e.worker_failures.values())  # after one worker's death the others fail in what they wait for
        error = next((x for x in errors if type(x).__module__.startswith("ray.")), errors[0])
        raise getattr(error, "_base_exc", error) from e


def _ray_worker(config: dict) -> None:
    import ray.train

    context = ray.train.get_context()
    run_worker(config["job"], context.get_world_rank(), context.get_world_size())


@contextlib.contextmanager
def report_progress(job: TrainJob, out) -> Iterator[None]:
    """Turns the workers' metrics file into the driver's progress while the block runs, in a thread of the driver."""
    stop = threading.Event()
    thread = threading.Thread(target=_follow_metrics, args=(job, out, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _follow_metrics(job: TrainJob, out, stop: threading.Event) -> None:
    # Once a second; without news every 10 s, so that the driver's clock moves on.
    offset, done, note, alarm, quiet_s = 0, 0, "starting workers", "", 0
    while not stop.wait(1.0):
        try:
            with patience(LEASE_CHECK_S):
                rows, offset = read_from(job.metrics, offset)
            for row in rows:
                m = row["metrics"]
                if "loss" in m:
                    done, note = row["step"], f"loss {m['loss']:.3f}"
                if "units_per_s" in m:
                    note += f", {m['units_per_s']:,.0f} {'audio s' if 'audio' in m else 'tokens'}/s"
                if "rollbacks" in m:
                    note = f"rolled back from step {row['step']}, where the loss spiked"
                if any(k.startswith("val.") for k in m):  # an alarm stays until the next validation
                    alarm = "".join(f", ALARM {k.removeprefix('val.alarm/')} {v:g}" for k, v in m.items()
                                    if k.startswith("val.alarm/") and v > 0)
            if rows or quiet_s >= 10:
                out.progress(done, job.train.steps, "steps", note + alarm)
            quiet_s = 0 if rows else quiet_s + 1
        except Exception:  # noqa: BLE001  progress is a courtesy; a lost lease is found by the workers
            continue


def run_worker(job: TrainJob, rank: int, world: int, check: Callable[[], None] = lambda: None) -> None:
    """One rank's whole run, begun again from the newest checkpoint where the loss spikes (train.rollback).

    All ranks call it.  `check` raises where the driver wants the training to stop (--inline).
    """
    metrics = MetricsFile(job.metrics) if rank == 0 else None
    skipped = None
    guards.alive()
    try:
        while True:
            try:
                _run(job, rank, world, check, metrics, skipped)
                break
            except guards.LossSpike as e:  # on every rank, as all see the same reduced loss
                skipped = e.skipped
                if metrics:
                    metrics.add(e.step + 1, {"rollbacks": len(skipped)})
            gc.collect()  # frees the old engines before new ones are made
            if world > 1:
                dist.barrier()  # rank 0 has committed the checkpoint it was writing: all ranks go back to the same one
    except BaseException as e:
        if metrics:
            clean_up(e, metrics.close)
        raise
    finally:
        guards.ended()
    if metrics:
        metrics.close()


def _run(job: TrainJob, rank: int, world: int, check: Callable[[], None], metrics: MetricsFile | None,
         skipped: list[dict[str, int]] | None) -> None:
    """One attempt at the whole training; all ranks take part in every step, validation and save."""
    # Set up and resume: the same weights on every rank, from the seed or from the newest checkpoint.
    worker = Worker(job, rank, world, metrics, skipped)

    # Train. The saver's end waits for the last checkpoint.
    with worker.saver or contextlib.nullcontext():
        _train_steps(worker, check)

    # Finish: under ZeRO 3 each rank holds a part of the weights, so all ranks gather them and rank 0 exports.
    with worker.gathered():
        if rank == 0:
            export(worker)


def _train_steps(worker: Worker, check: Callable[[], None]) -> None:
    """Steps from the state's to the last one, or to the end of the patience."""
    job, cfg, state = worker.job, worker.job.train, worker.state
    start, checked = state.done, time.monotonic()
    if guards.out_of_patience(cfg, start, state.best.best_step):
        return  # it was killed behind its last step, before its export
    with ThreadPoolExecutor(1, "loader") as loader:
        pending = loader.submit(worker.load, start) if start < cfg.steps else None
        for step in range(start, cfg.steps):
            guards.alive()
            # Data: a thread reads the next step's rows while this step trains.
            batches, done = pending.result(), step + 1
            if done < cfg.steps:
                pending = loader.submit(worker.load, done)

            # Update: no number is read from the device, so that its queue stays full.
            result = worker.update(batches, step)
            last = done == cfg.steps
            validate = done % cfg.eval_every == 0 or last
            save = done % cfg.save_every == 0 or done == cfg.trunk_steps  # the trunk's end: longer runs begin there
            log = done % cfg.log_every == 0 or done == start + 1

            # Guards and log: before anything is saved, so that no checkpoint keeps a loss that was not checked.
            if log or save or validate:
                worker.log(result)

            # Validation: each rank scores its share of the held-out clips.
            improved = False
            if validate:
                pending.result()  # the loader's cache is not shared with a running load
                improved = worker.validate()
                last = last or guards.out_of_patience(cfg, done, state.best.best_step)

            # Checkpoint: all ranks gather the state, rank 0 writes it in a thread.
            if save or last or improved:
                worker.save()
            if worker.saver:
                worker.saver.check()

            # Lease: a worker whose build was taken over stops within LEASE_CHECK_S.
            if time.monotonic() - checked > LEASE_CHECK_S:
                checked = time.monotonic()
                check()
                if worker.ctx.rank == 0:
                    check_lease(job.build, job.attempt)
            if last:
                break
