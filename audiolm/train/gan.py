"""Adversarial training of a waveform decoder: the part that codec and semantic vocoder share.

A generator learns to reconstruct audio and, from `start_step` on, to deceive discriminators that learn beside it
(SoundStream, 2107.03312 III-D; DAC, 2306.06546).  Each side is a module under an engine of its own.  What is validated
and exported is the moving average of the generator's weights.
Shapes: real_BT, fake_BT (the generator's), wav_BT: float32 at 16 kHz.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch._functorch.config
from torch import nn

from audiolm.config.codec import CodecConfig, CodecLossWeights
from audiolm.config.semantic import VocoderConfig
from audiolm.data.clip_table import ClipTable, read_clip_table
from audiolm.data.clips import read_clip
from audiolm.data.crops import AudioCrops
from audiolm.data.sources import roots
from audiolm.eval.metrics.audio_quality import pesq_wb, si_sdr_db
from audiolm.models.discriminators import Discriminators
from audiolm.models.losses import WINDOWS, adversarial_loss, discriminator_loss, feature_loss
from audiolm.models.soundstream import fold
from audiolm.tokenizers.base import SAMPLE_RATE, SEMANTIC_HOP
from audiolm.train.engine import all_sum
from audiolm.train.objectives.base import Context, Engine, autocast, whole_frames

EVAL_CROPS, EVAL_SAMPLES = 16, 48 * SEMANTIC_HOP  # 1.92 s each: PESQ, the slowest score, takes seconds for all of them
EVAL_ROWS = 4  # crops a forward pass
TERMS = ("reconstruction", "waveform", "feature", "adversarial")  # losses whose gradients pass through the waveform
NORM_DECAY = 0.999  # of the balancer's running norms, a step (EnCodec, 2210.13438, 3.4)
# Steps from one measurement of the norms to the next.  It costs a backward pass a term, of which feature and adversarial go
# through the discriminators; eight steps are little beside the thousand that NORM_DECAY remembers.
NORM_EVERY = 8

Losses = dict[str, torch.Tensor]


class EMA(nn.Module):
    """Moving average of named parameters, in fp32 buffers ("." in a name becomes "/").

    Discriminators keep moving the generator's target, so its weights wander; their average sounds better than any
    single step.  Buffers travel in the generator's checkpoints.
    """

    def __init__(self, named: Mapping[str, torch.Tensor]):
        super().__init__()
        for name, value in named.items():
            self.register_buffer(name.replace(".", "/"), value.detach().float().clone())

    @torch.no_grad()
    def update(self, named: Mapping[str, torch.Tensor], decay: float, step: int) -> None:
        """Takes in the weights after a step, counted from 0."""
        # TensorFlow's rule for the first steps: a constant decay would remember the random start for long.
        decay = min(decay, (1 + step) / (10 + step))
        averages = [self._buffers[name.replace(".", "/")] for name in named]
        torch._foreach_lerp_(averages, [p.float() for p in named.values()], 1 - decay)

    def values(self) -> dict[str, torch.Tensor]:
        return {name.replace("/", "."): value for name, value in self.named_buffers()}


class LossBalancer(nn.Module):
    """Scales each loss by the running norm of its own gradient at the waveform (EnCodec, 2210.13438, 3.4).

    A weight is then a share of the gradient, whatever the loss's scale.  Norms are measured every NORM_EVERY steps, and
    at any step with a term that has none yet.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(len(TERMS)))  # decayed sum of norms, and of ones
        self.register_buffer("count", torch.zeros(len(TERMS)))
        self._known: set[str] | None = None  # terms that have a norm; None: not read from the buffers yet
        self._terms: set[str] = set()  # this step's terms
        self._seen: dict[str, torch.Tensor] = {}  # this step's norms so far; empty where none are measured
        self.register_load_state_dict_post_hook(LossBalancer._forget)

    def _forget(self, _) -> None:
        self._known = None

    def norms(self) -> Losses:
        """The running norm of each term's gradient, 0 before its first."""
        return dict(zip(TERMS, self.total / self.count.clamp_min(1e-12), strict=True))

    def target(self, made_BT: torch.Tensor, fake_BT: torch.Tensor, terms: Losses, weights: CodecLossWeights,
               share: float, step: int) -> torch.Tensor:
        """A scalar whose gradient is the balanced one.

        made_BT is the generator's waveform, fake_BT its detached twin that the terms were computed from.  `share` of
        the step's rows are in this micro-batch.
        """
        running, balanced = self.norms(), [name for name in TERMS if name in terms]
        self._terms.update(balanced)
        whole = sum(getattr(weights, name) for name in balanced)
        shares = {name: getattr(weights, name) / whole for name in balanced}
        if self._known is None:  # once, as reading the buffers waits for a GPU; a checkpoint may have brought norms
            self._known = {name for name, count in zip(TERMS, self.count.tolist(), strict=True) if count}
        # The step and the terms decide, which are the same on all ranks and after a resume.
        if step % NORM_EVERY == 0 or not self._known.issuperset(balanced):
            gradient_BT = self._measured(fake_BT, terms, shares, running, share)
        else:  # known scales: the gradient of the weighted sum is the weighted sum of the gradients, in one pass
            # A term whose gradient was 0 when it was measured waits for the next measurement: it has no scale yet.
            total = sum(torch.where(running[name] > 0, shares[name] / running[name].clamp_min(1e-12), 0.0) * terms[name]
                        for name in balanced)
            gradient_BT, = torch.autograd.grad(total, fake_BT)
        # losses inside the generator (commitment, codebook) keep their weights
        plain = sum((getattr(weights, name) * term for name, term in terms.items() if name not in (*TERMS, "discriminator")),
                    start=fake_BT.new_zeros(()))
        return (made_BT * gradient_BT).sum() + plain

    def _measured(self, fake_BT: torch.Tensor, terms: Losses, shares: dict[str, float], running: Losses,
                  share: float) -> torch.Tensor:
        """The balanced gradient at the waveform by a pass a term, whose norms are kept for `update`."""
        sum_BT = torch.zeros_like(fake_BT)
        for name in (name for name in terms if name in shares):
            gradient_BT, = torch.autograd.grad(terms[name], fake_BT, retain_graph=True)
            norm = gradient_BT.norm(dim=1).mean() * len(fake_BT)  # of a row's own gradient
            self._seen[name] = self._seen.get(name, 0.0) + norm * share
            # A loss's first step has no running norm yet: its own stands in.
            scale = torch.where(running[name] > 0, running[name], norm).clamp_min(1e-12)
            sum_BT += shares[name] / scale * gradient_BT
        return sum_BT

    @torch.no_grad()
    def update(self, reduce: Callable[[torch.Tensor], torch.Tensor], world: int) -> Losses:
        """Takes in the norms that a step measured; returns the running norms of its terms. All ranks take part."""
        if self._seen:
            decay = NORM_DECAY ** NORM_EVERY
            now = reduce(torch.stack(list(self._seen.values())).float()) / world
            for name, norm in zip(self._seen, now, strict=True):
                at = TERMS.index(name)
                self.total[at] = decay * self.total[at] + norm
                self.count[at] = decay * self.count[at] + 1
            self._known |= self._seen.keys()
        norms = {name: norm for name, norm in self.norms().items() if name in self._terms}
        self._seen.clear()
        self._terms.clear()
        return norms


