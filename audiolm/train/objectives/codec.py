"""Training of the codec: reconstruction, a commitment, and from disc.start_step on an adversary (PAPER 1.3 to 1.5).

Two modules under two engines: "generator" (SoundStream, and the moving average of its weights as fp32 buffers, so that
every checkpoint carries it) and "discriminator".  Codebooks start by k-means on the latents of the first batches (at
least 32 frames a code) and move once a step, on all ranks alike.  What is validated and exported is the average.
A batch: wav_BT (float32, crops of whole 640-sample frames), lengths_B (true samples), n_q_B (quantizer dropout).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from audiolm import rng
from audiolm.config import codec as codec_config
from audiolm.data.clips import read_clips
from audiolm.data.crops import AudioCrops
from audiolm.data.sources import roots
from audiolm.models.discriminators import Discriminators
from audiolm.models.entropy import perplexity
from audiolm.models.losses import WINDOWS, multi_scale_mel, multi_scale_spectral, waveform_distance
from audiolm.models.mel import log_mel
from audiolm.models.soundstream import SoundStream, SoundStreamSizes, fold
from audiolm.tokenizers.base import ACOUSTIC_HOP, SAMPLE_RATE, SEMANTIC_HOP
from audiolm.train.engine import all_sum
from audiolm.train.gan import (
    EMA,
    EVAL_ROWS,
    LossBalancer,
    compile_parts,
    discriminator_step,
    held_out_crops,
    reconstruction_metrics,
)
from audiolm.train.objectives.base import Context, Engine

INIT_FRAMES = 32  # frames a code for the k-means start


class CodecGenerator(nn.Module):
    """The codec in training and its average; the forward pass is the codec's."""

    def __init__(self, net: SoundStream):
        super().__init__()
        self.net = net
        self.ema = EMA(dict(net.named_parameters()))
        self.balance = LossBalancer()

    def forward(self, wav_BT: torch.Tensor, n_q_B: torch.Tensor | None = None,
                quantize: bool = True) -> dict[str, torch.Tensor]:
        return self.net(wav_BT, n_q_B, quantize)


