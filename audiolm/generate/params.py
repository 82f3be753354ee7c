"""Sampling parameters, and the draw of one id from a row of scores (2209.03143 III-D).

Temperature, top-k, top-p and repetition-aware sampling.  A draw inverts the cumulative distribution at a uniform number.
The number depends on (seed, target position) alone, so a sample does not depend on its neighbours.
Shapes: scores_BW float32 over a slot's own ids, -inf where an id may not be drawn; noise_B2 float64 in [0, 1), the second
number for a draw that is repeated; ids_BW; recent_BR the row's last ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from audiolm.config.lm import SamplesConfig

STAGES = ("semantic", "coarse", "fine")


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of a stage. Temperature 0 takes the most likely id; the rest is off in the paper.

    `window`: an id that makes up more than `repeats` of the last `window` ids of its slot is drawn again, without top_k
    and top_p (repetition-aware sampling: VALL-E 2, 2406.05370, section 3.3).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    window: int | None = None
    repeats: float = 0.1  # 2406.05370

    def __post_init__(self):
        for name, legal, text in (("temperature", self.temperature >= 0, "be 0 or more"),
                                  ("top_k", self.top_k is None or self.top_k >= 1, "be at least 1, or None"),
                                  ("top_p", self.top_p is None or 0 < self.top_p <= 1, "lie in (0, 1], or be None"),
                                  ("window", self.window is None or self.window >= 1, "be at least 1, or None"),
                                  ("repeats", 0 <= self.repeats < 1, "lie in [0, 1)")):
            if not legal:
                raise ValueError(f"{name} ({getattr(self, name)}) must {text}")


def params_from_config(samples: SamplesConfig) -> dict[str, SamplingParams]:
    """Sampling parameters by stage of a run's config."""
    return {stage: SamplingParams(getattr(samples, f"temperature_{stage}")) for stage in STAGES}


PAPER_PARAMS = params_from_config(SamplesConfig())  # 0.6, 0.8, 0.6: 2209.03143 III-D


def uniform_noise(seed: int, first: int, last: int) -> torch.Tensor:
    """noise_S2 of the target positions [first, last), from the sample's own generator."""
    return torch.rand(last, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)[first:]


def sample_ids(scores_BW: torch.Tensor, noise_B2: torch.Tensor, params: SamplingParams, ids_BW: torch.Tensor,
               recent_BR: torch.Tensor) -> torch.Tensor:
    """ids_B drawn by `params`; an id with score -inf is never drawn."""
    if params.temperature == 0:
        return ids_BW.gather(1, scores_BW.argmax(1, keepdim=True))[:, 0]
    full_BW = (scores_BW / params.temperature).softmax(1)
    cut_BW = full_BW
    if params.top_k is not None and params.top_k < scores_BW.shape[1]:
        least_B1 = cut_BW.topk(params.top_k, 1).values[:, -1:]
        cut_BW = cut_BW.masked_fill(cut_BW < least_B1, 0.0)
    if params.top_p is not None and params.top_p < 1:
        ranked, order = cut_BW.sort(1, descending=True)
        total_B1 = ranked.sum(1, keepdim=True)  # below 1 after top_k
        out = ranked.cumsum(1) - ranked >= params.top_p * total_B1  # the id that crosses top_p stays
        cut_BW = cut_BW.masked_fill(torch.zeros_like(out).scatter_(1, order, out), 0.0)
    drawn_B = _invert_cdf(cut_BW, noise_B2[:, 0], ids_BW)
    if params.window is None:
        return drawn_B
    # both draws are made for all rows: a CUDA graph cannot branch on a row's history
    often_B = (recent_BR == drawn_B[:, None]).sum(1) > params.repeats * params.window
    return torch.where(often_B, _invert_cdf(full_BW, noise_B2[:, 1], ids_BW), drawn_B)


def _invert_cdf(probs_BW: torch.Tensor, noise_B: torch.Tensor, ids_BW: torch.Tensor) -> torch.Tensor:
    """ids_B at the quantiles noise_B of unnormalised probabilities; float64, as rare ids vanish in a float32 sum."""
    cdf_BW = probs_BW.double().cumsum(1)
    # strictly below the total, so that the first place above it has a probability above 0
    at_B1 = (noise_B.clamp(max=1 - 1e-12) * cdf_BW[:, -1])[:, None]
    return ids_BW.gather(1, torch.searchsorted(cdf_BW, at_B1, right=True))[:, 0]
