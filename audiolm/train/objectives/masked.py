"""Masked prediction of k-means targets: HuBERT (2106.07447) on crops of the training clips.

Iteration 1 predicts clusters of MFCCs (objectives/mfcc_targets.py), or of semitones (semitone_targets.py).  Their
codebook is fitted here and is a float32 buffer, so that checkpoints carry it.  Later iterations predict tokens of the
artifact of the step targets_N, made from the clean crop.
The loss is the cross-entropy on masked frames, weighted by frame over micro-batches and ranks (alpha = 1 in HuBERT's II-B;
`unmasked` adds the others).  Legend: B rows, T frames at 25 Hz, F mel bands at 100 Hz, K targets, N masked frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from audiolm import rng
from audiolm.config.semantic import MaskedModelConfig
from audiolm.data.parallel import one_thread
from audiolm.models import kmeans
from audiolm.models.conformer import Encoder, MaskedModel, valid_frames
from audiolm.models.entropy import entropy, perplexity
from audiolm.models.semitones import KEYS
from audiolm.models.transfer import send
from audiolm.tokenizers.extractor import ConformerExtractor
from audiolm.tokenizers.semantic import SemanticTokenizer, load_extractor, load_semantic
from audiolm.train.engine import all_sum
from audiolm.train.objectives.alarms import COLLAPSED, is_constant, with_alarms
from audiolm.train.objectives.base import Context, Engine
from audiolm.train.objectives.masked_inputs import (
    MaskedBatch,
    MaskedInputs,
    Sample,
    encoder_sizes,
    export_encoder,
    masked_inputs,
    measure_inputs,
)
from audiolm.train.objectives.mfcc_targets import MFCC_FEATURES, nearest_warp, target_features, warped_features, warped_points
from audiolm.train.objectives.semitone_targets import semitone_targets
from audiolm.train.objectives.start import start_encoder

MIN_ENTROPY = 0.1  # of ln k: below it the targets are as good as constant and the loss says nothing (fairseq PR 4521)
Targets = Callable[[MaskedBatch, torch.Tensor, torch.Tensor], torch.Tensor]  # batch, clean mel_BTF, frames_B -> labels_BT


def check_targets(counts_K: torch.Tensor, field: str = "semantic.model.targets_k") -> float:
    """The entropy (nats) of the targets in use. Raises ValueError, naming `field`, where they are empty or all but constant."""
    total, used, nats = int(counts_K.sum()), int((counts_K > 0).sum()), float(entropy(counts_K.double()))
    if total == 0 or nats < MIN_ENTROPY * math.log(len(counts_K)):
        raise ValueError(f"masked targets are {'all but constant' if total else 'empty'}: {total} frames, {used} of "
                         f"{len(counts_K)} in use, entropy {nats:.3f} nats; the loss would fall without learning. Look at "
                         f"the corpus (silent or repeated audio?) or lower {field}")
    return nats


class MaskedObjective:
    unit = "audio s"

    def __init__(self, model: MaskedModel, inputs: MaskedInputs, ctx: Context, targets: Targets | None = None):
        """`targets` None: the model's own codebook over MFCCs or semitones."""
        self.modules = {"model": model.to(ctx.device)}
        if ctx.compile:
            model.encoder.compile_training()
        self.inputs, self.ctx, self.targets = inputs, ctx, targets or self._first_targets
        self._before: float | None = None  # loss of the last validation; lost on a resume, which delays an alarm by one

    @property
    def model(self) -> MaskedModel:
        return self.modules["model"]

    def load(self, step: int, rows: Sequence[int]) -> MaskedBatch:
        return self.inputs.batch(step, rows).pinned(self.ctx.device)

    def _first_targets(self, batch: MaskedBatch, mel_BTF: torch.Tensor, frames_B: torch.Tensor) -> torch.Tensor:
        sizes, codebook_KC = self.inputs.sizes, self.model.targets.codebook
        if sizes.targets_cents:
            x_WBTC = warped_features(mel_BTF, frames_B, sizes.normalise, sizes.targets_cents)
            x_BTC = nearest_warp(x_WBTC, frames_B, codebook_KC)
        else:
            x_BTC = first_features(sizes, mel_BTF, frames_B)
        return kmeans.assign(x_BTC.flatten(0, 1), codebook_KC).view(x_BTC.shape[:2])

    def train_step(self, engines: Mapping[str, Engine], batches: list[MaskedBatch], step: int) -> dict[str, torch.Tensor]:
        """One update; all ranks take part."""
        device, engine = self.ctx.device, engines["model"]
        # The loss is a mean over the global batch's masked frames, so their number is needed before the first backward.
        counts = [(int(b.mask_BT.sum()), int(b.frames_B.sum())) for b in batches]
        masked, frames = all_sum(send(torch.tensor(counts, dtype=torch.float32).sum(0), device))
        totals = 0
        for batch in batches:
            loss, sums = self._loss(engine, batch, self.inputs.sizes.unmasked * masked / (frames - masked).clamp_min(1))
            # Engines average over ranks: times the world, over all masked frames, each frame weighs the same.
            engine.backward(loss * (self.ctx.world / masked))
            totals = totals + sums
        norm = engine.step()
        return {**self._report(all_sum(totals)), "grad_norm": norm}

    def _loss(self, model: Any, batch: MaskedBatch,
              unmasked: float | torch.Tensor = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss: summed cross-entropy on masked frames and `unmasked` times that on the others.

        With it sums over masked frames alone, without gradients: (loss, right, frames, audio s, K predicted, K targets).
        """
        device = self.ctx.device
        clean_BTF, input_BTF, frames_B = self.inputs.mels(batch, device)
        mask_BT, masked_N = send(batch.mask_BT, device), send(_places(batch.mask_BT), device)
        # Targets come from clean audio: a target should not depend on the noise.
        with torch.no_grad():
            targets_BT = self.targets(batch, clean_BTF, frames_B)
        logits_MK = model(input_BTF, None if batch.full else frames_B, mask_BT).flatten(0, 1)
        logits_NK, targets_N = logits_MK[masked_N].float(), targets_BT.flatten()[masked_N]
        masked_loss = loss = F.cross_entropy(logits_NK, targets_N, reduction="sum")
        if self.inputs.sizes.unmasked:
            visible_N = send(_places(valid_frames(batch.frames_B, batch.mask_BT.shape[1]) & ~batch.mask_BT), device)
            loss = loss + unmasked * F.cross_entropy(logits_MK[visible_N].float(), targets_BT.flatten()[visible_N],
                                                     reduction="sum")
        with torch.no_grad():
            right = (logits_NK.argmax(-1) == targets_N).sum()
            head = torch.stack([masked_loss.detach(), right.float(), mask_BT.sum().float(),
                                torch.full((), batch.audio_s, device=device)]).double()
            predicted_K = logits_NK.softmax(-1).sum(0).double()
            # not bincount, which asks a GPU for the largest number
            counts_K = torch.zeros_like(predicted_K).index_add_(0, targets_N, torch.ones_like(targets_N, dtype=torch.float64))
            sums = torch.cat([head, predicted_K, counts_K])
        return loss, sums

    def _report(self, totals: torch.Tensor) -> dict[str, torch.Tensor]:
        loss, right, frames, audio_s = totals[:4]
        predicted, targets = perplexity(totals[4:].view(2, -1))
        return {"loss": loss / frames, "accuracy": right / frames, "units": audio_s,
                "target_entropy": targets.log(), "prediction_perplexity": predicted}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy on masked frames of dev pieces, shared out over ranks, and alarms.

        Alarms: targets or predictions all but constant, a loss no lower than guessing by frequency, a constant loss.
        """
        k = self.model.head.out_features
        totals = torch.zeros(4 + 2 * k, dtype=torch.float64, device=self.ctx.device)
        self.model.eval()
        for batch in self.inputs.pieces():
            totals += self._loss(self.model, batch)[1]
        self.model.train()
        report = {name: float(value) for name, value in self._report(all_sum(totals)).items() if name != "units"}
        entropy, before, self._before = report["target_entropy"], self._before, report["loss"]
        return with_alarms(report, {
            "constant_targets": entropy < MIN_ENTROPY * math.log(k),
            "constant_predictions": report["prediction_perplexity"] < max(1.5, COLLAPSED * math.exp(entropy)),
            "no_better_than_guessing": report["loss"] >= entropy,
            "constant_loss": is_constant(before, report["loss"])})

    def export(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return export_encoder(self.model.encoder, "hubert", {"targets_k": self.model.head.out_features})


def _places(mask_BT: torch.Tensor) -> torch.Tensor:
    """The numbers of a mask's places, row after row; on the CPU, as a GPU would be waited for to count them."""
    return mask_BT.flatten().nonzero()[:, 0]


def first_features(sizes: MaskedModelConfig, mel_BTF: torch.Tensor, frames_B: torch.Tensor) -> torch.Tensor:
    """x_BTC that the first targets are clusters of, where the spectrum is not warped."""
    if sizes.spectrum == "semitones":
        return semitone_targets(mel_BTF, frames_B)
    return target_features(mel_BTF, frames_B, sizes.normalise)


def target_points(sizes: MaskedModelConfig, sample: Sample) -> list[torch.Tensor]:
    """Features of each of a sample's crops, to fit the first targets' codebook on: x_TC, or x_WTC where they have warps."""
    if not sizes.targets_cents:
        return [first_features(sizes, *pair)[0] for pair in sample]
    return [warped_features(*pair, sizes.normalise, sizes.targets_cents)[:, 0] for pair in sample]


def fit_targets(model: MaskedModel, points: list[torch.Tensor], seed: int) -> float:
    """Sets the codebook of the first targets from `target_points`; returns the targets' entropy.

    Raises ValueError where there are too few distinct frames for targets_k, or the targets are all but constant.
    """
    k = len(model.targets.codebook)
    try:
        if points[0].ndim == 3:
            points = warped_points(points, k, rng.derive(seed, "target warps"))
        fit = kmeans.fit(points, k, rng.derive(seed, "targets"), iterations=50)
    except ValueError as e:
        raise ValueError(f"semantic.model.targets_k: {e}") from e
    model.targets.codebook.copy_(fit.centroids)
    return check_targets(fit.counts)


def teacher(path: str, device: torch.device, dtype: str, pieces: Iterable[MaskedBatch]) -> tuple[Targets, int]:
    """The targets function of the tokenizer at `path`, and its number of targets. All ranks take part.

    Raises ValueError where the targets of `pieces` are empty or all but constant.
    """
    tokenizer = load_semantic(path, str(device), dtype)

    k = tokenizer.spec.vocab
    counts_K = torch.zeros(k, dtype=torch.int64, device=device)
    for batch in pieces:
        labels_BT, frames_B = tokenizer.codes(batch.wav_BT, batch.lengths_B)
        counts_K += torch.bincount(labels_BT[valid_frames(frames_B, labels_BT.shape[1])], minlength=k)
    check_targets(all_sum(counts_K).cpu(), "semantic.iterations' k")
    return lambda batch, mel_BTF, frames_B: tokens_of(tokenizer, batch), k


def tokens_of(tokenizer: SemanticTokenizer, batch: MaskedBatch) -> torch.Tensor:
    """labels_BT of a batch's clean audio, on the tokenizer's device."""
    labels_BT, _ = tokenizer.codes(batch.wav_BT, batch.lengths_B)
    return F.pad(labels_BT, (0, batch.mask_BT.shape[1] - labels_BT.shape[1]))  # they end with the longest row


def masked_objective(config: Mapping[str, Any], inputs: Mapping[str, str], ctx: Context) -> MaskedObjective:
    """Factory. config: model, train, iteration (None: the first), where, corpus, seed, and `start` where the first
    starts from an encoder's weights; inputs: {"manifest": path} and for an iteration beyond the first also
    masked_model[_N] and targets_N."""
    sizes, seed, iteration = config["model"], config["seed"], config["iteration"]
    data, sample = masked_inputs(config, inputs, ctx)
    if iteration is None:
        model = MaskedModel(encoder_sizes(sizes), sizes.targets_k, KEYS if sizes.spectrum == "semitones" else MFCC_FEATURES)
        with one_thread():
            sample = list(sample)  # an hour of log-mels: 115 MB
            if config.get("start"):
                start_encoder(model.encoder, config["start"])
            else:
                measure_inputs(model.encoder, sample)
            fit_targets(model, target_points(sizes, sample), seed)
        return MaskedObjective(model, data, ctx)

    def path_of(prefix: str) -> str:
        return next(path for name, path in inputs.items() if name.startswith(prefix))

    # A later iteration: the targets are another model's clusters.
    targets, k = teacher(path_of("targets"), ctx.device, config["train"].dtype, data.pieces())
    model = MaskedModel(encoder_sizes(sizes), k, target_dim=0)
    if iteration.start == "previous":
        _load_encoder(model.encoder, path_of("masked_model"))
    else:
        with one_thread():
            measure_inputs(model.encoder, sample)
    return MaskedObjective(model, data, ctx, targets)


def _load_encoder(encoder: Encoder, path: str) -> None:
    """Weights and statistics of an earlier iteration's encoder. Raises ValueError where its sizes differ."""
    before = load_extractor(path)
    same = {"dropout": 0}  # no weight depends on it
    if not isinstance(before, ConformerExtractor) or before.encoder.sizes.to_json() | same != encoder.sizes.to_json() | same:
        raise ValueError("semantic.iterations: start: previous needs a model of the same sizes before it: say start: fresh")
    encoder.load_state_dict(before.state())
