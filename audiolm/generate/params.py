"""Sampling parameters of the three stages: temperature, top-k, top-p, repetition-aware sampling (2209.03143 III-D).

`sampler.sample_ids` draws by them.
"""

from __future__ import annotations

from dataclasses import dataclass

from audiolm.config.lm import SamplesConfig

STAGES = ("semantic", "coarse", "fine")


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of a stage. Temperature 0 takes the most likely id; the rest is off in the paper.

    `window`: an id that makes up more than `repeats` of the last `window` ids of its slot is drawn again, without top_k
    and top_p (repetition-aware sampling: VALL-E 2, 2406.05370, section 3.3).
    `guidance`: above 1 moves the scores away from those without the condition (2207.12598); stages 2 and 3 alone.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    window: int | None = None
    repeats: float = 0.1  # 2406.05370
    guidance: float = 1.0

    def __post_init__(self):
        for name, legal, text in (("temperature", self.temperature >= 0, "be 0 or more"),
                                  ("top_k", self.top_k is None or self.top_k >= 1, "be at least 1, or None"),
                                  ("top_p", self.top_p is None or 0 < self.top_p <= 1, "lie in (0, 1], or be None"),
                                  ("window", self.window is None or self.window >= 1, "be at least 1, or None"),
                                  ("guidance", self.guidance > 0, "be above 0; 1 is none"),
                                  ("repeats", 0 <= self.repeats < 1, "lie in [0, 1)")):
            if not legal:
                raise ValueError(f"{name} ({getattr(self, name)}) must {text}")


def params_from_config(samples: SamplesConfig) -> dict[str, SamplingParams]:
    """Sampling parameters by stage of a run's config."""
    return {stage: SamplingParams(getattr(samples, f"temperature_{stage}"),
                                  guidance=1.0 if stage == "semantic" else samples.guidance) for stage in STAGES}


PAPER_PARAMS = params_from_config(SamplesConfig())  # 0.6, 0.8, 0.6: 2209.03143 III-D
