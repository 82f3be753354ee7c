"""What the objectives of the language models share: layout, data, one update, figures of a validation.

All ranks take part in `update`.  Shapes: nats_SN as models.lm.heads; sums (2, n_sums) as lm.loss.level_sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from audiolm.config.lm import LMConfig
from audiolm.data.tokens import spec_of
from audiolm.lm.batches import EvalCrop, TokenBatches
from audiolm.lm.layouts import build_stages
from audiolm.lm.loss import level_sums, mean_loss, n_sums
from audiolm.lm.parallel import parallel_stage
from audiolm.lm.stages import Stage
from audiolm.tokenizers.acoustic import load_codec
from audiolm.tokenizers.artifact import read_export
from audiolm.train.engine import all_sum
from audiolm.train.objectives.base import Context, Engine


def data_of(config: Mapping[str, Any], inputs: Mapping[str, str], stage: Stage,
            ctx: Context) -> tuple[TokenBatches, TokenBatches, list[EvalCrop]]:
    """(train, dev, validation crops) of a stage, from the stores that it reads."""
    paths, shape = [inputs["manifest"], inputs.get("semantic_tokens"), inputs.get("acoustic_tokens")], config["lm"]
    train, dev = (TokenBatches(*paths, stage, split, shape.where, shape.train.batch, ctx.seed, cache_mb)
                  for split, cache_mb in (("train", 256), ("dev", 64)))
    return train, dev, dev.fixed(config["rows"])


def codes_of(config: Mapping[str, Any], inputs: Mapping[str, str]) -> torch.Tensor | None:
    """codes_QVE of the codec where the stage's tables are tied."""
    return load_codec(inputs["codec"]).code_vectors() if config["layout"].get("tied") else None


def centroids_of(config: Mapping[str, Any], inputs: Mapping[str, str], stage: Stage) -> torch.Tensor | None:
    """centroid_KC of the semantic tokenizer where the stage's semantic ids begin there."""
    if not (config["layout"].get("centroids") and stage.needs_semantic):
        return None
    return read_export(inputs["kmeans"])[0]["centroids"].float()


def stage_of(config: Mapping[str, Any], inputs: Mapping[str, str]) -> Stage:
    """The stage's layout; sizes come from the token stores it reads. Raises ValueError where there is no such stage."""
    specs = {name: spec_of(inputs[name]) for name in ("semantic_tokens", "acoustic_tokens") if name in inputs}
    k = specs["semantic_tokens"]["vocab"] if "semantic_tokens" in specs else 0
    name = config["stage"]
    lm = LMConfig.model_validate({**config["layout"], name.removeprefix("lm_"): config["lm"]})
    coarse = lm.coarse_levels
    acoustic = specs.get("acoustic_tokens", {"n_q": coarse, "vocab": 0})
    if name == "lm_parallel":
        return parallel_stage(lm, acoustic["n_q"], acoustic["vocab"], k)
    stages = build_stages(lm, acoustic["n_q"], acoustic["vocab"], k)
    if name not in stages:
        raise ValueError(f"stage is {name!r}; with lm.coarse_levels {coarse} and codec.n_q {acoustic['n_q']} there are "
                         f"{sorted(stages)}")
    return stages[name]


def update(engine: Engine, stage: Stage, batches: list[dict[str, torch.Tensor]],
           arguments: Callable[[dict[str, torch.Tensor]], tuple], ctx: Context) -> dict[str, torch.Tensor]:
    """One update on batches whose `arguments` the module turns into nats_SN; all ranks take part."""
    engine.module.train()
    batches = [{name: x.to(ctx.device, non_blocking=True) for name, x in batch.items()} for batch in batches]
    # The loss is a mean over the global batch's targets, so their number is needed before the first backward.
    targets, tokens = all_sum(torch.stack([batch["count_2"] for batch in batches]).sum(0).double())
    sums = torch.zeros(2, n_sums(stage), dtype=torch.float64, device=ctx.device)  # nats, tokens by level
    for batch in batches:
        nats_SN = engine(*arguments(batch))
        # Engines average over ranks: times the world, over all targets, each target weighs the same.
        engine.backward(nats_SN.sum() * (ctx.world / targets.float()))
        sums += level_sums(stage, nats_SN.detach(), batch["label_SN"])
    # Sums, not means, are reduced: ranks hold different numbers of targets.
    sums = all_sum(sums)
    loss = sums[0].sum() / targets
    norm = engine.step()
    return {"loss": loss, "units": tokens, "grad_norm": norm, **by_level(stage, sums)}


def validation_figures(stage: Stage, sums: torch.Tensor) -> dict[str, float]:
    """Loss, targets and losses by level of level sums over all ranks."""
    figures = {"loss": mean_loss(stage, sums), "tokens": sums[1].sum(), **by_level(stage, sums)}
    return {name: float(value) for name, value in figures.items()}


def by_level(stage: Stage, sums: torch.Tensor) -> dict[str, torch.Tensor]:
    """Loss of each target level, counted from 1 as in the paper; of ids and of their lengths where stage 1 has both."""
    means = sums[0] / sums[1].clamp_min(1)
    if stage.lengths:
        return {"loss.ids": means[0], "loss.lengths": means[1]}
    return {f"loss.level{q + 1}": means[q + 1] for q in range(*stage.levels)}
