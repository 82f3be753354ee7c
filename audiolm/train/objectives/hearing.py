"""Training of the decoder that hears (lm.decoder): the codec's frames from slow latents, semantic ids and the mean latent.

The target are the frames that the codec makes of true codes, so token stores are all that is read.  The latents are those of
true codes, or of codes that stage 2 draws in their place (drawn.py).
A batch: z_BN, codes_BTQ, known_BT (False: padding), and what the draws need.  Crops follow from (seed, step, row).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from audiolm import rng
from audiolm.config.lm import DecoderConfig
from audiolm.data.crops import CropSampler
from audiolm.data.tokens import RATIO, spec_of
from audiolm.lm.batches import TokenBatches
from audiolm.lm.stages import Stage
from audiolm.models.spectral.codec import SpectralCodec
from audiolm.models.spectral.hearing import HearingDecoder, HearingSizes
from audiolm.tokenizers.acoustic import AcousticTokenizer, load_codec
from audiolm.tokenizers.base import ACOUSTIC_HOP, SAMPLE_RATE
from audiolm.tokenizers.semantic import load_semantic
from audiolm.tokenizers.start import StartWeights
from audiolm.train.engine import all_sum
from audiolm.train.objectives.base import Context, Engine, autocast, pinned
from audiolm.train.objectives.drawn import DrawnCodes
from audiolm.train.objectives.start import start_decoder

SQUARE = 0.3  # weight of the squared distance beside the absolute one, as in the codec's training


class HearingObjective:
    unit, exported = "frames", "decoder"

    def __init__(self, shape: DecoderConfig, codec: AcousticTokenizer, centroid_KD: torch.Tensor, train: TokenBatches,
                 dev: TokenBatches, rows: int, ctx: Context, start: StartWeights | None = None,
                 drawn: DrawnCodes | None = None):
        self.drawn = drawn
        self.shape, self.data, self.dev, self.ctx = shape, train, dev, ctx
        self.codec, self.digest, self.crops = codec.model.to(ctx.device).requires_grad_(False), codec.hash, dev.fixed(rows)
        lengths = train.lengths
        shards = np.repeat(lengths.shards, np.diff(lengths.firsts))
        self.order = CropSampler(lengths.frames, shards, train.stage.crop_frames, shape.train.batch, ctx.seed)
        slow = 2 * round(shape.slow_s * SAMPLE_RATE / ACOUSTIC_HOP / 2) + 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.derive(ctx.seed, "init lm_decoder"))
            decoder = HearingDecoder(HearingSizes(self.codec.quantizer.dim, *centroid_KD.shape, len(self.codec.mean_F),
                                                  shape.width, shape.layers, slow))
        if start:
            start_decoder(decoder, start, train.semantic.path)
        else:
            decoder.initialise(codec.code_vectors()[0], centroid_KD)
        self.modules: dict[str, nn.Module] = {"decoder": decoder}

    def load(self, step: int, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        crop, crops = self.data.stage.crop_frames, []
        for clip, start in (self.order.row(step, row) for row in rows):
            crops.append(self.data.read(clip, start, min(start + crop, int(self.data.frames[clip])))[:2])
        draws = [rng.generator(self.ctx.seed, "drawn", step, row) for row in rows]
        return pinned(self._batch(crops, crop, draws), self.ctx.device)

    def _batch(self, crops: Sequence[tuple[np.ndarray, np.ndarray]], semantic_frames: int,
               draws: Sequence[np.random.Generator]) -> dict[str, torch.Tensor]:
        """Crops padded to a length, with what their draws need."""
        batch = collate(crops, semantic_frames)
        return batch | (self.drawn.load(crops, draws, batch["known_BT"]) if self.drawn else {})

    def train_step(self, engines: Mapping[str, Engine], batches: list[dict[str, torch.Tensor]],
                   step: int) -> dict[str, torch.Tensor]:
        """One update; all ranks take part."""
        engine = engines["decoder"]
        engine.module.train()
        batches = [{name: x.to(self.ctx.device, non_blocking=True) for name, x in batch.items()} for batch in batches]
        frames = all_sum(torch.stack([batch["known_BT"].sum() for batch in batches]).sum().double())
        total = torch.zeros((), dtype=torch.float64, device=self.ctx.device)
        for batch in batches:
            distance = self._distance(engine, batch)
            # Engines average over ranks: times the world, over all frames, each frame weighs the same.
            engine.backward(distance * (self.ctx.world / frames.float()))
            total += distance.detach().double()
        return {"loss": all_sum(total) / frames, "units": frames, "grad_norm": engine.step()}

    def _distance(self, decoder: Engine | nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The distance of the heard frames to the codec's, summed over frames."""
        known_BT = batch["known_BT"]
        with torch.no_grad(), torch.autocast(self.ctx.device.type, enabled=False):  # the target is exact in validation too
            x_BDT = self.codec.quantizer.decode(batch["codes_BTQ"])
            true_BTF = self.codec.expand(x_BDT)
            voice_BD = (x_BDT * known_BT[:, None]).sum(2) / known_BT.sum(1, keepdim=True)
            if self.drawn:
                x_BDT = self.codec.quantizer.decode(self.drawn(batch))
        heard_BTF = self.codec.expand(*decoder(x_BDT, voice_BD, batch["z_BN"], known_BT))
        off_BTF = (heard_BTF - true_BTF) / self.codec.scale
        return ((off_BTF.abs() + SQUARE * off_BTF.square()).mean(2) * known_BT).sum()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The mean distance on fixed dev crops, shared out over ranks; all ranks take part."""
        module, sums_2 = self.modules["decoder"], torch.zeros(2, dtype=torch.float64, device=self.ctx.device)
        module.eval()
        for row in self.crops[self.ctx.rank::self.ctx.world]:
            z_N, codes_TQ, _ = self.dev.crop(*row)
            batch = self._batch([(z_N, codes_TQ)], len(z_N), [rng.generator(self.ctx.seed, "drawn dev", *row)])
            batch = {name: x.to(self.ctx.device) for name, x in batch.items()}
            with autocast(self.ctx.device, self.shape.train.dtype):
                sums_2[0] += self._distance(module, batch).double()
            sums_2[1] += len(codes_TQ)
        module.train()
        distance, frames = all_sum(sums_2).tolist()
        return {"loss": distance / frames, "frames": frames}

    def export(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        decoder = self.modules["decoder"]
        weights = {name: x.detach().to("cpu", torch.float32, copy=True) for name, x in decoder.state_dict().items()}
        return weights, {"kind": decoder.kind, "codec": self.digest, **vars(decoder.sizes)}


def collate(crops: Sequence[tuple[np.ndarray, np.ndarray]], semantic_frames: int) -> dict[str, torch.Tensor]:
    """A batch of (z_N, codes_TQ), padded to a length."""
    rows, levels = len(crops), crops[0][1].shape[1]
    z_BN = torch.zeros(rows, semantic_frames, dtype=torch.int64)
    codes_BTQ = torch.zeros(rows, RATIO * semantic_frames, levels, dtype=torch.int64)
    known_BT = torch.zeros(rows, RATIO * semantic_frames, dtype=torch.bool)
    for b, (z_N, codes_TQ) in enumerate(crops):
        z_BN[b, :len(z_N)], codes_BTQ[b, :len(codes_TQ)] = torch.from_numpy(z_N), torch.from_numpy(codes_TQ)
        known_BT[b, :len(codes_TQ)] = True
    return {"z_BN": z_BN, "codes_BTQ": codes_BTQ, "known_BT": known_BT}


def hearing_objective(config: Mapping[str, Any], inputs: Mapping[str, str], ctx: Context) -> HearingObjective:
    """Factory. config: lm (DecoderConfig), rows (validation crops), and `start` where it starts from weights; inputs: paths
    of manifest, kmeans, codec, both token stores and, where codes are drawn, lm_coarse.

    Raises TokenError for stores that do not belong together, ValueError for another than a spectral codec.
    """
    shape, codec = config["lm"], load_codec(inputs["codec"])
    if not isinstance(getattr(codec, "model", None), SpectralCodec):
        raise ValueError(f"lm.decoder makes frames of the spectral codec, and this one is {codec.spec.name!r}: set "
                         "codec.family=spectral or lm.decoder=null")
    k = spec_of(inputs["semantic_tokens"])["vocab"]
    stage = Stage("decoder", k, codec.spec.vocab, (0, codec.spec.n_q), codec.spec.n_q, False, shape.crop_s)
    paths = [inputs[name] for name in ("manifest", "semantic_tokens", "acoustic_tokens")]
    train, dev = (TokenBatches(*paths, stage, split, shape.where, shape.train.batch, ctx.seed) for split in ("train", "dev"))
    centroid_KD = load_semantic(inputs["kmeans"]).centroids_KD.float().cpu()
    drawn = DrawnCodes(inputs["lm_coarse"], shape.drawn, ctx.device, shape.train.dtype) if shape.drawn else None
    return HearingObjective(shape, codec, centroid_KD, train, dev, config["rows"], ctx, config.get("start"), drawn)
