"""A small real training: the project's Transformer on a fixed Markov chain, as an objective and as a step of the loop.

`TinyLM` serves the engines and the loop; its config plants failures.  `training_step` wraps it in a step, `build` runs one;
`train_on_two` runs two ranks of the loop without Ray, `of_two_ranks` anything on two.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from audiolm import rng
from audiolm.config.run import ClusterConfig
from audiolm.config.training import TrainConfig
from audiolm.dag.execute import execute
from audiolm.dag.plan import plan
from audiolm.dag.step import Step
from audiolm.models.lm.block import TransformerSizes
from audiolm.models.lm.transformer import Transformer
from audiolm.train.engine import all_sum, make_engine
from audiolm.train.loop import run_worker, train
from audiolm.train.rank import TrainJob
from tests.worlds.basics import free_port

VOCAB, LENGTH = 17, 24


class Gradients:
    """An engine that keeps the gradients and changes nothing."""

    def __init__(self, module):
        self.module = module

    def __call__(self, *args):
        return self.module(*args)

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.taken = torch.cat([p.grad.flatten() for p in self.module.parameters()])
        self.module.zero_grad()
        return float(self.taken.norm())


def learn(o, steps):
    """Trains an objective for some steps on whole batches of 8; returns the losses of its updates."""
    engines = {name: make_engine(module, o.shape.train, o.ctx) for name, module in o.modules.items()}
    return [float(o.train_step(engines, [o.load(step, range(8))], step)["loss"]) for step in range(steps)]


class TinyLM:
    unit = "tokens"

    def __init__(self, config, inputs, ctx):
        self.ctx = ctx
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.derive(ctx.seed, "tiny"))
            self.modules = {"model": Transformer(TransformerSizes(VOCAB, 32, 2, 2, 64, config.get("dropout", 0.1)))}
        self.fail_at, self.spoil = config.get("fail_at"), config.get("spoil", {})  # {what: after which step}
        self.noisy, self.without = config.get("noisy", ()), config.get("without", ())  # batches of noise, batches left out

    def _ids(self, purpose, step, row):
        draw = rng.generator(self.ctx.seed, purpose, step, row)
        jumps = np.where(draw.random(LENGTH) < (0.0 if purpose == "row" and step in self.noisy else 0.8), 3,
                         draw.integers(VOCAB, size=LENGTH))
        return np.cumsum(jumps) % VOCAB

    def load(self, step, rows):
        step = [b for b in range(step + len(self.without) + 1) if b not in self.without][step]
        return torch.from_numpy(np.stack([self._ids("row", step, r) for r in rows]))

    def train_step(self, engines, batches, step):
        if self.fail_at == step:
            raise ValueError(f"planted at step {step}")
        engine = engines["model"]
        n = all_sum(torch.tensor(float(sum(b[:, 1:].numel() for b in batches))))
        total = torch.zeros(())
        for ids_BT in batches:
            loss = F.cross_entropy(engine(ids_BT)[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum")
            engine.backward(loss * self.ctx.world / n)
            total += loss.detach()
        norm = engine.step()
        if self.spoil.get("weights") == step:
            with torch.no_grad():
                next(engine.module.parameters())[0] = float("nan")
        return {"loss": all_sum(total) / n, "units": n, "grad_norm": norm}

    @torch.no_grad()
    def evaluate(self):
        model = self.modules["model"].eval()
        ids_BT = torch.from_numpy(np.stack([self._ids("val", 0, r) for r in range(8)]))
        loss = F.cross_entropy(model(ids_BT)[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
        model.train()
        return {"loss": float("nan") if "validation" in self.spoil else float(loss)}

    def export(self):
        return self.modules["model"].state_dict(), {"vocab": VOCAB}


def tiny_lm(config, inputs, ctx):
    return TinyLM(config, inputs, ctx)


def settings(**changes):
    return TrainConfig(**{"steps": 12, "batch": 8, "lr": 3e-3, "warmup_steps": 2, "decay_steps": 4, "eval_every": 5,
                          "save_every": 3, "keep": 2, "log_every": 2, "engine": "torch", **changes})


SPOILED = {"noisy": tuple(range(12, 99))}  # noise from step 12 on undoes what was learned


def training_step(fail_at=None, objective=None, **changes):
    cluster = ClusterConfig(threads=1, device="cpu")
    cfg = settings(**changes)

    def fn(config, inputs, out):
        return train(tiny_lm, {"seed": 0, "fail_at": fail_at, **(objective or {})}, cfg, inputs, out, cluster=cluster)

    return Step("tiny", fn, {"train": cfg}, trains=cfg)


def build(step, store):
    execute(plan([step], store), store, inline=True)
    return plan([step], store)[0].state.artifact


def train_on_two(job: TrainJob) -> None:
    workers = torch.multiprocessing.spawn(_rank, (free_port(), job), nprocs=2, join=False)
    assert any(workers.join(120) for _ in range(3))  # a call returns when one of them has ended


def _rank(rank, port, job):
    os.environ["LOCAL_RANK"] = str(rank)  # as Ray Train sets it; DeepSpeed asks for it
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    run_worker(job, rank, 2)
    torch.distributed.destroy_process_group()


def of_two_ranks(results: Callable[..., Iterator[tuple]], *args: Any, n: int, patience_s: float) -> dict:
    """{key: value}, n of them, that `results(rank, world, *args)` yields on rank 0 of two; without those that do not come."""
    context, port, found = torch.multiprocessing.get_context("spawn"), free_port(), {}
    answers = context.Queue()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("LOCAL_RANK", "0")  # as Ray Train sets it; DeepSpeed asks for it
        workers = [context.Process(target=_answer, args=(r, port, answers, results, args)) for r in range(2)]
        for w in workers:
            w.start()
    try:
        while len(found) < n:
            key, found[key] = answers.get(timeout=patience_s)
    except queue.Empty:
        pass  # the tests of the missing ones fail
    for w in workers:
        w.join(10)
        w.terminate()
    return found


def _answer(rank: int, port: int, answers: Any, results: Callable[..., Iterator[tuple]], args: tuple) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for key, value in results(rank, 2, *args):
        if rank == 0:
            answers.put((key, value))
    answers.close()
    answers.join_thread()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
