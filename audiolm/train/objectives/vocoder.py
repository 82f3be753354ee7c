"""Training of the semantic vocoder: reconstruction, and from disc.start_step on an adversary, as the codec (paper Table I).

Two modules under two engines, "generator" (the vocoder and the moving average of its weights) and "discriminator".  The
frozen tokenizer hears `heard_s` of audio, so that its tokens are about those of whole clips; `crop_s` of it are made.
How many levels an example's sound is made of is drawn, so that one model decodes any prefix.  The average is validated and
exported.  A batch: wav_BT (float32, whole 640-sample frames), lengths_B (true samples), levels_B, starts_B (frames).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from audiolm import rng
from audiolm.config.semantic import VocoderConfig
from audiolm.data.clips import read_clips
from audiolm.data.crops import AudioCrops
from audiolm.data.sources import roots
from audiolm.models.discriminators import Discriminators
from audiolm.models.losses import WINDOWS, multi_scale_mel
from audiolm.models.mel import log_mel
from audiolm.models.soundstream import fold
from audiolm.models.vocoder import SemanticVocoder
from audiolm.tokenizers.base import SAMPLE_RATE, SEMANTIC_HOP
from audiolm.tokenizers.residual import ResidualTokenizer, load_residual
from audiolm.tokenizers.vocoder import KIND
from audiolm.train.engine import all_sum
from audiolm.train.gan import EMA, EVAL_ROWS, compile_parts, discriminator_step, held_out_crops, reconstruction_metrics
from audiolm.train.objectives.base import Context, Engine


class VocoderGenerator(nn.Module):
    """The vocoder in training and its average; the forward pass is the vocoder's."""

    def __init__(self, net: SemanticVocoder):
        super().__init__()
        self.net = net
        self.ema = EMA(dict(net.named_parameters()))

    def forward(self, codes_BTQ: torch.Tensor, levels_B: torch.Tensor, starts_B: torch.Tensor, frames: int) -> torch.Tensor:
        return self.net(codes_BTQ, levels_B, starts_B, frames)


