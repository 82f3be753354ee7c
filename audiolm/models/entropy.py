"""Entropy and perplexity of how often codes are used.

Shapes: weights (..., N), counts or shares of N codes that need not sum to 1.  A row of zeros has entropy 0.
"""

from __future__ import annotations

import numpy as np
import torch


def entropy(weights: torch.Tensor) -> torch.Tensor:
    """(...) entropy of each row, in nats."""
    share = weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)
    return torch.special.entr(share).sum(-1)


def perplexity(weights: torch.Tensor) -> torch.Tensor:
    """(...) exp(entropy) of each row: N where all codes are used alike, 1 where one is."""
    return entropy(weights).exp()


def entropy_bits(counts: np.ndarray) -> float:
    """Entropy of a histogram in bits."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())
