"""What a trained decoder of sound needs besides its own losses, for the codec and the semantic vocoder alike: the game
against discriminators, the moving average of its weights, held-out pieces and their scores.

Shapes: wav_BT (real), fake_BT (made), float32 at 16 kHz.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping

import torch
import torch._functorch.config
from torch import nn

from audiolm.config.codec import CodecLossWeights
from audiolm.data.clips import read_clip
from audiolm.eval.metrics.audio_quality import pesq_wb, si_sdr_db
from audiolm.models.losses import adversarial_loss, discriminator_loss, feature_loss
from audiolm.tokenizers.base import SEMANTIC_HOP
from audiolm.train.objectives.base import Engine

EVAL_CROPS, EVAL_SAMPLES, EVAL_ROWS = 16, 48 * SEMANTIC_HOP, 4  # 1.92 s each


class EMA(nn.Module):
    """Moving average of named parameters, in fp32 buffers ("." in a name becomes "/")."""

    def __init__(self, named: Mapping[str, torch.Tensor]):
        super().__init__()
        for name, value in named.items():
            self.register_buffer(name.replace(".", "/"), value.detach().float().clone())

    @torch.no_grad()
    def update(self, named: Mapping[str, torch.Tensor], decay: float) -> None:
        mine = [self._buffers[name.replace(".", "/")] for name in named]
        torch._foreach_lerp_(mine, [p.float() for p in named.values()], 1 - decay)

    def values(self) -> dict[str, torch.Tensor]:
        return {name.replace("/", "."): value for name, value in self.named_buffers()}


def discriminator_step(engine: Engine, module: nn.Module, wav_BT: torch.Tensor, fake_BT: torch.Tensor, share: float, last: bool, kind: str,
         dtype: str) -> dict[str, torch.Tensor]:
    """The discriminators' own step on detached fakes, then their judgement of the fakes with frozen weights: the losses
    adversarial and feature (which reach fake_BT) and discriminator (detached). `kind` is dac or soundstream, `dtype` that of
    the training, `share` the micro-batch's of the step, `last` whether it is the step's last."""
    module.requires_grad_(True)
    judged = engine(torch.cat([wav_BT, fake_BT.detach()]))
    real, fake = ([(logits.chunk(2)[k], [f.chunk(2)[k] for f in features]) for logits, features in judged]
                  for k in (0, 1))
    loss = discriminator_loss(real, fake, kind)
    engine.backward(loss * share, last)
    module.requires_grad_(False)
    # not through the engine: this graph is the generator's, and DeepSpeed lets an engine's outputs reach its own
    # backward alone
    with torch.autocast(fake_BT.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        fake = module(fake_BT)
    return {"adversarial": adversarial_loss(fake, kind), "feature": feature_loss(real, fake, kind),
            "discriminator": loss.detach()}


def reconstruction_metrics(real_BT: torch.Tensor, fake_BT: torch.Tensor) -> torch.Tensor:
    """(sum, number) over the rows that have a value, of PESQ and of SI-SDR."""
    found_22 = torch.zeros(2, 2)
    for real_T, fake_T in zip(real_BT.cpu().numpy(), fake_BT.cpu().numpy(), strict=True):
        for row, measure in enumerate((pesq_wb, si_sdr_db)):
            with contextlib.suppress(ImportError):  # pesq is compiled where it is installed; training does without
                value = measure(real_T, fake_T)
                if not isinstance(value, str) and math.isfinite(value):
                    found_22[row] += torch.tensor([value, 1.0])
    return found_22


def held_out_crops(clips: list, places: dict[str, str]) -> torch.Tensor:
    """The same EVAL_CROPS pieces on every rank and at every call, spread evenly over the clips."""
    wav_BT = torch.zeros(EVAL_CROPS, EVAL_SAMPLES)
    each = math.ceil(EVAL_CROPS / len(clips))
    for k in range(EVAL_CROPS):
        clip = clips[k * len(clips) // EVAL_CROPS]
        n = min(EVAL_SAMPLES, clip.samples)
        start = int((clip.samples - n) * ((k % each) + 0.5) / each)
        wav_BT[k, :n] = torch.from_numpy(read_clip(clip, places, start, n))
    return wav_BT


def compile_parts(*parts: nn.Module) -> None:
    """In place, so that the parameters keep their names; STFTs stay out, as the compiler has no complex numbers."""
    torch._dynamo.config.recompile_limit = 64  # graphs of one class's forward: parts x sizes x learning or frozen
    torch._functorch.config.donated_buffer = False  # the balancer goes through the judges twice
    for part in parts:
        part.compile(dynamic=False)  # else the parts, being of one class, count as one part of many sizes


TERMS = ("reconstruction", "waveform", "feature", "adversarial")
DECAY = 0.999


class LossBalancer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(len(TERMS)))  # decayed sum of norms, and of ones
        self.register_buffer("count", torch.zeros(len(TERMS)))
        self._seen: dict[str, torch.Tensor] = {}

    def norms(self) -> dict[str, torch.Tensor]:
        """The running norm of each term's gradient, 0 where it has not been seen."""
        return dict(zip(TERMS, self.total / self.count.clamp_min(1e-12), strict=True))

    def target(self, made_BT: torch.Tensor, fake_BT: torch.Tensor, terms: Mapping[str, torch.Tensor],
               weights: CodecLossWeights, share: float) -> torch.Tensor:
        """A scalar whose gradient is the balanced one. made_BT is the generator's waveform, fake_BT its detached twin that
        the terms were computed from; `share` of the step's rows are in this micro-batch."""
        running, sum_BT, plain = self.norms(), torch.zeros_like(fake_BT), fake_BT.new_zeros(())
        whole = sum(getattr(weights, name) for name in TERMS if name in terms)
        for name, term in terms.items():
            if name in TERMS:
                gradient_BT, = torch.autograd.grad(term, fake_BT, retain_graph=True)
                norm = gradient_BT.norm(dim=1).mean() * len(fake_BT)  # of a row's own gradient
                self._seen[name] = self._seen.get(name, 0.0) + norm * share
                scale = torch.where(running[name] > 0, running[name], norm).clamp_min(1e-12)
                sum_BT += getattr(weights, name) / whole / scale * gradient_BT
            elif name != "discriminator":
                plain = plain + getattr(weights, name) * term
        return (made_BT * sum_BT).sum() + plain

    @torch.no_grad()
    def update(self, reduce: Callable[[torch.Tensor], torch.Tensor], world: int) -> dict[str, torch.Tensor]:
        """Takes in the norms that the step's micro-batches saw; returns those terms' running norms. All ranks take part."""
        seen = [name in self._seen for name in TERMS]
        now = torch.stack([torch.as_tensor(self._seen.get(name, 0.0), device=self.total.device) for name in TERMS])
        mask = torch.tensor(seen, device=self.total.device)
        self.total.copy_(torch.where(mask, DECAY * self.total + reduce(now.float()) / world, self.total))
        self.count.copy_(torch.where(mask, DECAY * self.count + 1, self.count))
        self._seen.clear()
        return {name: norm for (name, norm), there in zip(self.norms().items(), seen, strict=True) if there}
