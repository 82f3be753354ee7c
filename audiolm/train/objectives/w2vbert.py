"""w2v-BERT's training (2108.06209; PAPER 2.2): contrastive loss, masked prediction of the codes, diversity of the codes.

Loss = beta contrastive + gamma masked (means over the masked frames of the global batch, in nats) + 0.1 diversity, which
is a function of the codes' mean probabilities over those same frames.  That mean is taken first, without gradients and
over all micro-batches and ranks, with dropout of its own; the loss is then linear in each frame, so that neither changes the
step.
Where the input is augmented, the codes come from the clean audio (the papers do not augment): a code should not depend
on the noise.  Gumbel noise and negatives are drawn from (seed, purpose, step, row).  V codes; the rest as models.w2vbert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from audiolm.config.semantic import MaskedModelConfig, W2vBertConfig
from audiolm.data.sources import roots
from audiolm.models.conformer import EncoderSizes
from audiolm.models.entropy import perplexity
from audiolm.models.w2vbert import W2vBertModel, diversity, draw_gumbel, draw_negatives
from audiolm.train.engine import all_sum
from audiolm.train.objectives.base import Context
from audiolm.train.objectives.masked import COLLAPSED, export_encoder, has_collapsed
from audiolm.train.objectives.masked_inputs import (
    MaskedBatch,
    MaskedInputs,
    Statistics,
    crop_samples,
    fit_sample,
    masked_inputs,
)

FIGURES = ("contrastive", "masked", "contrastive_right", "masked_right", "frames")
MIN_USE = 0.01  # of the codes: a codebook of a lower perplexity has collapsed


@dataclass(frozen=True)
class Batch:
    masked: MaskedBatch
    negatives_BMK: torch.Tensor


def w2vbert_model(sizes: MaskedModelConfig) -> W2vBertModel:
    """The model of a configuration; half the blocks are contrastive where it does not say. Raises ValueError."""
    conformer = EncoderSizes(sizes.dim, sizes.layers, sizes.heads, sizes.ff, sizes.conv_kernel, sizes.dropout)
    w = sizes.w2vbert or W2vBertConfig()
    return W2vBertModel(conformer, w.contrastive_layers or sizes.layers // 2, w.codes, w.code_dim)


class W2vBertObjective:
    unit = "audio s"

    def __init__(self, model: W2vBertModel, inputs: MaskedInputs, ctx: Context):
        self.modules = {"model": model.to(ctx.device)}
        self.inputs, self.ctx, self.settings = inputs, ctx, inputs.sizes.w2vbert or W2vBertConfig()
        self._before: float | None = None  # the last validation's loss

    @property
    def model(self) -> W2vBertModel:
        return self.modules["model"]

    def load(self, step: int, rows: Sequence[int]) -> Batch:
        return self._with_negatives(self.inputs.batch(step, rows))

    def _with_negatives(self, b: MaskedBatch) -> Batch:
        return Batch(b, draw_negatives(b.mask_BT, self.settings.negatives, self.inputs.seed, b.step, b.rows))

    def temperature(self, step: int) -> float:
        """Of the Gumbel softmax."""
        first, last, factor = self.settings.gumbel
        return max(last, first * factor**step)

    def train_step(self, engines: Mapping[str, Any], batches: list[Batch], step: int) -> dict[str, torch.Tensor]:
        device, w, engine, tau = self.ctx.device, self.settings, engines["model"], self.temperature(step)
        heard = [(*self.inputs.mels(b.masked, device), b.masked.mask_BT.to(device)) for b in batches]
        mean_V, masked = self._mean_use(heard)
        slope_V, = torch.autograd.grad(diversity(mean_V), mean_V)
        totals = 0
        for i, (batch, seen) in enumerate(zip(batches, heard, strict=True)):
            m = batch.masked
            noise_BMV = draw_gumbel(m.mask_BT, w.codes, self.inputs.seed, step, m.rows, device)
            sums, figures = self._sums(engine, batch, seen, noise_BMV, tau)
            loss = w.contrastive * sums["contrastive"] + w.masked * sums["masked"]
            loss = loss + w.diversity * (slope_V * sums["probabilities_V"]).sum()
            # The engine averages over ranks: times the world, over all masked frames, each frame weighs the same.
            engine.backward(loss * (self.ctx.world / masked), last=i == len(batches) - 1)
            totals = totals + figures
        norm = engine.step()
        report = self._report(all_sum(totals))
        loss = sum(getattr(w, name) * report[name] for name in ("contrastive", "masked", "diversity"))
        return {"loss": loss, **report, "temperature": torch.tensor(tau), "grad_norm": norm}

    @torch.no_grad()
    def _mean_use(self, heard: list) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes' mean probabilities (V,) over the masked frames of the global batch, ready for a gradient, and how
        many those are. All ranks take part."""
        sums_V = sum(self.model.probabilities(clean_BTF, frames_B, mask_BT) for clean_BTF, _, frames_B, mask_BT in heard)
        masked = sum(mask_BT.sum() for *_, mask_BT in heard)
        totals = all_sum(torch.cat([masked[None].double(), sums_V.double()]))
        return (totals[1:] / totals[0]).float().requires_grad_(), totals[0].float()

    def _sums(self, model: Any, batch: Batch, seen: tuple, noise_BMV: torch.Tensor | None,
              tau: float) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """What the model sums, and without gradients FIGURES, audio s, and V each of targets, predictions, probabilities."""
        clean_BTF, heard_BTF, frames_B, mask_BT = seen
        sums = model(heard_BTF, frames_B, mask_BT, batch.negatives_BMK.to(self.ctx.device),
                     self.settings.temperature, noise_BMV, tau, None if clean_BTF is heard_BTF else clean_BTF)
        audio_s = torch.tensor(batch.masked.audio_s, device=self.ctx.device)
        head = torch.stack([*(sums[name].detach().float() for name in FIGURES), audio_s])
        counts = [sums[name].detach() for name in ("codes_V", "predicted_V", "probabilities_V")]
        return sums, torch.cat([head, *counts]).double()

    def _report(self, totals: torch.Tensor) -> dict[str, torch.Tensor]:
        contrastive, masked, contrastive_right, right, frames, audio_s = totals[:6]
        codes_V, predicted_V, probabilities_V = counts_3V = totals[6:].view(3, -1)
        used, named, _ = perplexity(counts_3V)
        return {"contrastive": contrastive / frames, "masked": masked / frames,
                "diversity": diversity(probabilities_V / frames), "accuracy": right / frames,
                "contrastive_accuracy": contrastive_right / frames, "code_perplexity": used,
                "prediction_perplexity": named, "units": audio_s}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The losses on masked frames of dev pieces with the likeliest codes (each rank takes every world-th), "loss" the
        sum of contrastive and masked, and alarms (1 = it rings): few codes in use, predictions all but constant, a loss that
        stands still."""
        w = self.settings
        totals = torch.zeros(len(FIGURES) + 1 + 3 * w.codes, dtype=torch.float64, device=self.ctx.device)
        self.model.eval()
        for piece in self.inputs.pieces():
            seen = (*self.inputs.mels(piece, self.ctx.device), piece.mask_BT.to(self.ctx.device))
            totals += self._sums(self.model, self._with_negatives(piece), seen, None, 1.0)[1]
        self.model.train()
        report = {name: float(value) for name, value in self._report(all_sum(totals)).items() if name != "units"}
        used, named, loss = report["code_perplexity"], report["prediction_perplexity"], report["contrastive"] + report["masked"]
        rings = {"codes_collapsed": used < max(2.0, MIN_USE * w.codes),
                 "constant_predictions": used > 2 and named < max(1.5, COLLAPSED * used),
                 "constant_loss": has_collapsed(self._before, loss)}
        self._before = loss
        return {"loss": loss, **report,
                **{f"alarm/{name}": float(on) for name, on in rings.items()}}

    def export(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return export_encoder(self.model.encoder, "w2vbert", {"contrastive_layers": self.model.contrastive_layers})


def w2vbert_objective(config: Mapping[str, Any], inputs: Mapping[str, str], ctx: Context) -> W2vBertObjective:
    """The factory (train.objectives.base): config {"model", "train", "where", "corpus", "seed"}, inputs {"manifest": path}."""
    data, clips = masked_inputs(config, inputs, ctx)
    model, measured = w2vbert_model(config["model"]), Statistics()
    for mel_BTF, _ in fit_sample(clips, roots(config["corpus"]), crop_samples(config["model"]), config["seed"]):
        measured.add(mel_BTF)
    measured.into(model.encoder)
    return W2vBertObjective(model, data, ctx)
