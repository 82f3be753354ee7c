"""Features that HuBERT's first targets of music are clusters of: what sounds in each semitone, whatever the loudness.

MFCCs hold no pitch: clusters of them explain 4 % of which piano keys sound, clusters of these 42 % (RESULTS.md, "Piano").
A musical scale as teacher of a masked model: MERT (2306.00107) predicts a constant-Q transform.
Legend: B rows, T frames, K keys.
"""

from __future__ import annotations

import torch

from audiolm.models.conformer import SUBSAMPLE, valid_frames

QUIET = 0.1  # of a row's mean norm: frames below it stay quiet where norms are made equal


def semitone_targets(x_BTK: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """Means at 25 Hz of the encoder's input at 100 Hz, of norm 1; quiet frames stay below it. Lengths at 25 Hz."""
    x_BTK = x_BTK.unflatten(1, (-1, SUBSAMPLE)).mean(2)
    norm_BT = x_BTK.norm(dim=-1)
    mean_B1 = (norm_BT * valid_frames(lengths_B, x_BTK.shape[1])).sum(1, keepdim=True) / lengths_B[:, None].clamp_min(1)
    return x_BTK / norm_BT.maximum(QUIET * mean_B1).clamp_min(1e-6)[..., None]
