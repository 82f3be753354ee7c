"""One rank of a training: it resumes from a checkpoint, updates, validates and saves; the loop calls its sections in order.

Every method is called by all ranks, as each contains collective operations; what rank 0 does alone says so.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from audiolm import rng
from audiolm.config.training import TrainConfig
from audiolm.dag.lease import check_lease
from audiolm.metrics_log import MetricsFile
from audiolm.models.compiled import keep_compiled
from audiolm.store import get_json, join, put_json
from audiolm.tokenizers.artifact import write_export
from audiolm.train import checkpoint, guards
from audiolm.train.commits import newest, path_of
from audiolm.train.engine import learning_rate, load_weights, make_engine
from audiolm.train.hardware import matmul_rate, micro_batch
from audiolm.train.objectives.base import Context, Factory


@dataclass(frozen=True)
class TrainJob:
    """A training as its workers get it, pickled whole."""

    factory: Factory
    config: Mapping[str, Any]  # of the objective
    train: TrainConfig
    inputs: Mapping[str, str]  # paths of the builds that the step reads
    build: str  # path of the step's own build
    attempt: int  # number of the driver's lease
    path: str  # of the attempt's outputs: the export and final.json
    metrics: str  # path of this attempt's metrics file
    seed: int
    device: str  # "cuda" or "cpu"
    threads: int  # of torch, a worker
    cache_mb: int  # of decoded audio, a worker
    compile: bool


class Best(NamedTuple):
    """The lowest validation loss so far, and the step after which it was measured; keys of commits and final.json."""

    best_step: int | None = None
    best_loss: float = math.inf


@dataclass
class LoopState:
    """Progress of a training, the same on every rank; a checkpoint's commit restores all but the last three fields."""

    done: int = 0  # updates
    best: Best = Best()
    trunk_best: Best = Best()  # by the validations that a run of any length makes: those at multiples of eval_every
    validation: dict[str, float] = field(default_factory=dict)  # the newest
    validated: float | None = None  # its time, epoch seconds; rank 0 alone
    logged: int = 0  # updates at the last log
    clock: float = 0.0  # monotonic seconds at the last log
    units: Any = 0.0  # trained on since the last log, on the device

    def restart_clock(self) -> None:
        self.clock, self.logged, self.units = time.monotonic(), self.done, 0.0


