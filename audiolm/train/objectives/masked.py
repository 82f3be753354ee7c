"""Masked prediction of k-means targets: HuBERT (2106.07447) on crops of the training clips.

Iteration 1: clusters of MFCCs with differences, normalised per crop and averaged over 4 frames to 25 Hz; the codebook is
fitted here and lives in a float32 buffer, so that checkpoints carry it.  Later iterations: tokens of the artefact that
the step targets_N left, made of the clean crop.  The loss is the cross-entropy on masked frames only, weighted by frame
over micro-batches and ranks.  Legend: B rows, T frames at 25 Hz, F mel bands at 100 Hz, K targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from audiolm import rng
from audiolm.data.sources import roots
from audiolm.models import kmeans
from audiolm.models.conformer import LAYER_CONVENTION, SUBSAMPLE, EncoderSizes, MaskedModel, valid_frames
from audiolm.models.mel import mfcc
from audiolm.models.rvq import perplexity
from audiolm.tokenizers.base import SAMPLE_RATE
from audiolm.tokenizers.extractor import FAMILY, ConformerExtractor
from audiolm.tokenizers.semantic import MASKED_FORMAT, load_extractor, load_semantic
from audiolm.train.engine import all_sum
from audiolm.train.objectives.base import Context
from audiolm.train.objectives.masked_inputs import (
    MaskedBatch,
    MaskedInputs,
    Statistics,
    crop_samples,
    fit_sample,
    frames_of,
    masked_inputs,
)

MIN_ENTROPY = 0.1  # of ln k: below it the targets are as good as constant and the loss says nothing (fairseq PR 4521)
COLLAPSED = 0.1  # of the targets' perplexity: predictions that use fewer targets than this have collapsed
Targets = Callable[[MaskedBatch, torch.Tensor, torch.Tensor], torch.Tensor]  # batch, clean mel_BTF, frames_B -> labels_BT


def target_features(mel_BTF: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """x_BTC at 25 Hz, C = 39: MFCC and differences, zero mean and unit variance over a row's own frames."""
    frames = mel_BTF.shape[1]
    last_B1 = lengths_B[:, None] * SUBSAMPLE - 1
    # The last frame is held for the length of the differences' reach, so that padding and batch do not show.
    held_BT = torch.minimum(torch.arange(frames + 4, device=mel_BTF.device)[None], last_B1)
    c_BTC = mfcc(mel_BTF.gather(1, held_BT[..., None].expand(-1, -1, mel_BTF.shape[-1])))[:, :frames]
    keep_BT1 = valid_frames(lengths_B * SUBSAMPLE, frames)[..., None]
    count_B11 = (lengths_B * SUBSAMPLE)[:, None, None]
    c_BTC = c_BTC - (c_BTC * keep_BT1).sum(1, keepdim=True) / count_B11
    std_B1C = ((c_BTC * keep_BT1).square().sum(1, keepdim=True) / count_B11).sqrt()
    return (c_BTC / std_B1C.clamp_min(1e-3)).unflatten(1, (-1, SUBSAMPLE)).mean(2)


def check_targets(counts_K: torch.Tensor, field: str = "semantic.model.targets_k") -> float:
    """The entropy (nats) of the targets in use; raises ValueError, naming `field`, where they are empty or all but constant."""
    total, used, h = int(counts_K.sum()), int((counts_K > 0).sum()), kmeans.entropy(counts_K)
    if total == 0 or h < MIN_ENTROPY * math.log(len(counts_K)):
        what = "empty" if total == 0 else "all but constant"
        raise ValueError(f"masked targets are {what}: {total} frames, {used} of {len(counts_K)} in use, "
                         f"entropy {h:.3f} nats; the loss would fall without learning. Look "
                         f"at the corpus (silent or repeated audio?) or lower {field}")
    return h


