"""How one id is drawn from a row of scores (paper III-D): temperature, top-k, top-p, repetition-aware sampling.

A draw is the inverse of the distribution at a uniform number that depends on (seed, target position) alone, so a sample
does not depend on its neighbours.  Shapes: scores_BW float32 over a slot's own ids, -inf where an id may not be drawn;
noise_B2 float64 in [0, 1), the second number for a draw that is made again; ids_BW; recent_BR the row's last ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from audiolm.config.lm import SamplesConfig


@dataclass(frozen=True)
class SamplingParams:
    """Temperature 0 takes the most likely id. The rest is off in the paper.

    `window`: an id that makes up more than `repeats` of the last `window` ids of its slot is drawn again, without top_k and
    top_p (repetition-aware sampling: VALL-E 2, 2406.05370, section 3.3).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    window: int | None = None
    repeats: float = 0.1

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature ({self.temperature}) must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k ({self.top_k}) must be at least 1, or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p}) must lie in (0, 1], or be None")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window ({self.window}) must be at least 1, or None")
        if not 0 <= self.repeats < 1:
            raise ValueError(f"repeats ({self.repeats}) must lie in [0, 1)")


def params_from_config(samples: SamplesConfig) -> dict[str, SamplingParams]:
    """By stage, as a run's config says."""
    return {stage: SamplingParams(getattr(samples, f"temperature_{stage}")) for stage in ("semantic", "coarse", "fine")}


def gumbel_noise(seed: int, first: int, last: int) -> torch.Tensor:
    """noise_S2 of the target positions [first, last), from the sample's own generator."""
    return torch.rand(last, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)[first:]


def sample_ids(scores_BW: torch.Tensor, noise_B2: torch.Tensor, how: SamplingParams, ids_BW: torch.Tensor,
         recent_BR: torch.Tensor) -> torch.Tensor:
    """(B,): the ids drawn; one with score -inf never is."""
    if how.temperature == 0:
        return ids_BW.gather(1, scores_BW.argmax(1, keepdim=True))[:, 0]
    full_BW = (scores_BW / how.temperature).softmax(1)
    cut_BW = full_BW
    if how.top_k is not None and how.top_k < scores_BW.shape[1]:
        least_B1 = cut_BW.topk(how.top_k, 1).values[:, -1:]
        cut_BW = cut_BW.masked_fill(cut_BW < least_B1, 0.0)
    if how.top_p is not None and how.top_p < 1:
        ranked, order = cut_BW.sort(1, descending=True)
        total_B1 = ranked.sum(1, keepdim=True)
        out = ranked.cumsum(1) - ranked >= how.top_p * total_B1  # the id that crosses top_p stays
        cut_BW = cut_BW.masked_fill(torch.zeros_like(out).scatter_(1, order, out), 0.0)
    drawn_B = _at(cut_BW, noise_B2[:, 0], ids_BW)
    if how.window is None:
        return drawn_B
    often_B = (recent_BR == drawn_B[:, None]).sum(1) > how.repeats * how.window
    return torch.where(often_B, _at(full_BW, noise_B2[:, 1], ids_BW), drawn_B)


def _at(probs_BW: torch.Tensor, noise_B: torch.Tensor, ids_BW: torch.Tensor) -> torch.Tensor:
    cdf_BW = probs_BW.double().cumsum(1)
    # strictly below the total, so that the first place above it has a probability above 0
    at_B1 = (noise_B.clamp(max=1 - 1e-12) * cdf_BW[:, -1])[:, None]
    return ids_BW.gather(1, torch.searchsorted(cdf_BW, at_B1, right=True))[:, 0]


PAPER_PARAMS = {"semantic": SamplingParams(0.6), "coarse": SamplingParams(0.8), "fine": SamplingParams(0.6)}  # paper III-D
