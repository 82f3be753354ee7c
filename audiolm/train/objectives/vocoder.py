"""Training of the semantic vocoder: reconstruction, and from disc.start_step on discriminators (AudioLM, Table I).

Two modules under two engines, "generator" (the vocoder and the moving average of its weights) and "discriminator".  The
frozen tokenizer encodes `heard_s` of audio, so that its tokens are about those of whole clips; the vocoder makes `crop_s`
of it.  Each row's number of levels is drawn, so that one model decodes any prefix.  The average is validated and exported.
A batch: wav_BT (float32, whole 640-sample frames), lengths_B (true samples), levels_B, starts_B (frames).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from audiolm import rng
from audiolm.config.semantic import VocoderConfig
from audiolm.data.crops import AudioCrops
from audiolm.models.discriminators import Discriminators
from audiolm.models.losses import multi_scale_mel
from audiolm.models.mel import log_mel
from audiolm.models.vocoder import SemanticVocoder
from audiolm.tokenizers.base import SAMPLE_RATE, SEMANTIC_HOP
from audiolm.tokenizers.residual import ResidualTokenizer, load_residual
from audiolm.tokenizers.vocoder import KIND
from audiolm.train.engine import all_sum
from audiolm.train.gan import Gan, Generator, quality_means, quality_sums, rank_batches, training_audio
from audiolm.train.objectives.base import Context, Engine, pinned, whole_frames


class VocoderObjective:
    unit = "audio s"

    def __init__(self, vocoder: VocoderConfig, tokenizer: ResidualTokenizer, crops: AudioCrops, held_out_BT: torch.Tensor,
                 ctx: Context):
        self.vocoder, self.tokenizer, self.crops, self.ctx = vocoder, tokenizer, crops, ctx
        self.held_out_BT, self.frames = held_out_BT, whole_frames(vocoder.crop_s)
        self.generator = Generator(self._net())
        d = vocoder.disc
        discriminators = Discriminators("dac", d.periods, d.windows, d.channels)
        self.gan = Gan(vocoder, "dac", self.generator, discriminators, _distances, ctx)
        self.modules = self.gan.modules
        if ctx.compile:
            self.gan.compile(self.generator.net.decoder)

    def load(self, step: int, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """A batch; a row's levels and the start of its crop are drawn from (seed, step, row), in this order."""
        wav_BT, lengths_B = self.crops.batch(step, rows)
        levels, starts = [], []
        for row, length in zip(rows, lengths_B.tolist(), strict=True):
            draw = rng.generator(self.ctx.seed, "vocoder", step, row)
            levels.append(int(draw.integers(1, self.vocoder.levels + 1)))
            starts.append(int(draw.integers(max(0, -(-length // SEMANTIC_HOP) - self.frames) + 1)))
        batch = {"wav_BT": wav_BT, "levels_B": torch.tensor(levels), "starts_B": torch.tensor(starts)}
        return {**pinned(batch, self.ctx.device), "lengths_B": lengths_B}

    def train_step(self, engines: Mapping[str, Engine], batches: list[Any], step: int) -> dict[str, torch.Tensor]:
        """One update of vocoder, discriminators and average; all ranks take part."""
        device, crop = self.ctx.device, self.frames * SEMANTIC_HOP
        # Units count true audio, not the silence behind a short clip.
        samples = sum(int((b["lengths_B"] - b["starts_B"] * SEMANTIC_HOP).clamp(max=crop).sum()) for b in batches)
        # Small enough to be on the device at once: 8 MB for 32 rows of 4 s.
        batches = [{name: batch[name].to(device, non_blocking=True) for name in ("wav_BT", "levels_B", "starts_B")}
                   for batch in batches]

        def forward(batch: dict) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            # The row's crop of the audio is the target; the codes are those of all the audio around it.
            real_BT = batch["wav_BT"].gather(1, batch["starts_B"][:, None] * SEMANTIC_HOP + torch.arange(crop, device=device))
            codes_BTQ = self._codes(batch["wav_BT"])
            fake_BT = engines["generator"](codes_BTQ, batch["levels_B"], batch["starts_B"], self.frames).float()
            return real_BT, fake_BT, {}

        metrics = self.gan.train_step(engines, batches, step, forward)
        units = all_sum(torch.full((), float(samples), device=device)) / SAMPLE_RATE
        return {**metrics, "units": units, **self.gan.finish_step(step)}

    @torch.no_grad()
    def _codes(self, wav_BT: torch.Tensor) -> torch.Tensor:
        """codes_BTQ of all frames of wav_BT: the zeros behind a row's end are silence, and get codes all the same."""
        codes_BTQ, _ = self.tokenizer.codes(wav_BT, torch.full((len(wav_BT),), wav_BT.shape[1]))
        return codes_BTQ[..., :self.vocoder.levels]

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Scores the average on held-out crops; all ranks take part.

        "mel": mean L1 distance of log-mels (nats) with all levels, also as "loss"; "pesq" and "si_sdr_db"; with "/q00"
        the same with one level, where there are more.
        """
        model, scores, device = self.averaged(), {}, self.ctx.device
        for levels in sorted({1, self.vocoder.levels}):
            mel_2, quality_22 = torch.zeros(2, device=device), torch.zeros(2, 2, device=device)
            for wav_BT in rank_batches(self.held_out_BT, self.ctx):
                fake_BT = model(self._codes(wav_BT)[..., :levels])
                mel = (log_mel(fake_BT) - log_mel(wav_BT)).abs().mean() * len(wav_BT)
                mel_2 += torch.stack([mel, torch.full_like(mel, len(wav_BT))])
                quality_22 += quality_sums(wav_BT, fake_BT).to(device)
            mel_2, quality_22 = all_sum(mel_2), all_sum(quality_22)
            suffix = "" if levels == self.vocoder.levels else "/q00"
            scores |= {f"mel{suffix}": float(mel_2[0] / mel_2[1]), **quality_means(quality_22, suffix)}
        return {"loss": scores["mel"], **scores}

    def averaged(self) -> SemanticVocoder:
        """The vocoder with the averaged weights, on this worker."""
        return self.generator.averaged(self._net().to(self.ctx.device))

    def _net(self) -> SemanticVocoder:
        v = self.vocoder
        return SemanticVocoder(v.levels, self.tokenizer.spec.vocab, v.dim, v.layers, v.channels)

    def export(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        v = self.vocoder
        return self.averaged().state_dict(), {
            "kind": KIND, "sample_rate": SAMPLE_RATE, "hop": SEMANTIC_HOP, "levels": v.levels, "dim": v.dim, "layers": v.layers,
            "channels": v.channels, "vocab": self.tokenizer.spec.vocab, "tokens": self.tokenizer.hash_of(v.levels)}


def _distances(fake_BT: torch.Tensor, real_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"reconstruction": multi_scale_mel(fake_BT, real_BT)}


def vocoder_objective(config: Mapping[str, Any], inputs: Mapping[str, Any], ctx: Context) -> VocoderObjective:
    """Factory. config: vocoder, corpus; inputs: {"manifest", "kmeans", and "residual" where levels > 1: path}.

    Raises ValueError for configs that cannot train.
    """
    vocoder = config["vocoder"]
    tokenizer = load_residual(inputs["kmeans"], inputs.get("residual"), str(ctx.device))
    if vocoder.levels > tokenizer.spec.n_q:
        raise ValueError(f"vocoder.levels {vocoder.levels} exceed the tokens' {tokenizer.spec.n_q}: lower it, or raise "
                         "residual.levels")
    crops, held_out_BT = training_audio("vocoder", vocoder, vocoder.heard_s, config, inputs["manifest"], ctx)
    return VocoderObjective(vocoder, tokenizer, crops, held_out_BT, ctx)
