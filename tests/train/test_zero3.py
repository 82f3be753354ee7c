"""ZeRO 3 on two ranks, every weight split but while it is used: what the language models learn equals ZeRO 0.

Output heads, tied tables, the embedding as a table and free vectors are read outside of their own module's forward pass.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from audiolm.config.lm import DepthConfig, ParallelConfig, StageConfig
from audiolm.config.training import TrainConfig
from audiolm.metrics_log import MetricsFile
from audiolm.train import engine as engines
from audiolm.train import guards
from audiolm.train.objectives import lm, parallel
from audiolm.train.objectives.shared import data_of, stage_of
from audiolm.train.rank import TrainJob, Worker
from tests.worlds import token_corpus
from tests.worlds.training import of_two_ranks

KINDS = ["semantic t5", "coarse frame tied own", "parallel tied"]
CLIPS = 17  # of validation, a forward pass each in the parallel decoder: 9 on one rank and 8 on the other
BETA = 0.5  # of the first moment, which is then half of the first gradient


def objective(config, inputs, ctx):
    name, *traits = config["kind"].split()
    sizes = {"crop_s": 0.8, "dim": 32, "layers": 2, "heads": 2, "ff": 64, "dropout": 0.0, "train": config["train"]}
    layout = {"condition_dropout": 0.1, "tied": False}
    if name == "parallel":
        shape = ParallelConfig(**sizes)
    else:
        kind = "frame" if "frame" in traits else "flat"
        shape = StageConfig(**sizes, kind=kind, positions="t5" if "t5" in traits else "rotary", checkpointing="t5" in traits,
                            depth=DepthConfig(dim=16, ff=32), own=0.3 if "own" in traits else 0.0)
        layout |= {"dedupe": name == "semantic", "lengths": name == "semantic", "coarse_levels": 2,
                   "conditioning": "aligned" if kind == "frame" else "prefix"}
    config = {"stage": f"lm_{name}", "lm": shape, "layout": layout, "rows": CLIPS}
    stage = stage_of(config, inputs)
    levels = stage.slots if name == "parallel" else len(stage.columns)
    codes_QVE = torch.randn(levels, token_corpus.VOCAB, 4, generator=torch.Generator().manual_seed(0))
    made = parallel.ParallelObjective if name == "parallel" else lm.LMObjective
    return made(stage, shape, *data_of(config, inputs, stage, ctx), ctx, codes_QVE if "tied" in traits else None)


def trained(paths, folder, kind, zero, rank, world):
    """Gradients of the first step by name; losses and validations of two steps; whether weights were split afterwards, and
    whether one that is not finite is found there."""
    train = TrainConfig(steps=9, batch=8, lr=1e-3, clip=0, betas=(BETA, 0.9), engine="deepspeed", zero=zero, micro_batch=2)
    worker = Worker(TrainJob(objective, {"kind": kind, "train": train}, train, paths, f"{folder}/{kind} {zero}", 1, "", "",
                             1, "cpu", 1, 1, False), rank, world,
                    None if rank else MetricsFile(f"{folder}/metrics.jsonl"), None)
    engine, losses = worker.engines["lm"], []
    for step in range(2):
        losses.append(float(worker.update(worker.load(step), step)["loss"]))
        if step == 0:
            gradients = {k: v.numpy() / (1 - BETA) for k, v in engine.state().items() if k.startswith("exp_avg/")}
        worker.validate()
        losses.append(worker.state.validation["loss"])
    weight = engine.module.head.weight if hasattr(engine.module, "head") else engine.module.depth.head.weight
    split = weight.numel() == 0
    if rank == 1:
        getattr(weight, "ds_tensor", weight.detach())[0] = float("nan")
    with pytest.raises(FloatingPointError):
        guards.check_weights(worker.objective.modules, 2, train)
    return gradients, losses, split


def _zero_config(module, train, world, _given=engines._zero_config):
    """Keeps no weight longer than a module needs it, as for a model too large for one GPU."""
    config = _given(module, train, world)
    config["zero_optimization"] |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
                                    "stage3_prefetch_bucket_size": 0}
    return config


def kinds(rank, world, paths, folder):
    """((kind, ZeRO stage), `trained`) of one of two ranks."""
    engines.WHOLE_NUMEL, engines._zero_config = 0, _zero_config
    for kind in KINDS:
        for zero in (0, 3):
            yield (kind, zero), trained(paths, folder, kind, zero, rank, world)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """`trained` by kind and ZeRO stage."""
    folder = str(tmp_path_factory.mktemp("zero3"))
    corpus = token_corpus.make(folder, {"train": [60] * 8 + [17, 9, 5, 13], "dev": [20] * CLIPS}, runs=True)
    return of_two_ranks(kinds, corpus.paths, folder, n=2 * len(KINDS), patience_s=60)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_losses_equal_those_of_whole_weights(kind, two_ranks):
    """Ranks validate different numbers of batches, after which training goes on."""
    (whole, losses, was_split), (split, split_losses, is_split) = two_ranks[kind, 0], two_ranks[kind, 3]
    assert is_split and not was_split
    assert split.keys() == whole.keys()
    for name, gradient in whole.items():
        np.testing.assert_allclose(split[name], gradient, rtol=1e-5, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(split_losses, losses, rtol=1e-6)
