"""The loss balancer: each loss gets a fixed share of the gradient that reaches the waveform (EnCodec, 2210.13438 3.4).

Each term's gradient with respect to the fake waveform is divided by its own running norm and multiplied by its share of
the weights, so that the weights say what a term may move, whatever its scale.  Terms that do not pass through the
waveform keep their plain weights.  The norms used in a step are those of the steps before it, so that micro-batches and
ranks change nothing, but in a term's very first step, where each has only its own.  They are in every checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from audiolm.config import CodecWeights

TERMS = ("reconstruction", "waveform", "feature", "adversarial")
DECAY = 0.999


class Balance(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(len(TERMS)))  # decayed sum of norms, and of ones
        self.register_buffer("count", torch.zeros(len(TERMS)))
        self._seen: dict[str, torch.Tensor] = {}

    def norms(self) -> dict[str, torch.Tensor]:
        """The running norm of each term's gradient, 0 where it has not been seen."""
        return dict(zip(TERMS, self.total / self.count.clamp_min(1e-12), strict=True))

    def target(self, made_BT: torch.Tensor, fake_BT: torch.Tensor, terms: Mapping[str, torch.Tensor],
               weights: CodecWeights, share: float) -> torch.Tensor:
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
