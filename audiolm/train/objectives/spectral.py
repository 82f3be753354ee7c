"""Training of the spectral codec on its frames: no waveform is made, so that a step is cheap.

One module, "generator": the codec and the moving average of its weights.  Before the first step its statistics, its
transform and its codebooks come from the frames of the first batches; codebooks then move once a step, on all ranks alike.
The average is validated and exported.
A batch: wav_BT (float32, crops of whole 640-sample frames), lengths_B (true samples), n_q_B (quantizer dropout).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from audiolm import rng
from audiolm.config.codec import CodecConfig
from audiolm.data.crops import AudioCrops
from audiolm.models.mel import HOP
from audiolm.models.spectral.codec import SpectralCodec, SpectralSizes
from audiolm.tokenizers.base import ACOUSTIC_HOP, SAMPLE_RATE
from audiolm.train.engine import all_sum
from audiolm.train.gan import Generator, quality_sums, rank_batches
from audiolm.train.objectives.base import Context, Engine, pinned
from audiolm.train.objectives.levels import draw_levels, first_frames, init_frames, level_scores, quantized_scores
from audiolm.train.objectives.start import load_start

LEAST_FRAMES = 4096  # for the statistics and the principal components


class SpectralObjective:
    unit = "audio s"

    def __init__(self, codec: CodecConfig, crops: AudioCrops, held_out_BT: torch.Tensor, ctx: Context,
                 start: Mapping[str, torch.Tensor] | None = None):
        """`start`: weights and codebooks of an export, all of which learn or, by codec.start.train, the decoder alone."""
        self.codec, self.crops, self.held_out_BT, self.ctx = codec, crops, held_out_BT, ctx
        net = spectral_codec(codec)
        if start:
            load_start(net, start, "codec")
        self.frozen = bool(start and codec.start and codec.start.train == "decoder")
        if self.frozen:  # encoder and codebooks stay, so that a clip keeps its tokens
            net.encoder.requires_grad_(False)
        # After loading, as the average of the weights begins with what they are now.
        self.generator = Generator(net)
        self.modules = {"generator": self.generator}
        self._initialised, self._reading = False, threading.Lock()

    def load(self, step: int, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """A batch; a row's gain and number of levels are drawn from (seed, step, row)."""
        wav_BT, lengths_B = self._crops(step, rows)
        c = self.codec
        n_q = [draw_levels(self.ctx.seed, step, row, c.n_q, c.quantizer_dropout) for row in rows]
        return {**pinned({"wav_BT": wav_BT, "n_q_B": torch.tensor(n_q)}, self.ctx.device), "lengths_B": lengths_B}

    def _crops(self, step: int, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        with self._reading:  # the loop reads ahead in a thread, also while the codebooks start
            wav_BT, lengths_B = self.crops.batch(step, rows)
        reach_db = self.codec.spectral.gain_db
        for wav_T, row in zip(wav_BT, rows, strict=True):
            wav_T *= 10 ** (float(rng.generator(self.ctx.seed, "gain", step, row).uniform(-reach_db, reach_db)) / 20)
        return wav_BT, lengths_B

    def train_step(self, engines: Mapping[str, Engine], batches: list[Any], step: int) -> dict[str, torch.Tensor]:
        """One update of codec, codebooks and averages; all ranks take part."""
        net, engine, weights, sums = self.generator.net, engines["generator"], self.codec.weights, {}
        if not self._initialised:  # asked once, as a flag on the device would be waited for at every step
            self._initialise()
        rows, latents, codes = sum(len(b["wav_BT"]) for b in batches), [], []
        for batch in batches:
            share = len(batch["wav_BT"]) / rows
            wav_BT, n_q_B = (batch[name].to(self.ctx.device, non_blocking=True) for name in ("wav_BT", "n_q_B"))
            with torch.no_grad():
                real_BTF = net.frames(wav_BT)
            out = engine(real_BTF, n_q_B)
            off_BTF = (out["frames_BTF"].float() - real_BTF) / net.scale
            terms = {"reconstruction": off_BTF.abs().mean() + self.codec.spectral.square * off_BTF.square().mean(),
                     "commitment": out["commitment"]}
            loss = sum(getattr(weights, name) * term for name, term in terms.items())
            engine.backward(loss * share)
            latents.append(out["x_BDT"].transpose(1, 2).flatten(0, 1).float())
            codes.append(out["codes_BTQ"].flatten(0, 1))
            for name, term in {"loss": loss, **terms}.items():
                sums[name] = sums.get(name, 0.0) + term.detach() * share
        norm = engine.step()
        means = all_sum(torch.stack([value.float() for value in sums.values()])) / self.ctx.world
        metrics = {**dict(zip(sums, means, strict=True)), "grad_norm/generator": norm}
        samples = sum(int(b["lengths_B"].sum()) for b in batches)  # lengths are on the CPU
        metrics["units"] = all_sum(torch.full((), float(samples), device=self.ctx.device)) / SAMPLE_RATE
        if not self.frozen:
            replaced_Q = net.quantizer.update(torch.cat(latents), torch.cat(codes), seed=self.ctx.seed, step=step,
                                              reduce=all_sum, rank=self.ctx.rank, world=self.ctx.world)
            metrics["codes_replaced"] = replaced_Q.sum()
            metrics |= {f"perplexity/q{q:02d}": p for q, p in enumerate(net.quantizer.perplexity())}
        self.generator.ema.update(dict(net.named_parameters()), self.codec.ema, step)
        return metrics

    @torch.no_grad()
    def _initialise(self) -> None:
        """Statistics, transform and codebooks from the frames of the first batches, unless a checkpoint or a start brought
        them; all ranks take part."""
        c, net, self._initialised = self.codec, self.generator.net, True
        if int(net.quantizer.initialised):
            return

        def frames(wav_BT: torch.Tensor) -> torch.Tensor:
            return net.frames(wav_BT).flatten(0, 1)

        least = max(init_frames(c.vocab), LEAST_FRAMES)
        x_MD = net.initialise(first_frames(frames, self._crops, c.train.batch, self.crops.crop, least, self.ctx))
        net.quantizer.initialise(x_MD, seed=self.ctx.seed, reduce=all_sum, rank=self.ctx.rank)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Scores the average on held-out crops; all ranks take part.

        "mel/qNN": mean L1 distance of frames with levels up to NN; "gain/qNN": the distance that level NN
        takes off; "mel" and "loss": with all levels; "mel/unquantized": without the quantizer.  "pesq": of the sound with
        all levels, "/q00" with one.  "used", "perplexity": of each level's codes.
        "alarm/levels_without_gain": number of levels that do not lower the distance.
        """
        model, codec, device = self.averaged(), self.codec, self.ctx.device
        mel_Q2 = torch.zeros(codec.n_q + 2, device=device)  # crops, each number of levels, not quantized
        hits_QN = torch.zeros(codec.n_q, codec.vocab, device=device)
        quality_222 = torch.zeros(2, 2, 2, device=device)
        for wav_BT in rank_batches(self.held_out_BT, self.ctx):
            real_BTF = model.frames(wav_BT)
            x_BDT = model.compress(real_BTF)
            codes_BTQ = model.quantizer.encode(x_BDT)
            hits_QN += F.one_hot(codes_BTQ, codec.vocab).sum((0, 1)).float()
            mel_Q2[0] += len(wav_BT)
            for q in range(1, codec.n_q + 2):
                latents_BDT = model.quantizer.decode(codes_BTQ[..., :q]) if q <= codec.n_q else x_BDT
                fake_BTF = model.expand(latents_BDT)
                mel_Q2[q] += (fake_BTF - real_BTF).abs().mean() * len(wav_BT)
                if q in (1, codec.n_q):
                    quality_222[int(q == codec.n_q)] += quality_sums(wav_BT, model.sound(fake_BTF)).to(device)
        mel_Q2, hits_QN, quality_222 = all_sum(mel_Q2), all_sum(hits_QN), all_sum(quality_222)
        mel = (mel_Q2[1:] / mel_Q2[0]).tolist()
        scores = {**level_scores(mel, hits_QN, quality_222), **quantized_scores(mel[:-1])}
        # Phases that are found are not the original's, so that no sample can be compared.
        return {name: value for name, value in scores.items() if not name.startswith("si_sdr_db")}

    def averaged(self) -> SpectralCodec:
        """The codec with the averaged weights and the present codebooks, on this worker."""
        return self.generator.averaged(spectral_codec(self.codec).to(self.ctx.device))

    def export(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        model = self.averaged()
        sizes = {name: getattr(model.sizes, name) for name in SpectralSizes.EXPORTED}
        return model.state_dict(), {"kind": model.kind, "sample_rate": SAMPLE_RATE, **sizes, "fsq": list(model.sizes.fsq)}


def _sizes(c: CodecConfig) -> SpectralSizes:
    s = c.spectral
    return SpectralSizes(c.n_q, c.vocab, s.n_mels, s.window, s.power, ACOUSTIC_HOP // HOP, c.dim, s.width, s.enc_layers,
                         s.dec_layers, c.quantizer, s.fsq, s.iterations, c.code_decay, c.dead_share)


def spectral_codec(codec: CodecConfig) -> SpectralCodec:
    """The untrained codec of a config."""
    return SpectralCodec(_sizes(codec))


def spectral_settings(codec: CodecConfig, about: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{config field: (its value, an export's)} of all that the weights depend on."""
    sizes, settings = _sizes(codec), {}
    for name in SpectralSizes.EXPORTED:
        if name in ("iterations", *(() if codec.quantizer == "fsq" else ("fsq", ))):
            continue  # no weight depends on it
        section = "codec" if name in type(codec).model_fields else "codec.spectral"
        ours, theirs = getattr(sizes, name), about.get(name)
        settings[f"{section}.{name}"] = (ours, tuple(theirs) if isinstance(theirs, list) else theirs)
    return settings