class Generator(nn.Module):
    """A decoder in training, the average of its weights, and a balancer's norms; the forward pass is the decoder's."""

    def __init__(self, net: nn.Module, balance: LossBalancer | None = None, balanced: bool = False):
        """`balanced`: the balancer is in use; a codec's checkpoints hold its norms either way."""
        super().__init__()
        self.net = net
        self.ema = EMA(dict(net.named_parameters()))
        self.balance, self.balanced = balance, balanced

    def forward(self, *args) -> Any:
        return self.net(*args)

    def averaged(self, fresh: nn.Module) -> nn.Module:
        """A fresh net with the averaged weights and the present buffers: weight norm folded, in eval mode."""
        # The average has no codebooks that move by themselves: buffers are the present ones.
        fresh.load_state_dict({**self.net.state_dict(), **self.ema.values()})
        return fold(fresh).eval().requires_grad_(False)


class Gan:
    """Training steps of a generator and its discriminators.

    `kind` is "dac" or "soundstream", whose adversarial losses they play for; `distances(fake_BT, real_BT)` are the losses
    of reconstruction.
    """

    def __init__(self, cfg: CodecConfig | VocoderConfig, kind: str, generator: Generator, discriminators: Discriminators,
                 distances: Callable[..., Losses], ctx: Context):
        self.cfg, self.kind, self.distances, self.ctx = cfg, kind, distances, ctx
        self.generator, self.discriminators = generator, discriminators
        self.modules = {"generator": generator, "discriminator": discriminators}

    def compile(self, *parts: nn.Module) -> None:
        """Compiles parts of the generator and the discriminators' layers in place, so that parameters keep their names.

        STFTs stay out, as the compiler has no complex numbers.
        """
        torch._dynamo.config.recompile_limit = 64  # graphs of one class's forward: parts x sizes x learning or frozen
        torch._functorch.config.donated_buffer = False  # a balancer that measures goes through the discriminators twice
        for part in (*parts, *(d.layers for d in self.discriminators.each)):
            part.compile(dynamic=False)  # else the parts, being of one class, count as one part of many sizes

    def train_step(self, engines: Mapping[str, Engine], batches: list[dict], step: int,
                   forward: Callable[[dict], tuple[torch.Tensor, torch.Tensor, Losses]]) -> Losses:
        """Accumulates gradients over this rank's micro-batches, then updates each side once. All ranks take part.

        `forward(batch)` runs the generator: (real_BT, fake_BT, losses inside the generator).  Returns mean losses
        and gradient norms.  Call `finish_step` when nothing changes the generator's weights any more.
        """
        weights, adversarial = self.cfg.weights, step >= self.cfg.disc.start_step
        rows, sums = sum(len(b["wav_BT"]) for b in batches), {}
        for batch in batches:
            share = len(batch["wav_BT"]) / rows

            # Phase 1: the generator's forward pass and its distances.
            real_BT, made_BT, inner = forward(batch)
            # Under the balancer the losses' own gradients end at the waveform.
            fake_BT = made_BT.detach().requires_grad_() if self.generator.balanced else made_BT
            terms = {**self.distances(fake_BT, real_BT), **inner}

            # Phase 2: the discriminators' gradients, then their verdict on the generator.
            if adversarial:
                terms |= self._discriminate(engines["discriminator"], real_BT, fake_BT, share)

            # Phase 3: the generator's gradients.
            loss = sum(getattr(weights, name) * term for name, term in terms.items() if name != "discriminator")
            target = loss
            if self.generator.balanced:
                target = self.generator.balance.target(made_BT, fake_BT, terms, weights, share, step)
            engines["generator"].backward(target * share)
            for name, term in {"loss": loss, **terms}.items():
                sums[name] = sums.get(name, 0.0) + term.detach() * share

        # Phase 4, once a step: both updates come last, so that both sides learned from the same discriminators.
        norms = {}
        if adversarial:
            self.discriminators.requires_grad_(True)
            norms["grad_norm/discriminator"] = engines["discriminator"].step()
        norms["grad_norm/generator"] = engines["generator"].step()
        means = all_sum(torch.stack([value.float() for value in sums.values()])) / self.ctx.world
        return {**dict(zip(sums, means, strict=True)), **norms}

    def finish_step(self, step: int) -> Losses:
        """Moves the running averages, once a step; returns the gradient norms that were balanced. All ranks take part."""
        balance, net = self.generator.balance, self.generator.net
        norms = balance.update(all_sum, self.ctx.world) if self.generator.balanced else {}
        self.generator.ema.update(dict(net.named_parameters()), self.cfg.ema, step)
        return {f"gradient/{name}": norm for name, norm in norms.items()}

    def _discriminate(self, engine: Engine, real_BT: torch.Tensor, fake_BT: torch.Tensor,
                      share: float) -> Losses:
        """The discriminators' backward pass on detached fakes, then the losses by which they teach the generator.

        "adversarial" and "feature" reach fake_BT; "discriminator" is detached.
        """
        module, kind = self.discriminators, self.kind
        module.requires_grad_(True)
        outputs = engine(torch.cat([real_BT, fake_BT.detach()]))
        real, fake = ([(logits.chunk(2)[k], [f.chunk(2)[k] for f in features]) for logits, features in outputs]
                      for k in (0, 1))
        loss = discriminator_loss(real, fake, kind)
        engine.backward(loss * share)
        # Frozen: the generator's loss needs no gradients of the discriminators' weights.
        module.requires_grad_(False)
        # Not through the engine: this graph is the generator's, and DeepSpeed lets an engine's outputs reach its own
        # backward alone.
        with autocast(fake_BT.device, self.cfg.train.dtype):
            fake = module(fake_BT)
        return {"adversarial": adversarial_loss(fake, kind), "feature": feature_loss(real, fake, kind),
                "discriminator": loss.detach()}


