"""Training of the codec: reconstruction, commitment, and from disc.start_step on discriminators (SoundStream, 2107.03312).

Two modules under two engines: "generator" (SoundStream, the moving average of its weights, the balancer's norms) and
"discriminator".  Codebooks start by k-means on the latents of the first batches and move once a step, on all ranks alike.
The average is validated and exported.
A batch: wav_BT (float32, crops of whole 640-sample frames), lengths_B (true samples), n_q_B (quantizer dropout).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from audiolm.config.codec import CodecConfig
from audiolm.data.crops import AudioCrops
from audiolm.models.discriminators import Discriminators
from audiolm.models.losses import multi_scale_mel, multi_scale_spectral, waveform_distance
from audiolm.models.mel import log_mel
from audiolm.models.soundstream import SoundStream, SoundStreamSizes
from audiolm.tokenizers.base import ACOUSTIC_HOP, SAMPLE_RATE
from audiolm.tokenizers.start import StartWeights, require_same
from audiolm.train.engine import all_sum
from audiolm.train.gan import Gan, Generator, LossBalancer, quality_sums, rank_batches, training_audio
from audiolm.train.objectives.base import Context, Engine, pinned
from audiolm.train.objectives.levels import draw_levels, first_frames, init_frames, level_scores, quantized_scores
from audiolm.train.objectives.spectral import SpectralObjective, spectral_settings
from audiolm.train.objectives.start import load_start, read_start

# Of codec: what an export's weights depend on, and its config.json says.
SIZES = ("strides", "enc_channels", "dec_channels", "dim", "n_q", "vocab", "quantizer", "code_dim")
FROZEN = ("encoder.", "quantizer.")  # with codec.start.train decoder: what gives the tokens


class CodecObjective:
    unit = "audio s"

    def __init__(self, codec: CodecConfig, crops: AudioCrops, held_out_BT: torch.Tensor, ctx: Context,
                 start: Mapping[str, torch.Tensor] | None = None):
        """`start`: weights and codebooks of an export, all of which learn or, by codec.start.train, the decoder alone."""
        self.codec, self.crops, self.held_out_BT, self.ctx = codec, crops, held_out_BT, ctx
        net, self._frozen = _soundstream(codec), {}
        self._quantize_from = 0 if start else codec.quantize_from  # such codebooks need no latents that learned before
        if start:
            load_start(net, start, "codec")
        if start and codec.start and codec.start.train == "decoder":
            self._frozen = {name: value for name, value in start.items() if name.startswith(FROZEN)}
            for part in (net.encoder, net.quantizer):
                part.requires_grad_(False)
        # After loading, as the average of the weights begins with what they are now.
        self.generator = Generator(net, LossBalancer(), codec.balance)
        d = codec.disc
        discriminators = Discriminators(codec.losses, d.periods, d.windows, d.channels, d.stft_window)
        self.gan = Gan(codec, codec.losses, self.generator, discriminators, self._distances, ctx)
        self.modules = self.gan.modules
        if ctx.compile:
            self.gan.compile(self.generator.net.encoder, self.generator.net.decoder)
        self._initialised, self._reading = False, threading.Lock()

    def load(self, step: int, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """A batch; a row's number of levels is drawn from (seed, step, row), see `draw_levels`."""
        wav_BT, lengths_B = self._crops(step, rows)
        n_q = [draw_levels(self.ctx.seed, step, row, self.codec.n_q, self.codec.quantizer_dropout) for row in rows]
        return {**pinned({"wav_BT": wav_BT, "n_q_B": torch.tensor(n_q)}, self.ctx.device), "lengths_B": lengths_B}

    def _crops(self, step: int, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        with self._reading:  # the loop reads ahead in a thread, also while the codebooks start
            return self.crops.batch(step, rows)

    def train_step(self, engines: Mapping[str, Engine], batches: list[Any], step: int) -> dict[str, torch.Tensor]:
        """One update of codec, discriminators, codebooks and averages; all ranks take part."""
        quantize, latents, codes = step >= self._quantize_from, [], []
        if quantize and not self._initialised:
            self._initialise_codebooks()

        def forward(batch: dict) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            wav_BT, n_q_B = (batch[name].to(self.ctx.device, non_blocking=True) for name in ("wav_BT", "n_q_B"))
            out = engines["generator"](wav_BT, n_q_B, quantize)
            if not quantize:
                return wav_BT, out["wav_BT"].float(), {}
            latents.append(out["x_BDT"].transpose(1, 2).flatten(0, 1))
            codes.append(out["codes_BTQ"].flatten(0, 1))
            return wav_BT, out["wav_BT"].float(), {name: out[name] for name in ("commitment", "codebook")}

        metrics = self.gan.train_step(engines, batches, step, forward)
        samples = sum(int(b["lengths_B"].sum()) for b in batches)  # lengths are on the CPU
        metrics["units"] = all_sum(torch.full((), float(samples), device=self.ctx.device)) / SAMPLE_RATE
        if quantize and not self._frozen:
            # Codebooks move before the average takes in the weights, as factorised codes are weights too.
            quantizer = self.generator.net.quantizer
            replaced_Q = quantizer.update(torch.cat(latents), torch.cat(codes), seed=self.ctx.seed, step=step,
                                          reduce=all_sum, rank=self.ctx.rank, world=self.ctx.world)
            metrics["codes_replaced"] = replaced_Q.sum()
            metrics |= {f"perplexity/q{q:02d}": p for q, p in enumerate(quantizer.perplexity())}
        return metrics | self.gan.finish_step(step)

    def _distances(self, fake_BT: torch.Tensor, real_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        measure = multi_scale_mel if self.codec.losses == "dac" else multi_scale_spectral
        losses = {"reconstruction": measure(fake_BT, real_BT)}
        if self.codec.weights.waveform:
            losses["waveform"] = waveform_distance(fake_BT, real_BT)
        return losses

    @torch.no_grad()
    def _initialise_codebooks(self) -> None:
        """Runs k-means on the latents of the first batches, unless a checkpoint brought codebooks; all ranks take part."""
        net, self._initialised = self.generator.net, True
        if int(net.quantizer.initialised):
            return

        def latents(wav_BT: torch.Tensor) -> torch.Tensor:
            return net.latents(wav_BT).transpose(1, 2).flatten(0, 1)

        c = self.codec
        x_MD = first_frames(latents, self._crops, c.train.batch, self.crops.crop, init_frames(c.vocab), self.ctx)
        net.quantizer.initialise(x_MD, seed=self.ctx.seed, reduce=all_sum, rank=self.ctx.rank)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Scores the average on held-out crops; all ranks take part.

        "mel/qNN": mean L1 distance of log-mels (nats) with levels up to NN; "gain/qNN": the distance that level NN
        takes off; "mel": with all levels, and as "loss" once quantized; "mel/unquantized": without the quantizer.
        "pesq" and "si_sdr_db": with all levels, "/q00" with one.  "used", "perplexity": of each level's codes.
        "alarm/levels_without_gain": number of levels that do not lower the distance.
        """
        started = bool(self.generator.net.quantizer.initialised)
        mel, hits_QN, quality_222 = self._score_levels(started)
        scores = level_scores(mel, hits_QN, quality_222)
        # Without codes it is no codec yet, and must not become the best one.
        return scores | (quantized_scores(mel[:-1]) if started else {})

    def _score_levels(self, started: bool) -> tuple[list[float], torch.Tensor, torch.Tensor]:
        """Over all ranks' crops: mel distances (n_q, then unquantized), hits_QN of the codes, and the sums of PESQ and
        SI-SDR (one level or all, score, sum and number)."""
        model, codec, device = self.averaged(), self.codec, self.ctx.device
        mel_Q2 = torch.zeros(codec.n_q + 2, device=device)  # crops, each number of levels, not quantized
        hits_QN = torch.zeros(codec.n_q, codec.vocab, device=device)
        quality_222 = torch.zeros(2, 2, 2, device=device)
        for wav_BT in rank_batches(self.held_out_BT, self.ctx):
            real_BTF, x_BDT = log_mel(wav_BT), model.latents(wav_BT)
            codes_BTQ = model.quantizer.encode(x_BDT)
            # Counts of every code, to see levels that use few.
            hits_QN += F.one_hot(codes_BTQ, codec.vocab).sum((0, 1)).float()
            mel_Q2[0] += len(wav_BT)
            for q in range(1, codec.n_q + 2):  # before codec.quantize_from there are no codes: the latents as they are
                fake_BT = model.decode(codes_BTQ[..., :q]) if started and q <= codec.n_q else model.synthesize(x_BDT)
                mel_Q2[q] += (log_mel(fake_BT) - real_BTF).abs().mean() * len(wav_BT)
                if q in (1, codec.n_q):
                    quality_222[int(q == codec.n_q)] += quality_sums(wav_BT, fake_BT).to(device)
        mel_Q2, hits_QN, quality_222 = all_sum(mel_Q2), all_sum(hits_QN), all_sum(quality_222)
        return (mel_Q2[1:] / mel_Q2[0]).tolist(), hits_QN, quality_222

    def averaged(self) -> SoundStream:
        """The codec with the averaged weights and the present codebooks, on this worker."""
        model = self.generator.averaged(_soundstream(self.codec).to(self.ctx.device))
        # Folding weight norm rounds, on a GPU in another way than on the CPU: frozen parts must keep every bit.
        model.load_state_dict(self._frozen, strict=False)
        return model

    def export(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return self.averaged().state_dict(), {"kind": "soundstream", "sample_rate": SAMPLE_RATE, **_sizes(self.codec)}


def _sizes(codec: CodecConfig) -> dict[str, Any]:
    return {**codec.model_dump(include=set(SIZES)), "strides": list(codec.strides)}


def _soundstream(c: CodecConfig) -> SoundStream:
    return SoundStream(SoundStreamSizes(c.strides, c.enc_channels, c.dec_channels, c.dim, c.n_q, c.vocab, c.code_decay,
                                        c.dead_share, c.quantizer, c.code_dim))


def codec_objective(config: Mapping[str, Any], inputs: Mapping[str, Any],
                    ctx: Context) -> CodecObjective | SpectralObjective:
    """Factory. config: codec, corpus, and `start` where it starts from an export's weights; inputs: {"manifest": path}.

    Raises ValueError for configs that cannot train, and weights of other sizes.
    """
    codec, hop, start = config["codec"], math.prod(config["codec"].strides), config.get("start")
    if hop != ACOUSTIC_HOP:
        raise ValueError(f"codec.strides {codec.strides} make a hop of {hop} samples; their product must be {ACOUSTIC_HOP} "
                         f"(50 Hz at {SAMPLE_RATE} Hz)")
    crops, held_out_BT = training_audio("codec", codec, codec.crop_s, config, inputs["manifest"], ctx)
    kind = SpectralObjective if codec.family == "spectral" else CodecObjective
    return kind(codec, crops, held_out_BT, ctx, codec_start(codec, start) if start else None)


def codec_start(codec: CodecConfig, start: StartWeights) -> dict[str, torch.Tensor]:
    """The weights to start from. Raises ValueError where they are of a codec of another family or of other sizes."""
    weights, about = read_start(start)
    require_same(start, {"codec.family": (codec.family, about["kind"])})
    if codec.family == "spectral":
        require_same(start, spectral_settings(codec, about))
        return weights
    ours = _sizes(codec)
    if codec.quantizer == "ema":
        del ours["code_dim"]  # of factorised codes only
    require_same(start, {f"codec.{name}": (value, about.get(name)) for name, value in ours.items()})
    return weights
