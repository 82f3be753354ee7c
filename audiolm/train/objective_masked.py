"""Masked prediction of k-means targets: HuBERT (2106.07447), iteration 1, on crops of the training clips.

Targets are clusters of MFCCs with differences, normalised per crop and averaged over 4 frames to 25 Hz; loss is the
cross-entropy on masked frames only, weighted by frame over micro-batches and ranks.  Input statistics and the target
codebook come from a bounded sample of training clips, the same on every rank, and live in float32 buffers, so that
checkpoints carry them.  Legend: B rows, T frames at 25 Hz, F mel bands at 100 Hz, K targets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from audiolm import rng
from audiolm.config import Masked
from audiolm.data.audio import read_clip
from audiolm.data.crops import AudioCrops
from audiolm.data.manifest import read_clips, roots
from audiolm.models import kmeans
from audiolm.models.masked import SUBSAMPLE, EncoderSizes, MaskedModel, valid_frames
from audiolm.models.mel import mfcc
from audiolm.tokenizers.base import SAMPLE_RATE, SEMANTIC_HOP
from audiolm.tokenizers.semantic import FAMILY, mel_of
from audiolm.train.engine import all_sum
from audiolm.train.objective import Context

FIT_S = 3600.0  # audio that input statistics and target codebook are measured on
EVAL_S = 900.0  # dev audio of one evaluation, kept in memory
MIN_ENTROPY = 0.1  # of ln k: below it the targets are as good as constant and the loss says nothing (fairseq PR 4521)


@dataclass(frozen=True)
class Batch:
    wav_BT: torch.Tensor
    lengths_B: torch.Tensor
    mask_BT: torch.Tensor  # frames the model must guess


def span_mask(frames: int, span: int, share: float, generator: np.random.Generator) -> np.ndarray:
    """mask_T with exactly round(share x frames) frames set (at least 1), in spans of `span` that may touch."""
    want = min(frames, max(1, round(share * frames)))
    mask_T = np.zeros(frames, bool)
    for start in generator.permutation(max(1, frames - span + 1)):
        left = want - int(mask_T.sum())
        if left <= 0:
            break
        open_ = np.flatnonzero(~mask_T[start:start + span])[:left]
        mask_T[start + open_] = True
    return mask_T


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


def check_targets(counts_K: torch.Tensor) -> float:
    """The entropy (nats) of the targets in use; raises ValueError where they are empty or all but constant."""
    total, used, h = int(counts_K.sum()), int((counts_K > 0).sum()), kmeans.entropy(counts_K)
    if total == 0 or h < MIN_ENTROPY * math.log(len(counts_K)):
        what = "empty" if total == 0 else "all but constant"
        raise ValueError(f"masked targets are {what}: {total} frames, {used} of targets_k = {len(counts_K)} in use, "
                         f"entropy {h:.3f} nats; the loss would fall without learning. Look "
                         "at the corpus (silent or repeated audio?) or lower semantic.model.targets_k")
    return h


class MaskedObjective:
    unit = "audio s"

    def __init__(self, model: MaskedModel, sizes: Masked, crops: AudioCrops, pieces: list[torch.Tensor],
                 piece_ids: list[int], ctx: Context):
        self.modules = {"model": model.to(ctx.device)}
        self.sizes, self.crops, self.ctx = sizes, crops, ctx
        self.pieces, self.piece_ids = pieces, piece_ids

    @property
    def model(self) -> MaskedModel:
        return self.modules["model"]

    def load(self, step: int, rows: Sequence[int]) -> Batch:
        wav_BT, lengths_B = self.crops.batch(step, rows)
        return self._masked(wav_BT, lengths_B, [rng.generator(self.ctx.seed, "mask", step, row) for row in rows])

    def _masked(self, wav_BT: torch.Tensor, lengths_B: torch.Tensor, generators: list) -> Batch:
        frames = [max(1, math.ceil(n / SEMANTIC_HOP)) for n in lengths_B.tolist()]
        mask_BT = torch.zeros(len(frames), max(frames), dtype=torch.bool)
        span = max(1, round(self.sizes.mask_span_s * SAMPLE_RATE / SEMANTIC_HOP))
        for row, n, generator in zip(mask_BT, frames, generators, strict=True):
            row[:n] = torch.from_numpy(span_mask(n, span, self.sizes.mask_share, generator))
        return Batch(wav_BT, lengths_B, mask_BT)

    def train_step(self, engines: Mapping[str, Any], batches: list[Batch], step: int) -> dict[str, torch.Tensor]:
        device, engine = self.ctx.device, engines["model"]
        masked = all_sum(torch.tensor(float(sum(int(b.mask_BT.sum()) for b in batches)), device=device))
        totals = 0
        for i, batch in enumerate(batches):
            loss, figures = self._loss(engine, batch)
            # The engine averages over ranks: times the world, over all masked frames, each frame weighs the same.
            engine.backward(loss * (self.ctx.world / masked), last=i == len(batches) - 1)
            totals = totals + figures
        norm = engine.step()
        return {**self._report(all_sum(totals)), "grad_norm": norm}

    def _loss(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed cross-entropy on masked frames, and (loss, right, frames, audio s, K predicted, K targets) as sums."""
        device = self.ctx.device
        mel_BTF, frames_B = mel_of(batch.wav_BT.to(device), batch.lengths_B.to(device))
        mask_BT = batch.mask_BT.to(device)
        codebook = self.model.targets.codebook
        targets_N = kmeans.assign(target_features(mel_BTF, frames_B)[mask_BT], codebook)
        logits_NK = model(mel_BTF, frames_B, mask_BT)[mask_BT].float()
        loss = F.cross_entropy(logits_NK, targets_N, reduction="sum")
        with torch.no_grad():
            head = torch.stack([loss.detach(), (logits_NK.argmax(-1) == targets_N).sum().float(),
                                mask_BT.sum().float(), batch.lengths_B.sum().to(device) / SAMPLE_RATE]).double()
            figures = torch.cat([head, logits_NK.softmax(-1).sum(0).double(),
                                 torch.bincount(targets_N, minlength=len(codebook)).double()])
        return loss, figures

    def _report(self, totals: torch.Tensor) -> dict[str, torch.Tensor]:
        loss, right, frames, audio_s = totals[:4]
        predicted_K, targets_K = totals[4:].chunk(2)
        return {"loss": loss / frames, "accuracy": right / frames, "units": audio_s,
                "target_entropy": torch.tensor(kmeans.entropy(targets_K)),
                "prediction_perplexity": torch.tensor(math.exp(kmeans.entropy(predicted_K)))}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy on masked frames of dev pieces; each rank takes every world-th."""
        self.model.eval()
        totals = torch.zeros(4 + 2 * len(self.model.targets.codebook), dtype=torch.float64, device=self.ctx.device)
        for piece, i in zip(self.pieces, self.piece_ids, strict=True):
            generators = [rng.generator(self.ctx.seed, "mask-eval", i)]
            batch = self._masked(piece[None], torch.tensor([len(piece)]), generators)
            totals += self._loss(self.model, batch)[1]
        self.model.train()
        report = self._report(all_sum(totals))
        report.pop("units")
        return {name: float(value) for name, value in report.items()}

    def export(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        encoder = self.model.encoder
        return ({f"encoder.{name}": value for name, value in encoder.state_dict().items()},
                {"format": "audiolm-masked-1", "family": FAMILY, "objective": "hubert-mfcc",
                 "encoder": encoder.sizes.to_json(), "sample_rate": SAMPLE_RATE, "targets_k": self.sizes.targets_k})


def fit_inputs(model: MaskedModel, clips: Sequence, folders: dict[str, str], crop: int, seed: int) -> float:
    """Sets input statistics and target codebook from random crops of at most FIT_S; returns the targets' entropy.

    Raises ValueError where there are too few distinct frames for targets_k, or the targets are all but constant.
    """
    chosen, seconds = [], 0.0
    for i in rng.generator(seed, "fit-clips").permutation(len(clips)).tolist():
        if seconds >= FIT_S:
            break
        chosen.append(i)
        seconds += min(clips[i].samples, crop) / SAMPLE_RATE
    total, squares, count, points = 0.0, 0.0, 0, []
    for i in sorted(chosen):  # a fixed order of addition
        start = int(rng.generator(seed, "fit-crop", i).integers(max(0, clips[i].samples - crop) + 1))
        wav = torch.from_numpy(read_clip(clips[i], folders, start, min(crop, clips[i].samples)))
        mel_BTF, frames_B = mel_of(wav[None], torch.tensor([len(wav)]))
        total, squares = total + mel_BTF[0].double().sum(0), squares + mel_BTF[0].double().square().sum(0)
        count += mel_BTF.shape[1]
        points.append(target_features(mel_BTF, frames_B)[0])
    mean, k = total / count, len(model.targets.codebook)
    statistics = model.encoder.statistics
    statistics.mean.copy_(mean)
    statistics.std.copy_((squares / count - mean.square()).clamp_min(1e-4).sqrt())
    try:
        found = kmeans.fit(points, k, rng.derive(seed, "targets"), iterations=50)
    except ValueError as e:
        raise ValueError(f"semantic.model.targets_k: {e}") from e
    model.targets.codebook.copy_(found.centroids)
    return check_targets(found.counts)


def eval_pieces(clips: Sequence, crop: int) -> list[tuple[int, int, int]]:
    """(clip, start, samples) of whole crops that cover the dev clips, evenly thinned to EVAL_S."""
    every = [(i, at, min(crop, c.samples - at)) for i, c in enumerate(clips) for at in range(0, c.samples, crop)
             if at == 0 or c.samples - at >= crop // 2]
    keep = min(len(every), max(1, int(EVAL_S * SAMPLE_RATE / crop)))
    return [every[j * len(every) // keep] for j in range(keep)]


def masked_objective(config: Mapping[str, Any], inputs: Mapping[str, str], ctx: Context) -> MaskedObjective:
    """The factory (train.objective): config {"model", "where", "corpus", "seed"}, inputs {"manifest": path}."""
    sizes, where, seed = config["model"], config["where"], config["seed"]
    folders = roots(config["corpus"])
    train, dev = (read_clips(inputs["manifest"], split, where) for split in ("train", "dev"))
    for split, clips in (("train", train), ("dev", dev)):
        if not clips:
            raise ValueError(f"the masked model needs {split} clips and the manifest has none for semantic.where = "
                             f"{where.source}: widen semantic.where or raise corpus.{split}")
    crop = max(1, round(sizes.crop_s * SAMPLE_RATE / SEMANTIC_HOP)) * SEMANTIC_HOP
    model = MaskedModel(EncoderSizes(sizes.dim, sizes.layers, sizes.heads, sizes.ff, sizes.conv_kernel, sizes.dropout),
                        sizes.targets_k)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, so that 1 and 2 workers get one codebook
    try:
        fit_inputs(model, train, folders, crop, seed)
    finally:
        torch.set_num_threads(threads)
    mine = list(enumerate(eval_pieces(dev, crop)))[ctx.rank::ctx.world]
    pieces = [torch.from_numpy(read_clip(dev[i], folders, at, n)) for _, (i, at, n) in mine]
    crops = AudioCrops(train, folders, crop, sizes.train.batch, seed, ctx.cache_mb)
    return MaskedObjective(model, sizes, crops, pieces, [j for j, _ in mine], ctx)