class MaskedObjective:
    unit = "audio s"

    def __init__(self, model: MaskedModel, inputs: MaskedInputs, ctx: Context, targets: Targets | None = None):
        """`targets` None: the model's own codebook over MFCCs."""
        self.modules = {"model": model.to(ctx.device)}
        self.inputs, self.ctx, self.targets = inputs, ctx, targets or self._of_mfcc
        self._before: float | None = None  # the last validation's loss

    @property
    def model(self) -> MaskedModel:
        return self.modules["model"]

    def load(self, step: int, rows: Sequence[int]) -> MaskedBatch:
        return self.inputs.batch(step, rows)

    def _of_mfcc(self, batch: MaskedBatch, mel_BTF: torch.Tensor, frames_B: torch.Tensor) -> torch.Tensor:
        x_BTC = target_features(mel_BTF, frames_B)
        return kmeans.assign(x_BTC.flatten(0, 1), self.model.targets.codebook).view(x_BTC.shape[:2])

    def train_step(self, engines: Mapping[str, Any], batches: list[MaskedBatch], step: int) -> dict[str, torch.Tensor]:
        device, engine = self.ctx.device, engines["model"]
        counts = [(int(b.mask_BT.sum()), sum(frames_of(b.lengths_B.tolist()))) for b in batches]
        masked, frames = all_sum(torch.tensor(counts, dtype=torch.float32, device=device).sum(0))
        totals = 0
        for i, batch in enumerate(batches):
            loss, figures = self._loss(engine, batch, self.inputs.sizes.unmasked * masked / (frames - masked).clamp_min(1))
            # The engine averages over ranks: times the world, over all masked frames, each frame weighs the same.
            engine.backward(loss * (self.ctx.world / masked), last=i == len(batches) - 1)
            totals = totals + figures
        norm = engine.step()
        return {**self._report(all_sum(totals)), "grad_norm": norm}

    def _loss(self, model: Any, batch: MaskedBatch,
              unmasked: float | torch.Tensor = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed cross-entropy on masked frames and `unmasked` times that on the others; and, of masked frames alone, (loss,
        right, frames, audio s, K predicted, K targets) as sums."""
        device = self.ctx.device
        clean_BTF, heard_BTF, frames_B = self.inputs.mels(batch, device)
        mask_BT = batch.mask_BT.to(device)
        with torch.no_grad():
            targets_BT = self.targets(batch, clean_BTF, frames_B)
        logits_BTK, targets_N = model(heard_BTF, frames_B, mask_BT), targets_BT[mask_BT]
        logits_NK = logits_BTK[mask_BT].float()
        guessed = loss = F.cross_entropy(logits_NK, targets_N, reduction="sum")
        if self.inputs.sizes.unmasked:
            seen_BT = valid_frames(frames_B, mask_BT.shape[1]) & ~mask_BT
            loss = loss + unmasked * F.cross_entropy(logits_BTK[seen_BT].float(), targets_BT[seen_BT], reduction="sum")
        with torch.no_grad():
            head = torch.stack([guessed.detach(), (logits_NK.argmax(-1) == targets_N).sum().float(), mask_BT.sum().float(),
                                torch.tensor(batch.audio_s, device=device)]).double()
            figures = torch.cat([head, logits_NK.softmax(-1).sum(0).double(),
                                 torch.bincount(targets_N, minlength=logits_NK.shape[-1]).double()])
        return loss, figures

    def _report(self, totals: torch.Tensor) -> dict[str, torch.Tensor]:
        loss, right, frames, audio_s = totals[:4]
        predicted, targets = perplexity(totals[4:].view(2, -1))
        return {"loss": loss / frames, "accuracy": right / frames, "units": audio_s,
                "target_entropy": targets.log(), "prediction_perplexity": predicted}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy on masked frames of dev pieces (each rank takes every world-th), and alarms (1 = it rings):
        targets or predictions all but constant, a loss no lower than a guess by frequency, a loss that stands still."""
        self.model.eval()
        k = self.model.head.out_features
        totals = torch.zeros(4 + 2 * k, dtype=torch.float64, device=self.ctx.device)
        for batch in self.inputs.pieces():
            totals += self._loss(self.model, batch)[1]
        self.model.train()
        report = {name: float(value) for name, value in self._report(all_sum(totals)).items() if name != "units"}
        entropy, before, self._before = report["target_entropy"], self._before, report["loss"]
        rings = {"constant_targets": entropy < MIN_ENTROPY * math.log(k),
                 "constant_predictions": report["prediction_perplexity"] < max(1.5, COLLAPSED * math.exp(entropy)),
                 "no_better_than_guessing": report["loss"] >= entropy,
                 "constant_loss": has_collapsed(before, report["loss"])}
        return report | {f"alarm/{name}": float(on) for name, on in rings.items()}

    def export(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return export_encoder(self.model.encoder, "hubert", {"targets_k": self.model.head.out_features})


def has_collapsed(before: float | None, loss: float) -> bool:
    """Whether a validation's loss is that of the one before."""
    return before is not None and abs(before - loss) < 1e-5 * before


def export_encoder(encoder, objective: str, more: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What `tokenizers.semantic.load_extractor` reads."""
    return ({f"encoder.{name}": value for name, value in encoder.state_dict().items()},
            {"format": MASKED_FORMAT, "family": FAMILY, "layer_convention": LAYER_CONVENTION, "objective": objective,
             "encoder": encoder.sizes.to_json(), "sample_rate": SAMPLE_RATE, **more})


def fit_targets(model: MaskedModel, points: list[torch.Tensor], seed: int) -> float:
    """Sets the codebook of MFCC targets from x_TC of some crops; returns the targets' entropy.

    Raises ValueError where there are too few distinct frames for targets_k, or the targets are all but constant.
    """
    try:
        found = kmeans.fit(points, len(model.targets.codebook), rng.derive(seed, "targets"), iterations=50)
    except ValueError as e:
        raise ValueError(f"semantic.model.targets_k: {e}") from e
    model.targets.codebook.copy_(found.centroids)
    return check_targets(found.counts)


def teacher(path: str, device: torch.device, dtype: str, pieces: Iterable[MaskedBatch]) -> tuple[Targets, int]:
    """Targets of the artefact at `path`, checked on some batches, and how many there are. All ranks take part."""
    tokenizer = load_semantic(path, str(device), dtype)

    def targets(batch: MaskedBatch, mel_BTF: torch.Tensor, frames_B: torch.Tensor) -> torch.Tensor:
        return tokenizer.codes(batch.wav_BT.to(device), batch.lengths_B)[0]

    k = tokenizer.spec.vocab
    counts_K = torch.zeros(k, dtype=torch.int64, device=device)
    for batch in pieces:
        labels_BT, frames_B = tokenizer.codes(batch.wav_BT.to(device), batch.lengths_B)
        counts_K += torch.bincount(labels_BT[valid_frames(frames_B, labels_BT.shape[1])], minlength=k)
    check_targets(all_sum(counts_K).cpu(), "semantic.iterations' k")
    return targets, k


def masked_objective(config: Mapping[str, Any], inputs: Mapping[str, str], ctx: Context) -> MaskedObjective:
    """The factory (train.objectives.base): config {"model", "train", "iteration" (None: the first), "where", "corpus", "seed"},
    inputs {"manifest": path} and for an iteration beyond the first also masked_model[_N] and targets_N."""
    sizes, seed, again = config["model"], config["seed"], config["iteration"]
    data, clips = masked_inputs(config, inputs, ctx)
    conformer = EncoderSizes(sizes.dim, sizes.layers, sizes.heads, sizes.ff, sizes.conv_kernel, sizes.dropout)
    sample = fit_sample(clips, roots(config["corpus"]), crop_samples(sizes), seed)
    if again is None:
        model, targets = MaskedModel(conformer, sizes.targets_k), None
    else:
        path = next(p for name, p in inputs.items() if name.startswith("targets"))
        targets, k = teacher(path, ctx.device, config["train"].dtype, data.pieces())
        model = MaskedModel(conformer, k, target_dim=0)
    if again is not None and again.start == "previous":
        before = load_extractor(next(p for name, p in inputs.items() if name.startswith("masked_model")))
        if not isinstance(before, ConformerExtractor) or before.encoder.sizes.to_json() | {"dropout": 0} != \
                conformer.to_json() | {"dropout": 0}:
            raise ValueError("semantic.iterations: start: previous needs a model of the same sizes before it: say start: fresh")
        model.encoder.load_state_dict(before.state())
        return MaskedObjective(model, data, ctx, targets)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, so that 1 and 2 workers get one codebook
    try:
        measured, points = Statistics(), []
        for mel_BTF, frames_B in sample:
            measured.add(mel_BTF)
            if again is None:
                points.append(target_features(mel_BTF, frames_B)[0])
        measured.into(model.encoder)
        if again is None:
            fit_targets(model, points, seed)
    finally:
        torch.set_num_threads(threads)
    return MaskedObjective(model, data, ctx, targets)
