"""Embeddings and heads tied to a codec's codebooks: codes are geometry, which a free table has to learn from few examples.

A code's embedding is its latent vector e through a linear layer, one for all levels: the embeddings of a frame add up to
that of its quantized latent.  Its score is scale x (mu . e - |e|^2 / 2), the log-density of e around a predicted vector mu
up to a constant; free tables of the model are added to both.
Shapes: codes_QVE float32, the latent vector that each code adds; Q levels that are read, of which the last S are
predicted; D width of the model.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from audiolm.models.lm.heads import LevelHeads, Table

READ_STD = 0.3  # of an embedding's values at the start; at 0.02 blocks, whose outputs are as large as 1, cover what is read
SCALE = 0.2  # of a head at the start, over the codes' variance; at 0.5 the first losses lie 2 nats above a guess
SCALE_GAIN = 10.0  # of the scale's logarithm over its parameter: a hundred steps of Adam have to reach its place
MU_SHARE = 0.1  # of the codes' size that a predicted vector has at the start


class TiedCodes(nn.Module):
    """The tied part of a stage's tables; `set_codes` before training."""

    def __init__(self, levels: int, vocab: int, width: int, predicted: int, dim: int):
        super().__init__()
        self.register_buffer("codes_QVE", torch.zeros(levels, vocab, width))
        self.read_ED = nn.Parameter(torch.zeros(width, dim))
        self.predicted = predicted
        if predicted:  # a network that predicts nothing has embeddings alone
            self.mu_SED = nn.Parameter(torch.zeros(predicted, width, dim))
            self.scale_S = nn.Parameter(torch.zeros(predicted))

    @torch.no_grad()
    def set_codes(self, codes_QVE: torch.Tensor) -> None:
        """Takes a codec's code vectors and draws the layers around them; raises ValueError for another shape."""
        if codes_QVE.shape != self.codes_QVE.shape:
            raise ValueError(f"the codec has code vectors of shape {tuple(codes_QVE.shape)}, the stage reads "
                             f"{tuple(self.codes_QVE.shape)}: train the stage on tokens of this codec")
        self.codes_QVE.copy_(codes_QVE)
        (_, _, width), predicted = codes_QVE.shape, self.predicted
        centred_QVE = codes_QVE - codes_QVE.mean(1, keepdim=True)
        variance_Q = centred_QVE.square().mean((1, 2)).clamp_min(1e-12)
        size_Q = codes_QVE.square().mean((1, 2)).clamp_min(1e-12).sqrt()
        self.read_ED.normal_().mul_(READ_STD / (size_Q[0] * width ** 0.5))
        if predicted:
            self.mu_SED.normal_().mul_(MU_SHARE * size_Q[-predicted:, None, None] * self.mu_SED.shape[2] ** -0.5)
            self.scale_S.copy_((SCALE / variance_Q[-predicted:]).log() / SCALE_GAIN)

    def embeddings(self) -> torch.Tensor:
        """(Q x V, D) of all codes, level after level."""
        return self.codes_QVE.flatten(0, 1) @ self.read_ED

    def heads(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(weight_VD, bias_V) of each predicted level."""
        codes_SVE = self.codes_QVE[-len(self.scale_S):]
        scale_S = (SCALE_GAIN * self.scale_S).exp()
        weight_SVD = torch.bmm(codes_SVE, self.mu_SED) * scale_S[:, None, None]
        half_SV = codes_SVE.square().sum(2) / 2
        bias_SV = (half_SV.mean(1, keepdim=True) - half_SV) * scale_S[:, None]
        return list(zip(weight_SVD, bias_SV, strict=True))


def embedding_table(embed: nn.Embedding, tied: TiedCodes | None, first: int) -> torch.Tensor:
    """(V, D) of all ids: the free table, with the tied one added from the id of the `first` code on."""
    if tied is None:
        return embed.weight
    with torch.autocast(embed.weight.device.type, enabled=False):
        table, codes = embed.weight, tied.embeddings()
        stop = first + len(codes)
        return torch.cat([table[:first], table[first:stop] + codes, table[stop:]])


def head_tables(head: LevelHeads, tied: TiedCodes | None) -> list[Table]:
    """Each slot's table; ids behind a level's codes, such as EOS, have free rows alone."""
    own = head.by_slot()
    if tied is None:
        return own
    with torch.autocast(head.weight.device.type, enabled=False):
        return [(free + F.pad(weight, (0, 0, 0, len(free) - len(weight))), F.pad(bias, (0, len(free) - len(bias))))
                for (free, _), (weight, bias) in zip(own, tied.heads(), strict=True)]


@torch.no_grad()
def place_ids(embed: nn.Embedding, centroid_KC: torch.Tensor) -> None:
    """Sets the rows of semantic ids, the first K, to their clusters' centroids through a random layer.

    So like ids are alike before the first step, which rare ones would take long to learn.
    """
    x_KC = (centroid_KC - centroid_KC.mean(0)) / centroid_KC.std()
    embed.weight[:len(x_KC)] = x_KC @ torch.randn(x_KC.shape[1], embed.weight.shape[1]).mul_(READ_STD * x_KC.shape[1] ** -0.5)


@torch.no_grad()
def fold_tables(embed: nn.Embedding, head: LevelHeads | None, tied: TiedCodes, first: int) -> None:
    """Writes the tied tables into the free ones, which are then all that the model needs."""
    embed.weight.copy_(embedding_table(embed, tied, first))
    if head:
        weights, biases = zip(*head_tables(head, tied), strict=True)
        head.weight.copy_(torch.cat(weights))
        head.bias = torch.cat(biases)