class CodecObjective:
    unit = "audio s"

    def __init__(self, codec: codec_config.CodecConfig, crops: AudioCrops, held_out_BT: torch.Tensor, ctx: Context, seed: int):
        self.codec, self.crops, self.held_out_BT, self.ctx, self.seed = codec, crops, held_out_BT, ctx, seed
        self.generator = CodecGenerator(_soundstream(codec))
        d = codec.disc
        judges = Discriminators(codec.losses, d.periods, d.windows, d.channels, d.stft_window)
        self.modules: dict[str, nn.Module] = {"generator": self.generator, "discriminator": judges}
        if ctx.compile:
            net = self.generator.net
            compile_parts(net.encoder, net.decoder, *(judge.layers for judge in judges.each))
        self._ready, self._reading = False, threading.Lock()

    def load(self, step: int, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        wav_BT, lengths_B = self._crops(step, rows)
        n_q = [int(rng.generator(self.seed, "n_q", step, row).integers(1, self.codec.n_q + 1)) for row in rows]
        batch = {"wav_BT": wav_BT, "n_q_B": torch.tensor(n_q)}
        if self.ctx.device.type == "cuda":  # what is pinned is copied without waiting for the GPU's queue
            batch = {name: x.pin_memory() for name, x in batch.items()}
        return {**batch, "lengths_B": lengths_B}

    def _crops(self, step: int, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        with self._reading:  # the loop reads ahead in a thread, also while the codebooks start
            return self.crops.batch(step, rows)

    def train_step(self, engines: Mapping[str, Engine], batches: list[Any], step: int) -> dict[str, torch.Tensor]:
        """All ranks take part. From disc.start_step on both sides learn from the same discriminator weights."""
        net, codec = self.generator.net, self.codec
        quantize, game = step >= codec.quantize_from, step >= codec.disc.start_step
        if quantize and not self._ready:
            self._initialise()
        rows, sums, latents, codes = sum(len(b["wav_BT"]) for b in batches), {}, [], []
        for i, batch in enumerate(batches):
            wav_BT, n_q_B = (batch[name].to(self.ctx.device, non_blocking=True) for name in ("wav_BT", "n_q_B"))
            last = i == len(batches) - 1
            share = len(wav_BT) / rows
            out = engines["generator"](wav_BT, n_q_B, quantize)
            fake_BT = made_BT = out["wav_BT"].float()
            if codec.balance:  # the losses' own gradients end at the waveform
                fake_BT = made_BT.detach().requires_grad_()
            terms = {"reconstruction": self._reconstruction(fake_BT, wav_BT)}
            if codec.weights.waveform:
                terms["waveform"] = waveform_distance(fake_BT, wav_BT)
            if quantize:
                terms |= {"commitment": out["commitment"], "codebook": out["codebook"]}
                latents.append(out["x_BDT"].transpose(1, 2).flatten(0, 1))
                codes.append(out["codes_BTQ"].flatten(0, 1))
            if game:
                terms |= discriminator_step(engines["discriminator"], self.modules["discriminator"], wav_BT, fake_BT, share, last,
                              codec.losses, codec.train.dtype)
            loss = sum(getattr(codec.weights, name) * term for name, term in terms.items() if name != "discriminator")
            target = self.generator.balance.target(made_BT, fake_BT, terms, codec.weights, share) if codec.balance else loss
            engines["generator"].backward(target * share, last)
            for name, term in {"loss": loss, **terms}.items():
                sums[name] = sums.get(name, 0.0) + term.detach() * share
        if game:
            self.modules["discriminator"].requires_grad_(True)
            norm_d = engines["discriminator"].step()
        norm_g = engines["generator"].step()
        if quantize:
            replaced_Q = net.quantizer.update(torch.cat(latents), torch.cat(codes), seed=self.seed, step=step,
                                              reduce=all_sum, rank=self.ctx.rank, world=self.ctx.world)
        norms = self.generator.balance.update(all_sum, self.ctx.world) if codec.balance else {}
        # an average that starts at the first step would remember the random start for long
        self.generator.ema.update(dict(net.named_parameters()), min(codec.ema, (1 + step) / (10 + step)))

        means = all_sum(torch.stack([v.float() for v in sums.values()])) / self.ctx.world
        metrics = dict(zip(sums, means, strict=True))
        metrics["units"] = all_sum(sum(b["lengths_B"].sum() for b in batches).to(means, non_blocking=True)) / SAMPLE_RATE
        metrics["grad_norm/generator"] = norm_g
        if game:
            metrics["grad_norm/discriminator"] = norm_d
        if quantize:
            metrics["codes_replaced"] = replaced_Q.sum()
            metrics |= {f"perplexity/q{q:02d}": p for q, p in enumerate(net.quantizer.perplexity())}
        return metrics | {f"gradient/{name}": norm for name, norm in norms.items()}

    def _reconstruction(self, fake_BT, wav_BT) -> torch.Tensor:
        measure = multi_scale_mel if self.codec.losses == "dac" else multi_scale_spectral
        return measure(fake_BT, wav_BT)

    @torch.no_grad()
    def _initialise(self) -> None:
        """k-means on what the first batches hold. A rank encodes whole batches, so the world size changes no bit."""
        net, self._ready = self.generator.net, True
        if int(net.quantizer.initialised):
            return
        batch = self.codec.train.batch
        frames = batch * self.crops.crop // ACOUSTIC_HOP
        steps = math.ceil(INIT_FRAMES * self.codec.vocab / frames)
        slots_SMD = torch.zeros(steps, frames, self.codec.dim, device=self.ctx.device)
        for step in range(self.ctx.rank, steps, self.ctx.world):
            wav_BT, _ = self._crops(step, range(batch))
            slots_SMD[step] = net.latents(wav_BT.to(self.ctx.device)).transpose(1, 2).flatten(0, 1)
        net.quantizer.initialise(all_sum(slots_SMD).flatten(0, 1), seed=self.seed, reduce=all_sum, rank=self.ctx.rank)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """On held-out crops: "mel/qNN", the mean L1 distance of log-mels (nats) with levels up to NN, "gain/qNN" what
        level NN takes off, "mel" with all, and once quantized that as "loss", "mel/unquantized" without the quantizer;
        "pesq" and "si_sdr_db" with all levels, "/q00" with one; "used" and "perplexity" of each level's codes;
        "alarm/levels_without_gain" counts the levels that do not lower the distance."""
        model, codec = self.averaged(), self.codec
        started = bool(model.quantizer.initialised)
        mine_BT = self.held_out_BT[self.ctx.rank::self.ctx.world]
        mel_Q2 = torch.zeros(codec.n_q + 2, device=self.ctx.device)  # crops, each number of levels, not quantized
        hits_QN = torch.zeros(codec.n_q, codec.vocab, device=self.ctx.device)
        scores_222 = torch.zeros(2, 2, 2, device=self.ctx.device)  # one level, all; PESQ, SI-SDR; sum, number
        for rows_BT in mine_BT.split(EVAL_ROWS) if len(mine_BT) else ():  # a rank beyond the crops has none
            wav_BT = rows_BT.to(self.ctx.device)
            real_BTF, x_BDT = log_mel(wav_BT), model.latents(wav_BT)
            codes_BTQ = model.quantizer.encode(x_BDT)
            hits_QN += F.one_hot(codes_BTQ, codec.vocab).sum((0, 1)).float()
            mel_Q2[0] += len(wav_BT)
            for q in range(1, codec.n_q + 2):  # before codec.quantize_from there are no codes: the latents as they are
                fake_BT = model.decode(codes_BTQ[..., :q]) if started and q <= codec.n_q else model.synthesize(x_BDT)
                mel_Q2[q] += (log_mel(fake_BT) - real_BTF).abs().mean() * len(wav_BT)
                if q in (1, codec.n_q):
                    scores_222[int(q == codec.n_q)] += reconstruction_metrics(wav_BT, fake_BT).to(scores_222)
        scores_222 = all_sum(scores_222)
        mel_Q2, hits_QN = all_sum(mel_Q2), all_sum(hits_QN)
        *mel, unquantized = (mel_Q2[1:] / mel_Q2[0]).tolist()
        perplexities = perplexity(hits_QN).tolist()
        figures = {"mel": mel[-1], "mel/unquantized": unquantized}
        names = ("pesq/q00", "si_sdr_db/q00", "pesq", "si_sdr_db")
        figures |= {name: float(total / n) for name, (total, n) in zip(names, scores_222.flatten(0, 1), strict=True) if n}
        for q in range(codec.n_q):
            figures |= {f"mel/q{q:02d}": mel[q], f"perplexity/q{q:02d}": perplexities[q],
                        f"used/q{q:02d}": float((hits_QN[q] > 0).float().mean())}
            if q:
                figures[f"gain/q{q:02d}"] = mel[q - 1] - mel[q]
        if started:  # what is not quantized yet is no codec, and must not become the best one
            figures["loss"] = mel[-1]
            figures["alarm/levels_without_gain"] = float(sum(b >= a for a, b in zip(mel, mel[1:], strict=False)))
        return figures

    def averaged(self) -> SoundStream:
        """The codec with the averaged weights and the present codebooks: folded, in eval mode, on this worker."""
        model = _soundstream(self.codec).to(self.ctx.device)
        model.load_state_dict({**self.generator.net.state_dict(), **self.generator.ema.values()})
        return fold(model).eval().requires_grad_(False)

    def export(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        c = self.codec
        return self.averaged().state_dict(), {
            "kind": "soundstream", "sample_rate": SAMPLE_RATE, "strides": list(c.strides),
            "enc_channels": c.enc_channels, "dec_channels": c.dec_channels, "dim": c.dim, "n_q": c.n_q,
            "vocab": c.vocab, "quantizer": c.quantizer, "code_dim": c.code_dim}


def _soundstream(c: codec_config.CodecConfig) -> SoundStream:
    return SoundStream(SoundStreamSizes(c.strides, c.enc_channels, c.dec_channels, c.dim, c.n_q, c.vocab, c.code_decay,
                                        c.dead_share, c.quantizer, c.code_dim))


def codec_objective(config: Mapping[str, Any], inputs: Mapping[str, Any], ctx: Context) -> CodecObjective:
    """config: codec, corpus, seed; inputs: {"manifest": path}. Raises ValueError for what cannot train."""
    codec, corpus, seed = config["codec"], config["corpus"], config["seed"]
    if math.prod(codec.strides) != ACOUSTIC_HOP:
        raise ValueError(f"codec.strides {codec.strides} make a hop of {math.prod(codec.strides)} samples; their "
                         f"product must be {ACOUSTIC_HOP} (50 Hz at {SAMPLE_RATE} Hz)")
    crop = round(codec.crop_s * SAMPLE_RATE / SEMANTIC_HOP) * SEMANTIC_HOP
    longest = max(WINDOWS + codec.disc.windows)
    if crop <= longest // 2:
        least_s = (longest // 2 // SEMANTIC_HOP + 1) * SEMANTIC_HOP / SAMPLE_RATE
        raise ValueError(f"codec.crop_s {codec.crop_s} is {crop} samples; spectral windows of {longest} need more than "
                         f"{longest // 2}: raise it to at least {least_s}")
    clips = {split: read_clips(inputs["manifest"], split=split, where=codec.where) for split in ("train", "dev")}
    for split, found in clips.items():
        if not found:
            raise ValueError(f"no clip of split {split!r} is left for the codec (codec.where {codec.where.source}): "
                             "widen codec.where or look at corpus.dev and the sources' splits")
    places = roots(corpus)
    crops = AudioCrops(clips["train"], places, crop, codec.train.batch, seed, ctx.cache_mb)
    return CodecObjective(codec, crops, held_out_crops(clips["dev"], places), ctx, seed)