class VocoderObjective:
    unit = "audio s"

    def __init__(self, vocoder: VocoderConfig, tokenizer: ResidualTokenizer, crops: AudioCrops, held_out_BT: torch.Tensor,
                 ctx: Context, seed: int):
        self.vocoder, self.tokenizer, self.crops, self.ctx, self.seed = vocoder, tokenizer, crops, ctx, seed
        self.held_out_BT, self.frames = held_out_BT, _frames(vocoder.crop_s)
        self.generator = VocoderGenerator(_net(vocoder, tokenizer.spec.vocab))
        d = vocoder.disc
        judges = Discriminators("dac", d.periods, d.windows, d.channels)
        self.modules: dict[str, nn.Module] = {"generator": self.generator, "discriminator": judges}
        if ctx.compile:
            compile_parts(self.generator.net.decoder, *(judge.layers for judge in judges.each))

    def load(self, step: int, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        wav_BT, lengths_B = self.crops.batch(step, rows)
        levels, starts = [], []
        for row, length in zip(rows, lengths_B.tolist(), strict=True):
            draw = rng.generator(self.seed, "vocoder", step, row)
            levels.append(int(draw.integers(1, self.vocoder.levels + 1)))
            starts.append(int(draw.integers(max(0, -(-length // SEMANTIC_HOP) - self.frames) + 1)))
        return {"wav_BT": wav_BT, "lengths_B": lengths_B, "levels_B": torch.tensor(levels), "starts_B": torch.tensor(starts)}

    def train_step(self, engines: Mapping[str, Engine], batches: list[Any], step: int) -> dict[str, torch.Tensor]:
        """All ranks take part."""
        net, v = self.generator.net, self.vocoder
        game = step >= v.disc.start_step
        rows, sums, samples = sum(len(b["wav_BT"]) for b in batches), {}, torch.zeros((), device=self.ctx.device)
        for i, batch in enumerate(batches):
            heard_BT, lengths_B, levels_B, starts_B = (batch[k].to(self.ctx.device)
                                                       for k in ("wav_BT", "lengths_B", "levels_B", "starts_B"))
            real_BT = heard_BT.gather(1, starts_B[:, None] * SEMANTIC_HOP
                                      + torch.arange(self.frames * SEMANTIC_HOP, device=self.ctx.device))
            last, share = i == len(batches) - 1, len(heard_BT) / rows
            fake_BT = engines["generator"](self._codes(heard_BT), levels_B, starts_B, self.frames).float()
            terms = {"reconstruction": multi_scale_mel(fake_BT, real_BT)}
            if game:
                terms |= discriminator_step(engines["discriminator"], self.modules["discriminator"], real_BT, fake_BT, share, last, "dac",
                              v.train.dtype)
            loss = sum(getattr(v.weights, name) * term for name, term in terms.items() if name != "discriminator")
            engines["generator"].backward(loss * share, last)
            samples += (lengths_B - starts_B * SEMANTIC_HOP).clamp(max=real_BT.shape[1]).sum()
            for name, term in {"loss": loss, **terms}.items():
                sums[name] = sums.get(name, 0.0) + term.detach() * share
        if game:
            self.modules["discriminator"].requires_grad_(True)
            norm_d = engines["discriminator"].step()
        norm_g = engines["generator"].step()
        # an average that starts at the first step would remember the random start for long
        self.generator.ema.update(dict(net.named_parameters()), min(v.ema, (1 + step) / (10 + step)))
        means = all_sum(torch.stack([value.float() for value in sums.values()])) / self.ctx.world
        metrics = {**dict(zip(sums, means, strict=True)), "units": all_sum(samples) / SAMPLE_RATE}
        return metrics | {"grad_norm/generator": norm_g} | ({"grad_norm/discriminator": norm_d} if game else {})

    @torch.no_grad()
    def _codes(self, wav_BT: torch.Tensor) -> torch.Tensor:
        """codes_BTQ of all frames of wav_BT: the zeros behind a row's end are silence, and get codes all the same."""
        codes_BTQ, _ = self.tokenizer.codes(wav_BT, torch.full((len(wav_BT),), wav_BT.shape[1]))
        return codes_BTQ[..., :self.vocoder.levels]

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """On held-out crops: "mel", the mean L1 distance of log-mels (nats) with all levels, also "loss", "pesq" and
        "si_sdr_db"; with "/q00" the same with one level, where there are more."""
        model, found = self.averaged(), {}
        mine_BT = self.held_out_BT[self.ctx.rank::self.ctx.world]
        for levels in sorted({1, self.vocoder.levels}):
            mel_2, scores_22 = torch.zeros(2, device=self.ctx.device), torch.zeros(2, 2, device=self.ctx.device)
            for rows_BT in mine_BT.split(EVAL_ROWS) if len(mine_BT) else ():  # a rank beyond the crops has none
                wav_BT = rows_BT.to(self.ctx.device)
                fake_BT = model(self._codes(wav_BT)[..., :levels])
                mel = (log_mel(fake_BT) - log_mel(wav_BT)).abs().mean() * len(wav_BT)
                mel_2 += torch.stack([mel, torch.full_like(mel, len(wav_BT))])
                scores_22 += reconstruction_metrics(wav_BT, fake_BT).to(scores_22)
            mel_2, scores_22 = all_sum(mel_2), all_sum(scores_22)
            end = "" if levels == self.vocoder.levels else "/q00"
            found[f"mel{end}"] = float(mel_2[0] / mel_2[1])
            found |= {f"{name}{end}": float(total / n)
                      for name, (total, n) in zip(("pesq", "si_sdr_db"), scores_22, strict=True) if n}
        return {"loss": found["mel"], **found}

    def averaged(self) -> SemanticVocoder:
        """The vocoder with the averaged weights: folded, in eval mode, on this worker."""
        model = _net(self.vocoder, self.tokenizer.spec.vocab).to(self.ctx.device)
        model.load_state_dict(self.generator.ema.values())
        return fold(model).eval().requires_grad_(False)

    def export(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        v = self.vocoder
        return self.averaged().state_dict(), {
            "kind": KIND, "sample_rate": SAMPLE_RATE, "hop": SEMANTIC_HOP, "levels": v.levels, "dim": v.dim, "layers": v.layers,
            "channels": v.channels, "vocab": self.tokenizer.spec.vocab, "tokens": self.tokenizer.hash_of(v.levels)}


def _net(v: VocoderConfig, vocab: int) -> SemanticVocoder:
    return SemanticVocoder(v.levels, vocab, v.dim, v.layers, v.channels)


def _frames(seconds: float) -> int:
    return max(1, round(seconds * SAMPLE_RATE / SEMANTIC_HOP))


def vocoder_objective(config: Mapping[str, Any], inputs: Mapping[str, Any], ctx: Context) -> VocoderObjective:
    """config: vocoder, corpus, seed; inputs: {"manifest", "kmeans", and "residual" where levels > 1: path}. Raises ValueError
    for what cannot train."""
    vocoder, seed = config["vocoder"], config["seed"]
    longest, least = max(WINDOWS + vocoder.disc.windows), SEMANTIC_HOP / SAMPLE_RATE
    if _frames(vocoder.crop_s) * SEMANTIC_HOP <= longest // 2:
        raise ValueError(f"vocoder.crop_s {vocoder.crop_s}: spectral windows of {longest} samples need more than "
                         f"{longest // 2}; raise it to at least {(longest // 2 // SEMANTIC_HOP + 1) * least:g}")
    tokenizer = load_residual(inputs["kmeans"], inputs.get("residual"), str(ctx.device))
    if vocoder.levels > tokenizer.spec.n_q:
        raise ValueError(f"vocoder.levels {vocoder.levels} exceed the tokens' {tokenizer.spec.n_q}: lower it, or raise "
                         "residual.levels")
    clips = {split: read_clips(inputs["manifest"], split=split, where=vocoder.where) for split in ("train", "dev")}
    for split, found in clips.items():
        if not found:
            raise ValueError(f"no clip of split {split!r} is left for the vocoder (vocoder.where {vocoder.where.source}): "
                             "widen vocoder.where or look at corpus.dev and the sources' splits")
    places = roots(config["corpus"])
    heard = _frames(vocoder.heard_s) * SEMANTIC_HOP
    crops = AudioCrops(clips["train"], places, heard, vocoder.train.batch, seed, ctx.cache_mb)
    return VocoderObjective(vocoder, tokenizer, crops, held_out_crops(clips["dev"], places), ctx, seed)
