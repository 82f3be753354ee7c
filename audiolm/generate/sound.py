"""One generated clip."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from audiolm.tokenizers.base import SAMPLE_RATE


@dataclass(frozen=True)
class Sound:
    """One generated clip: wav_T, the semantic ids as stage 1 has them (deduplicated where it is), all its codes_TQ."""

    wav_T: np.ndarray
    z: np.ndarray
    codes_TQ: np.ndarray
    prompt: int = 0  # samples of wav_T that are the prompt's
    z_prompt: int = 0  # ids of z that are the prompt's
    ended: bool = False  # stage 1 drew EOS

    @property
    def new_s(self) -> float:
        """Seconds beyond the prompt."""
        return (len(self.wav_T) - self.prompt) / SAMPLE_RATE

    @property
    def semantic_per_s(self) -> float | None:
        """Semantic ids a second beyond the prompt; None where there is nothing beyond it."""
        return round((len(self.z) - self.z_prompt) / self.new_s, 3) if self.new_s else None
