"""The objective of the parallel decoder (SoundStorm, 2305.09636): masked codes of one drawn level a document.

The loss is the mean in nats per masked code over the whole global batch, also by level.  Masks follow from (seed, step, row).
Validation masks each level of fixed dev crops as a whole, with the coarser levels true: loss.levelQ, and their mean as loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from audiolm import rng
from audiolm.config.lm import ParallelConfig
from audiolm.data.tokens import RATIO
from audiolm.lm.batches import EvalCrop, TokenBatches
from audiolm.lm.model import build_parallel, export_lm
from audiolm.lm.parallel import collate, draw_document, inputs_of, whole_level_sums
from audiolm.lm.stages import Stage
from audiolm.train.engine import all_sum
from audiolm.train.objectives.base import Context, Engine, autocast, pinned
from audiolm.train.objectives.shared import centroids_of, codes_of, data_of, stage_of, update, validation_figures
from audiolm.train.objectives.start import start_parallel

# Frames and places of a batch are a multiple of it, by device: a GPU's memory then has pieces of few sizes, and attention
# takes the mask as it is, whose rows it would copy in each layer.
MULTIPLE = {"cuda": 64}


def parallel_objective(config: Mapping[str, Any], inputs: Mapping[str, str], ctx: Context) -> ParallelObjective:
    """Factory. config: stage ("lm_parallel"), lm (ParallelConfig), layout (LMConfig.layout), rows (validation crops), start
    where it starts from weights; inputs: as of the stages.

    Raises TokenError for stores that do not belong together.
    """
    stage, shape = stage_of(config, inputs), config["lm"]
    objective = ParallelObjective(stage, shape, *data_of(config, inputs, stage, ctx), ctx, codes_of(config, inputs),
                                  centroids_of(config, inputs, stage))
    if config.get("start"):
        start_parallel(objective.modules["lm"], shape, config["start"], inputs["semantic_tokens"])
    return objective


class ParallelObjective:
    """Training of the parallel decoder: the model, its batches, and its validation crops."""

    unit, exported = "frames", "lm"

    def __init__(self, stage: Stage, shape: ParallelConfig, train: TokenBatches, dev: TokenBatches, rows: list[EvalCrop],
                 ctx: Context, codes_QVE: torch.Tensor | None = None, centroid_KC: torch.Tensor | None = None):
        self.stage, self.shape, self.data, self.dev, self.rows, self.ctx = stage, shape, train, dev, rows, ctx
        with torch.random.fork_rng(devices=[]):  # a seed of its own; the generator that everybody shares is left as it was
            torch.manual_seed(rng.derive(ctx.seed, "init lm_parallel"))
            self.modules: dict[str, nn.Module] = {"lm": build_parallel(stage, shape, codes_QVE, centroid_KC)}
        # Counted for rows that are one document, as for the stages.
        self.flops_per_unit = self.modules["lm"].flops_per_frame(RATIO * stage.crop_frames)

    def load(self, step: int, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        self.data.expect(step, rows)
        documents = []
        for i in rows:
            draw = rng.generator(self.ctx.seed, "parallel", step, i)
            documents.append([draw_document(self.stage, *self.data.read(*span)[:2], draw) for span in self.data.spans(step, i)])
        # as many frames between documents as a convolution reaches to one side
        device = self.ctx.device
        return pinned(collate(self.stage, documents, self.shape.conv_kernel // 2, MULTIPLE.get(device.type, 1)), device)

    def train_step(self, engines: Mapping[str, Engine], batches: list[dict[str, torch.Tensor]],
                   step: int) -> dict[str, torch.Tensor]:
        """One update; all ranks take part."""
        return update(engines["lm"], self.stage, batches, inputs_of, self.ctx)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Nats per code of each level on fixed dev crops, shared out over ranks; all ranks take part."""
        module, device = self.modules["lm"], self.ctx.device
        module.eval()
        crops = (self.dev.crop(*row)[:2] for row in self.rows[self.ctx.rank::self.ctx.world])
        with autocast(device, self.shape.train.dtype):
            sums = all_sum(whole_level_sums(module, self.stage, crops, device))
        module.train()
        return validation_figures(self.stage, sums)

    def export(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return export_lm(self.modules["lm"], self.stage)