class Worker:
    """One rank of a training: its modules under engines, its state, and the sections of a step."""

    def __init__(self, job: TrainJob, rank: int, world: int, metrics: MetricsFile | None,
                 skipped: list[dict[str, int]] | None):
        """Starts from the build's newest checkpoint where there is one. `metrics` is rank 0's alone."""
        self.job, self.metrics, cfg, cuda = job, metrics, job.train, job.device == "cuda"
        torch.set_num_threads(job.threads)
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        # ZeRO 3 gathers a layer's weights in hooks around its forward pass, which torch.compile would cut into pieces.
        sharded = cfg.engine == "deepspeed" and cfg.zero == 3
        self.ctx = ctx = Context(rank, world, device, job.seed, job.cache_mb, job.compile and not sharded)
        if ctx.compile:
            keep_compiled()
        torch.manual_seed(rng.derive(job.seed, "init"))  # the same weights on every rank
        self.objective = objective = job.factory(job.config, job.inputs, ctx)
        if sharded and len(objective.modules) > 1:
            raise ValueError(f"train.zero 3 needs a step of one module, and this one has {', '.join(objective.modules)}: set "
                             "train.zero to 2")
        self.micro = micro_batch(cfg, objective, ctx)  # rows a forward pass, tried before engines take the memory
        self.saver = self._saver() if rank == 0 else None

        # Resume: every rank reads the checkpoint's weights and moments, and ZeRO keeps its part of them.
        commit = newest(job.build)
        best = Best(commit["best_step"], commit["best_loss"]) if commit else Best()
        self.state = LoopState(commit["step"], best, best, commit["validation"], commit.get("validated")) if commit \
            else LoopState()
        self.engines = {name: make_engine(module, cfg, ctx, checkpoint.load(job.build, commit, name) if commit else None,
                                          commit["updates"][name] if commit else 0)
                        for name, module in objective.modules.items()}
        self.spikes = guards.SpikeGuard(cfg, commit, skipped)
        flops = getattr(objective, "flops_per_unit", None) if cuda else None
        self.mfu_per_unit = flops / (matmul_rate(device) * world) if flops else None  # seconds of all GPUs at full rate
        self.state.restart_clock()

    def _saver(self) -> checkpoint.Saver:
        cfg, exported = self.job.train, getattr(self.objective, "exported", None)
        return checkpoint.Saver(self.job.build, self.job.attempt, cfg.keep, cfg.trunk_steps,
                                exported and (exported, self.objective.export()[1]), self.metrics.flush)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Within the block every module's weights are whole (Engine.gathered). All ranks take part."""
        with contextlib.ExitStack() as stack:
            for engine in self.engines.values():
                stack.enter_context(engine.gathered())
            yield

    def load(self, step: int) -> list:
        """This rank's rows of a step's global batch, in micro-batches; called in the loader's thread."""
        share = self.job.train.batch // self.ctx.world
        rows = range(self.ctx.rank * share, (self.ctx.rank + 1) * share)
        batch = guards.batch_number(step, self.spikes.skipped)
        return [self.objective.load(batch, rows[i:i + self.micro]) for i in range(0, share, self.micro)]

    def update(self, batches: list, step: int) -> dict[str, torch.Tensor]:
        """One update of every engine; all ranks take part. Returns the step's scalars, still on the device."""
        lr = learning_rate(self.job.train, step)
        for engine in self.engines.values():
            engine.set_lr(lr)
        # Dropout: seeded anew at every step, so that neither a resume nor a validation in between changes a draw.
        torch.manual_seed(rng.derive(self.job.seed, "step", step, self.ctx.rank))
        result = self.objective.train_step(self.engines, batches, step)
        self.state.done = step + 1
        self.state.units = self.state.units + result.pop("units")
        self.spikes.add(step, result["loss"])
        return result

    def log(self, result: Mapping[str, torch.Tensor]) -> None:
        """Checks the losses since the last log on all ranks, and writes a row of metrics on rank 0."""
        state, cfg = self.state, self.job.train
        self.spikes.check()  # the same decision on every rank, from losses that are already reduced
        values = {k: float(v) for k, v in result.items()}
        guards.check_loss(values["loss"], "loss", state.done, cfg)
        elapsed_s = time.monotonic() - state.clock
        per_s = float(state.units) / elapsed_s
        if self.metrics:
            self.metrics.add(state.done, {
                **values, "lr": learning_rate(cfg, state.done - 1), "units_per_s": per_s,
                "step_s": elapsed_s / (state.done - state.logged),
                **({"mfu": per_s * self.mfu_per_unit} if self.mfu_per_unit else {}),
                **({"audio": 1.0} if self.objective.unit == "audio s" else {})})
        state.restart_clock()

    def validate(self) -> bool:
        """Validates on all ranks; True where the loss is the lowest so far."""
        state, cfg = self.state, self.job.train
        with self.gathered():  # ranks have different numbers of clips
            scores = self.objective.evaluate()
        state.validation = {"step": state.done, **scores}
        guards.check_loss(scores.get("loss", 0.0), "validation loss", state.done, cfg)
        improved = scores.get("loss", math.inf) < state.best.best_loss
        if improved:
            state.best = Best(state.done, scores["loss"])
        if state.done % cfg.eval_every == 0:
            state.trunk_best = state.best
        if self.metrics:
            state.validated = self.metrics.add(state.done, {f"val.{k}": v for k, v in scores.items()})
        state.restart_clock()  # a validation is not training time
        return improved

    def save(self) -> None:
        """Gathers the state on all ranks; rank 0 hands it to the saver, which writes it while training goes on."""
        state = self.state
        guards.check_weights(self.objective.modules, state.done, self.job.train)
        if self.saver:
            self.saver.wait()  # one copy of the state at a time
        states = {name: engine.state() for name, engine in self.engines.items()}
        if not self.saver:
            return
        # Up to the decay, runs of any length are the same.  A checkpoint of that trunk records the best that each of them
        # would know by then, so that a longer run can begin here.
        on_trunk = state.done <= self.job.train.trunk_steps
        self.saver.save(state.done, states, {
            **state.best._asdict(), "validation": state.validation, "validated": state.validated,
            "updates": {name: engine.updates for name, engine in self.engines.items()},
            **self.spikes.record(), **({"trunk": state.trunk_best._asdict()} if on_trunk else {})})


def export(worker: Worker) -> None:
    """Writes what later steps load, the last weights or the best by validation loss, then final.json. Rank 0 alone."""
    job, objective, state = worker.job, worker.objective, worker.state
    step, validation, best = state.done, state.validation, state.best
    if job.train.export == "best" and best.best_step not in (None, step):
        commit = get_json(path_of(job.build, best.best_step))
        for name, module in objective.modules.items():
            load_weights(module, checkpoint.load(job.build, commit, name))
        step, validation = best.best_step, commit["validation"]
    write_export(job.path, *objective.export())
    parameters = sum(p.numel() for m in objective.modules.values() for p in m.parameters())
    worker.metrics.flush()
    check_lease(job.build, job.attempt)
    put_json(join(job.path, "final.json"), {  # last: from now on the step is done
        "steps": state.done, "exported_step": step, **best._asdict(), "parameters": parameters, **worker.spikes.facts(),
        **guards.stop_facts(job.train, state.done, best.best_step),
        **{f"val.{k}": v for k, v in validation.items() if k != "step"}})
