"""The objective of a language-model stage (paper III-C): next-token cross-entropy over the stage's targets.

The loss is the mean in nats per target token over the whole global batch, token-weighted over micro-batches and ranks;
acoustic stages also report it per level (EOS counts in the level's slot it is predicted in).  Three stages are three
values of one Stage type.  A batch is a dict of tensors from lm.loss.prepare.  S: slots of a frame, N: targets of a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from audiolm import rng
from audiolm.config.lm import LMConfig, StageConfig
from audiolm.data.tokens import TokenStore
from audiolm.lm.batches import EvalCrop, TokenBatches
from audiolm.lm.layouts import build_stages
from audiolm.lm.loss import batch_sums, inputs_of, level_sums, mean_loss, n_sums, prepare
from audiolm.lm.model import build_lm, export_lm
from audiolm.lm.parallel import parallel_stage
from audiolm.lm.stages import Stage
from audiolm.lm.warm_start import start_from
from audiolm.tokenizers.acoustic import load_codec
from audiolm.train.engine import all_sum
from audiolm.train.objectives.base import Context, Engine, autocast, pinned
from audiolm.train.objectives.start import start_stage

FLASH_WIDTH = 256  # of a head, at most: FlashAttention's limit (2307.08691)
EVAL_BATCH = 8  # validation rows a forward pass


def lm_objective(config: Mapping[str, Any], inputs: Mapping[str, str], ctx: Context) -> LMObjective:
    """Factory. config: stage ("lm_semantic", "lm_coarse" or "lm_fine"), lm (its StageConfig), layout (LMConfig.layout), rows
    (validation crops), text_model or start (where it starts from one, or from a stage's weights); inputs: paths of manifest
    and of the token stores that the stage reads, semantic_tokens and acoustic_tokens, and of the codec where tables are tied.

    Raises TokenError for stores that do not belong together, ValueError for a stage the codec leaves no room for.
    """
    stage, shape = stage_of(config, inputs), config["lm"]
    paths = [inputs["manifest"], inputs.get("semantic_tokens"), inputs.get("acoustic_tokens")]
    train, dev = (TokenBatches(*paths, stage, split, shape.where, shape.train.batch, ctx.seed, cache_mb)
                  for split, cache_mb in (("train", 256), ("dev", 64)))
    codes_QVE = load_codec(inputs["codec"]).code_vectors() if config["layout"].get("tied") else None
    objective = LMObjective(stage, shape, train, dev, dev.fixed(config["rows"]), ctx, codes_QVE)
    if config.get("text_model"):
        start_from(objective.modules["lm"], shape, config["text_model"])
    if config.get("start"):
        start_stage(objective.modules["lm"], stage, shape, config["start"])
    return objective


def stage_of(config: Mapping[str, Any], inputs: Mapping[str, str]) -> Stage:
    """The stage's layout; sizes come from the token stores it reads. Raises ValueError where there is no such stage."""
    specs = {name: TokenStore(inputs[name]).spec for name in ("semantic_tokens", "acoustic_tokens") if name in inputs}
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


class LMObjective:
    """Training of one stage: the model, its batches, and its validation rows."""

    unit, exported = "tokens", "lm"

    def __init__(self, stage: Stage, shape: StageConfig, train: TokenBatches, dev: TokenBatches, rows: list[EvalCrop],
                 ctx: Context, codes_QVE: torch.Tensor | None = None):
        self.stage, self.shape, self.data, self.dev, self.rows, self.ctx = stage, shape, train, dev, rows, ctx
        # A seed of its own for each stage; the generator that everybody shares is left as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.derive(ctx.seed, f"init lm_{stage.name}"))
            self.modules: dict[str, nn.Module] = {"lm": build_lm(stage, shape, codes_QVE)}
        # FlashAttention takes packed rows without padding, in bfloat16 on a GPU, and no bias of distances.
        width = shape.dim // shape.heads
        fits = shape.train.dtype == "bfloat16" and width % 8 == 0 and width <= FLASH_WIDTH
        self.flash = shape.positions == "rotary" and (fits or ctx.device.type == "cpu")
        # Counted for a row that is one document: of several, attention costs less, so MFU is a little too high for short clips.
        self.flops_per_unit = self.modules["lm"].flops_per_token(stage.max_len)
        if ctx.compile:
            self.modules["lm"].compile_training()

    def load(self, step: int, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        return pinned(prepare(self.stage, self.data.batch(step, rows), self.flash), self.ctx.device)

    def train_step(self, engines: Mapping[str, Engine], batches: list[dict[str, torch.Tensor]],
                   step: int) -> dict[str, torch.Tensor]:
        """One update; all ranks take part."""
        return update(engines["lm"], self.stage, batches, inputs_of, self.ctx)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Nats per target token on fixed dev rows, shared out over ranks; all ranks take part."""
        module, device = self.modules["lm"], self.ctx.device
        module.eval()
        sums = torch.zeros(2, n_sums(self.stage), dtype=torch.float64, device=device)
        # The same rows at every validation and for every world size, so that losses compare.
        own = self.rows[self.ctx.rank::self.ctx.world]
        for i in range(0, len(own), EVAL_BATCH):
            batch = self.dev.collate([self.dev.packed(*row) for row in own[i:i + EVAL_BATCH]])
            with autocast(device, self.shape.train.dtype):
                sums += batch_sums(module, self.stage, batch, device)
        module.train()
        sums = all_sum(sums)
        loss = mean_loss(self.stage, sums)
        return {k: float(v) for k, v in {"loss": loss, "tokens": sums[1].sum(), **by_level(self.stage, sums)}.items()}

    def export(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return export_lm(self.modules["lm"], self.stage)


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


def by_level(stage: Stage, sums: torch.Tensor) -> dict[str, torch.Tensor]:
    """Loss of each target level, counted from 1 as in the paper; of ids and of their lengths where stage 1 has both."""
    means = sums[0] / sums[1].clamp_min(1)
    if stage.lengths:
        return {"loss.ids": means[0], "loss.lengths": means[1]}
    return {f"loss.level{q + 1}": means[q + 1] for q in range(*stage.levels)}
