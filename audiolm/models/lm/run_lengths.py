"""Run lengths of deduplicated ids: how many frames each id lasts, read with the id and predicted after it.

p(length | id, all before) comes from the hidden state that predicted the id, and from the id.
Shapes: length 1 to `longest`, 0 where there is none; h (..., D); ids and lengths (...) int64; scores (..., longest).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from audiolm.models.lm.heads import NO_TARGET
from audiolm.models.stream import to_stream


class RunLengths(nn.Module):
    """Embedding of lengths that are read, head of lengths that are predicted."""

    def __init__(self, vocab: int, dim: int, longest: int):
        super().__init__()
        self.embed = nn.Embedding(longest + 1, dim)
        self.given = nn.Embedding(vocab, dim)
        self.mix = nn.Linear(dim, dim, bias=False)
        self.head = nn.Linear(dim, longest, bias=False)

    def scores(self, h: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Scores of the lengths 1, 2, ... of `ids`, which were drawn after h."""
        return self.head(F.gelu(self.mix(h) + to_stream(self.given(ids)), approximate="tanh")).float()

    def nats(self, h_ND: torch.Tensor, ids_N: torch.Tensor, label_N: torch.Tensor) -> torch.Tensor:
        """nats_N float32 of lengths label_N + 1, 0 for NO_TARGET."""
        return F.cross_entropy(self.scores(h_ND, ids_N), label_N, ignore_index=NO_TARGET, reduction="none")
