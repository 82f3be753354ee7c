"""The objective of a language-model stage (paper III-C): next-token cross-entropy over the stage's targets.

The loss is the mean in nats per target token over the whole global batch, token-weighted over micro-batches and ranks;
acoustic stages also report it per level (EOS counts in the level's slot it is predicted in).  Three stages are three
values of one Stage type.  A batch is a dict of tensors from lm.loss.prepare.  S: slots of a frame, N: targets of a slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from audiolm import rng
from audiolm.config.lm import StageConfig
from audiolm.lm.batches import EvalCrop, TokenBatches
from audiolm.lm.frames import own_draws, own_frames, replace_frames
from audiolm.lm.loss import batch_sums, inputs_of, n_sums, prepare
from audiolm.lm.model import build_lm, export_lm
from audiolm.lm.stages import Stage
from audiolm.lm.warm_start import start_from
from audiolm.models.lm.attention import takes_flash
from audiolm.train.engine import all_sum
from audiolm.train.objectives.base import Context, Engine, autocast, pinned
from audiolm.train.objectives.shared import centroids_of, codes_of, data_of, stage_of, update, validation_figures
from audiolm.train.objectives.start import start_stage

EVAL_BATCH = 8  # validation rows a forward pass


def lm_objective(config: Mapping[str, Any], inputs: Mapping[str, str], ctx: Context) -> LMObjective:
    """Factory. config: stage ("lm_semantic", "lm_coarse" or "lm_fine"), lm (its StageConfig), layout (LMConfig.layout), rows
    (validation crops), text_model or start (where it starts from one, or from a stage's weights); inputs: paths of manifest
    and of the token stores that the stage reads, semantic_tokens and acoustic_tokens, and of codec and kmeans as `layout` says.

    Raises TokenError for stores that do not belong together, ValueError for a stage the codec leaves no room for.
    """
    stage, shape = stage_of(config, inputs), config["lm"]
    objective = LMObjective(stage, shape, *data_of(config, inputs, stage, ctx), ctx, codes_of(config, inputs),
                            centroids_of(config, inputs, stage))
    if config.get("text_model"):
        start_from(objective.modules["lm"], shape, config["text_model"])
    if config.get("start"):
        start_stage(objective.modules["lm"], stage, shape, config["start"], inputs.get("semantic_tokens"))
    return objective


class LMObjective:
    """Training of one stage: the model, its batches, and its validation rows."""

    unit, exported = "tokens", "lm"

    def __init__(self, stage: Stage, shape: StageConfig, train: TokenBatches, dev: TokenBatches, rows: list[EvalCrop],
                 ctx: Context, codes_QVE: torch.Tensor | None = None, centroid_KC: torch.Tensor | None = None):
        self.stage, self.shape, self.data, self.dev, self.rows, self.ctx = stage, shape, train, dev, rows, ctx
        # A seed of its own for each stage; the generator that everybody shares is left as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.derive(ctx.seed, f"init lm_{stage.name}"))
            self.modules: dict[str, nn.Module] = {"lm": build_lm(stage, shape, codes_QVE, centroid_KC)}
        # Flash attention has no bias of distances.
        self.flash = shape.positions == "rotary" and takes_flash(
            ctx.device, getattr(torch, shape.train.dtype), shape.dim // shape.heads)
        # Counted for a row that is one document: of several, attention costs less, so MFU is a little too high for short clips.
        self.flops_per_unit = self.modules["lm"].flops_per_token(stage.max_len)
        if ctx.compile:
            self.modules["lm"].compile_training()

    def load(self, step: int, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        batch = self.data.batch(step, rows)
        tensors = prepare(self.stage, batch, self.flash)
        if self.shape.replaced:
            draws = [rng.generator(self.ctx.seed, "replaced", step, row) for row in rows]
            tensors |= replace_frames(self.stage, batch, self.shape.replaced, draws)
        if self.shape.own and step >= self.shape.own_from:
            draws = [rng.generator(self.ctx.seed, "own", step, row) for row in rows]
            tensors |= own_draws(self.stage, batch, self.shape.own, self.shape.passes, draws)
        return pinned(tensors, self.ctx.device)

    def train_step(self, engines: Mapping[str, Engine], batches: list[dict[str, torch.Tensor]],
                   step: int) -> dict[str, torch.Tensor]:
        """One update; all ranks take part."""
        batches = [self._with_own(batch) if "own_BT" in batch else batch for batch in batches]
        return update(engines["lm"], self.stage, batches, inputs_of, self.ctx)

    def _with_own(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch with frames that the model drew itself; `update` sets it back to training."""
        batch = {name: x.to(self.ctx.device, non_blocking=True) for name, x in batch.items()}
        with autocast(self.ctx.device, self.shape.train.dtype):
            return own_frames(self.modules["lm"].eval(), self.stage, batch)

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
        return validation_figures(self.stage, all_sum(sums))

    def export(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return export_lm(self.modules["lm"], self.stage)
