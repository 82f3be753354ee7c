"""w2v-BERT (2108.06209): contrastive loss, masked prediction of the contrastive module's codes, diversity of the codes.

Loss = beta contrastive + gamma masked (means over the masked frames of the global batch, nats) + 0.1 diversity.  Diversity
is a function of the codes' mean probabilities over those frames.  That mean is taken first, without gradients, over all
micro-batches and ranks; the loss is then linear in each frame, so that neither changes the step.
With augmentation the codes come from the clean audio, as a code should not depend on the noise (the paper has none).
Gumbel noise and negatives are drawn from (seed, purpose, step, row).  V codes; other letters as in models/w2vbert.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from audiolm.config.semantic import MaskedModelConfig, W2vBertConfig
from audiolm.models.entropy import perplexity
from audiolm.models.transfer import pin, send
from audiolm.models.w2vbert import W2vBertModel, diversity, draw_gumbel, draw_negatives
from audiolm.train.engine import all_sum
from audiolm.train.objectives.alarms import COLLAPSED, is_constant, with_alarms
from audiolm.train.objectives.base import Context, Engine
from audiolm.train.objectives.masked_inputs import (
    MaskedBatch,
    MaskedInputs,
    encoder_sizes,
    export_encoder,
    masked_inputs,
    measure_inputs,
)
from audiolm.train.objectives.start import start_encoder

SUMS = ("contrastive", "masked", "contrastive_right", "masked_right", "frames")
MIN_USE = 0.01  # of the codes: a codebook of a lower perplexity has collapsed


@dataclass(frozen=True)
class W2vBertBatch:
    """A masked batch and the negatives of each masked frame, as frame numbers of its own row."""

    masked: MaskedBatch
    negatives_BMK: torch.Tensor


def w2vbert_model(sizes: MaskedModelConfig) -> W2vBertModel:
    """The model of a configuration; half the blocks are contrastive where it does not say. Raises ValueError."""
    w = sizes.w2vbert or W2vBertConfig()
    return W2vBertModel(encoder_sizes(sizes), w.contrastive_layers or sizes.layers // 2, w.codes, w.code_dim)


class W2vBertObjective:
    unit = "audio s"

    def __init__(self, model: W2vBertModel, inputs: MaskedInputs, ctx: Context):
        self.modules = {"model": model.to(ctx.device)}
        if ctx.compile:
            model.encoder.compile_training()
        self.inputs, self.ctx, self.settings = inputs, ctx, inputs.sizes.w2vbert or W2vBertConfig()
        self._before: float | None = None  # loss of the last validation; lost on a resume, which delays an alarm by one

    @property
    def model(self) -> W2vBertModel:
        return self.modules["model"]

    def load(self, step: int, rows: Sequence[int]) -> W2vBertBatch:
        batch = self._with_negatives(self.inputs.batch(step, rows).pinned(self.ctx.device))
        return replace(batch, negatives_BMK=pin(batch.negatives_BMK, self.ctx.device))

    def _with_negatives(self, b: MaskedBatch) -> W2vBertBatch:
        return W2vBertBatch(b, draw_negatives(b.mask_BT, self.settings.negatives, self.inputs.seed, b.step, b.rows))

    def temperature(self, step: int) -> float:
        """The Gumbel softmax's: it falls geometrically, so that codes are soft first and one-hot later."""
        first, last, factor = self.settings.gumbel
        return max(last, first * factor**step)

    def train_step(self, engines: Mapping[str, Engine], batches: list[W2vBertBatch], step: int) -> dict[str, torch.Tensor]:
        """One update; all ranks take part."""
        device, w, engine, tau = self.ctx.device, self.settings, engines["model"], self.temperature(step)
        inputs = [self._mels(b.masked) for b in batches]

        # First pass, without gradients: the codes' mean use, and the slope of diversity there.
        mean_V, masked = self._mean_use(inputs)
        slope_V, = torch.autograd.grad(diversity(mean_V), mean_V)

        # Second pass, a micro-batch at a time.
        totals = 0
        for batch, mels in zip(batches, inputs, strict=True):
            noise_BMV = draw_gumbel(batch.masked.mask_BT, w.codes, self.inputs.seed, step, batch.masked.rows, device)
            losses, sums = self._sums(engine, batch, mels, noise_BMV, tau)
            loss = w.contrastive * losses["contrastive"] + w.masked * losses["masked"]
            # Diversity is not linear in its frames; its tangent at the global mean is, and has the same gradient.
            loss = loss + w.diversity * (slope_V * losses["probabilities_V"]).sum()
            # Engines average over ranks: times the world, over all masked frames, each frame weighs the same.
            engine.backward(loss * (self.ctx.world / masked))
            totals = totals + sums
        norm = engine.step()
        report = self._report(all_sum(totals))
        loss = sum(getattr(w, name) * report[name] for name in ("contrastive", "masked", "diversity"))
        return {"loss": loss, **report, "temperature": torch.tensor(tau), "grad_norm": norm}

    def _mels(self, b: MaskedBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """clean_BTF, input_BTF, frames_B (None: every row is full), mask_BT on the device."""
        clean_BTF, input_BTF, frames_B = self.inputs.mels(b, self.ctx.device)
        return clean_BTF, input_BTF, None if b.full else frames_B, send(b.mask_BT, self.ctx.device)

    @torch.no_grad()
    def _mean_use(self, inputs: list) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean probabilities of the codes (V,) over the masked frames of the global batch, ready for a gradient, and the
        number of those frames. All ranks take part."""
        sums_V = sum(self.model.probabilities(clean_BTF, frames_B, mask_BT) for clean_BTF, _, frames_B, mask_BT in inputs)
        masked = sum(mask_BT.sum() for *_, mask_BT in inputs)
        totals = all_sum(torch.cat([masked[None].double(), sums_V.double()]))
        return (totals[1:] / totals[0]).float().requires_grad_(), totals[0].float()

    def _sums(self, model: Any, batch: W2vBertBatch, mels: tuple, noise_BMV: torch.Tensor | None,
              tau: float) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The model's losses, and without gradients sums: SUMS, audio s, and V each of codes, predictions, probabilities."""
        clean_BTF, input_BTF, frames_B, mask_BT = mels
        losses = model(input_BTF, frames_B, mask_BT, send(batch.negatives_BMK, self.ctx.device),
                       self.settings.temperature, noise_BMV, tau, None if clean_BTF is input_BTF else clean_BTF)
        audio_s = torch.full((), batch.masked.audio_s, device=self.ctx.device)
        head = torch.stack([*(losses[name].detach().float() for name in SUMS), audio_s])
        counts = [losses[name].detach() for name in ("codes_V", "predicted_V", "probabilities_V")]
        return losses, torch.cat([head, *counts]).double()

    def _report(self, totals: torch.Tensor) -> dict[str, torch.Tensor]:
        contrastive, masked, contrastive_right, right, frames, audio_s = totals[:6]
        codes_V, predicted_V, probabilities_V = counts_3V = totals[6:].view(3, -1)
        used, predicted, _ = perplexity(counts_3V)
        return {"contrastive": contrastive / frames, "masked": masked / frames,
                "diversity": diversity(probabilities_V / frames), "accuracy": right / frames,
                "contrastive_accuracy": contrastive_right / frames, "code_perplexity": used,
                "prediction_perplexity": predicted, "units": audio_s}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Losses on masked frames of dev pieces with the likeliest codes, shared out over ranks, and alarms.

        "loss" is the sum of contrastive and masked.  Alarms: few codes in use, predictions all but constant, a constant loss.
        """
        w = self.settings
        totals = torch.zeros(len(SUMS) + 1 + 3 * w.codes, dtype=torch.float64, device=self.ctx.device)
        self.model.eval()
        for piece in self.inputs.pieces():
            totals += self._sums(self.model, self._with_negatives(piece), self._mels(piece), None, 1.0)[1]
        self.model.train()
        report = {name: float(value) for name, value in self._report(all_sum(totals)).items() if name != "units"}
        used, predicted = report["code_perplexity"], report["prediction_perplexity"]
        before, self._before = self._before, report["contrastive"] + report["masked"]
        return with_alarms({"loss": self._before, **report}, {
            "codes_collapsed": used < max(2.0, MIN_USE * w.codes),
            "constant_predictions": used > 2 and predicted < max(1.5, COLLAPSED * used),
            "constant_loss": is_constant(before, self._before)})

    def export(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return export_encoder(self.model.encoder, "w2vbert", {"contrastive_layers": self.model.contrastive_layers})


def w2vbert_objective(config: Mapping[str, Any], inputs: Mapping[str, str], ctx: Context) -> W2vBertObjective:
    """Factory. config: model, train, where, corpus, seed, and `start` where it starts from an encoder's weights;
    inputs: {"manifest": path}."""
    data, sample = masked_inputs(config, inputs, ctx)
    model = w2vbert_model(config["model"])
    if config.get("start"):
        start_encoder(model.encoder, config["start"])
    else:
        measure_inputs(model.encoder, sample)
    return W2vBertObjective(model, data, ctx)
