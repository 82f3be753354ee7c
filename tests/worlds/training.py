"""A training step on the tiny language model, run through plan and execution."""

from __future__ import annotations

from audiolm.config.run import ClusterConfig
from audiolm.config.training import TrainConfig
from audiolm.dag.execute import execute
from audiolm.dag.plan import plan
from audiolm.dag.step import Step
from audiolm.train.loop import train
from tests.worlds.tiny import tiny_lm


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