def training_audio(name: str, cfg: CodecConfig | VocoderConfig, crop_s: float, config: Mapping[str, Any], manifest: str,
                   ctx: Context) -> tuple[AudioCrops, torch.Tensor]:
    """Crops of `crop_s` of the train clips, and held-out crops of the dev clips (EVAL_CROPS, EVAL_SAMPLES).

    Raises ValueError for crops too short for the spectral windows (`cfg.crop_s`) and for a split without clips.
    """
    samples, longest = whole_frames(cfg.crop_s) * SEMANTIC_HOP, max(WINDOWS + cfg.disc.windows)
    if samples <= longest // 2:  # an STFT reflects half a window at either end
        least_s = (longest // 2 // SEMANTIC_HOP + 1) * SEMANTIC_HOP / SAMPLE_RATE
        raise ValueError(f"{name}.crop_s {cfg.crop_s} is {samples} samples; spectral windows of {longest} need more than "
                         f"{longest // 2}: raise it to at least {least_s:g}")
    # Test clips are never read in training: dev clips decide which checkpoint is the best.
    clips = {split: read_clip_table(manifest, split, cfg.where) for split in ("train", "dev")}
    for split, chosen in clips.items():
        if not len(chosen):
            raise ValueError(f"no clip of split {split!r} is left for the {name} ({name}.where {cfg.where.source}): "
                             f"widen {name}.where or look at corpus.dev and the sources' splits")
    folders = roots(config["corpus"])
    crops = AudioCrops(clips["train"], folders, whole_frames(crop_s) * SEMANTIC_HOP, cfg.train.batch, ctx.seed, ctx.cache_mb)
    return crops, held_out_crops(clips["dev"], folders)


def held_out_crops(clips: ClipTable, folders: dict[str, str]) -> torch.Tensor:
    """The same EVAL_CROPS crops on every rank and at every call, spread evenly over the clips."""
    wav_BT = torch.zeros(EVAL_CROPS, EVAL_SAMPLES)
    per_clip = math.ceil(EVAL_CROPS / len(clips))
    for k in range(EVAL_CROPS):
        clip = clips[k * len(clips) // EVAL_CROPS]
        n = min(EVAL_SAMPLES, clip.samples)
        start = int((clip.samples - n) * ((k % per_clip) + 0.5) / per_clip)
        wav_BT[k, :n] = torch.from_numpy(read_clip(clip, folders, start, n))
    return wav_BT


def rank_batches(held_out_BT: torch.Tensor, ctx: Context) -> Iterator[torch.Tensor]:
    """This rank's share of the held-out crops on its device, EVAL_ROWS at a time; nothing on a rank beyond the crops."""
    own_BT = held_out_BT[ctx.rank::ctx.world]
    for start in range(0, len(own_BT), EVAL_ROWS):
        yield own_BT[start:start + EVAL_ROWS].to(ctx.device)


def quality_sums(real_BT: torch.Tensor, fake_BT: torch.Tensor) -> torch.Tensor:
    """(sum, number) over the rows that have a score, of PESQ and of SI-SDR: (2, 2) float32 on the CPU."""
    sums_22 = torch.zeros(2, 2)
    for real_T, fake_T in zip(real_BT.cpu().numpy(), fake_BT.cpu().numpy(), strict=True):
        for row, measure in enumerate((pesq_wb, si_sdr_db)):
            with contextlib.suppress(ImportError):  # pesq is compiled where it is installed; training does without
                value = measure(real_T, fake_T)
                if not isinstance(value, str) and math.isfinite(value):
                    sums_22[row] += torch.tensor([value, 1.0])
    return sums_22


def quality_means(sums_22: torch.Tensor, suffix: str = "") -> dict[str, float]:
    """"pesq" and "si_sdr_db" from reduced `quality_sums`, without those that no row has."""
    names = (f"pesq{suffix}", f"si_sdr_db{suffix}")
    return {name: float(total / n) for name, (total, n) in zip(names, sums_22, strict=True) if n}
