"""The network over the levels of a frame: from a frame's hidden vector and its codes so far to the next code.

RQ-Transformer (2203.01941) and Moshi (2410.00037) have a small Transformer here.  The codes of a residual quantizer add up
to one vector, so the sum of their embeddings says all that the next level depends on, and feed-forward layers are enough.
Shapes: h_ND a hidden vector a frame; code_SN the codes of N frames in S slots; u_NSd the input of the heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from audiolm.models.lm.block import EPS
from audiolm.models.lm.heads import LevelHeads
from audiolm.models.lm.tied import TiedCodes, embedding_table, fold_tables, head_tables
from audiolm.models.stream import LayerNorm, to_stream

STD = 0.1  # of free tables that are read, at the start: beside `read`, whose outputs are as large as 1


@dataclass(frozen=True)
class DepthSizes:
    """`slots` of `vocab` codes, read from vectors of `read` channels; code_width: of the vectors tied to, 0: untied."""

    read: int
    slots: int
    vocab: int
    dim: int
    layers: int
    ff: int
    dropout: float
    code_width: int = 0


class Layer(nn.Module):
    """Pre-norm feed-forward layer, added to its input."""

    def __init__(self, s: DepthSizes):
        super().__init__()
        self.norm, self.dropout = LayerNorm(s.dim, eps=EPS, bias=False), s.dropout
        self.up, self.down = nn.Linear(s.dim, s.ff, bias=False), nn.Linear(s.ff, s.dim, bias=False)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        x = self.down(F.gelu(self.up(self.norm(u)), approximate="tanh"))
        return u + F.dropout(x, self.dropout, self.training)


class DepthNetwork(nn.Module):
    """Embeddings of codes, layers, one output head a slot."""

    def __init__(self, sizes: DepthSizes):
        super().__init__()
        s = self.sizes = sizes
        self.compiled = None  # `_scores`, see compile_sampling
        self.read = nn.Linear(s.read, s.dim, bias=False)
        self.slot_Sd = nn.Parameter(torch.empty(s.slots, s.dim))
        self.embed = nn.Embedding(s.slots * s.vocab, s.dim)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm = LayerNorm(s.dim, eps=EPS, bias=False)
        self.head = LevelHeads(s.dim, [s.vocab] * s.slots)
        self.tied = TiedCodes(s.slots, s.vocab, s.code_width, s.slots, s.dim) if s.code_width else None
        for p in (self.read.weight, *self.layers.parameters()):
            if p.ndim == 2:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
        nn.init.normal_(self.slot_Sd, std=STD)
        if self.tied:  # free terms beside the tied ones start at zero
            nn.init.zeros_(self.embed.weight)
            nn.init.zeros_(self.head.weight)
        else:
            nn.init.normal_(self.embed.weight, std=STD)
            nn.init.normal_(self.head.weight, std=0.02)
        self.register_buffer("first_S", s.vocab * torch.arange(s.slots), persistent=False)  # id of each slot's code 0

    def nats(self, h_ND: torch.Tensor, label_SN: torch.Tensor) -> torch.Tensor:
        """nats_SN of the codes of N frames; an empty place (NO_TARGET) counts nothing."""
        table = embedding_table(self.embed, self.tied, 0)
        code_NS = (label_SN[:-1].clamp_min(0) + self.first_S[:-1, None]).T
        before_NSd = F.pad(F.embedding(code_NS, table).cumsum(1), (0, 0, 1, 0))
        u_Nsd = self._feed(self.read(h_ND)[:, None] + before_NSd + self.slot_Sd)
        S, N = label_SN.shape
        at_SN = torch.arange(S, device=h_ND.device)[:, None] + S * torch.arange(N, device=h_ND.device)
        return self.head(u_Nsd.flatten(0, 1), at_SN, label_SN, tables=head_tables(self.head, self.tied))

    @torch.no_grad()
    def drawn(self, h_ND: torch.Tensor, uniform_NS: torch.Tensor) -> torch.Tensor:
        """codes_NS of N frames, drawn by the inverse of the distribution function from numbers in 0..1; in training too."""
        table, heads = embedding_table(self.embed, self.tied, 0), head_tables(self.head, self.tied)
        read_Nd, codes = self.read(h_ND), []
        before_Nd = torch.zeros_like(read_Nd)
        for slot, (weight_Vd, bias_V) in enumerate(heads):
            u_Nd = self._feed(read_Nd + before_Nd + self.slot_Sd[slot])
            scores_NV = F.linear(u_Nd, weight_Vd.to(u_Nd.dtype)).float() + (0 if bias_V is None else bias_V.float())
            below_NV = scores_NV.softmax(-1).cumsum(-1)
            codes.append((below_NV < uniform_NS[:, slot:slot + 1]).sum(-1).clamp_max(self.sizes.vocab - 1))
            before_Nd = before_Nd + F.embedding(codes[-1] + slot * self.sizes.vocab, table)
        return torch.stack(codes, 1)

    def _feed(self, u: torch.Tensor) -> torch.Tensor:
        u = F.dropout(to_stream(u), self.sizes.dropout, self.training)
        for layer in self.layers:
            u = layer(u)
        return self.norm(u)

    def scores(self, read_Bd: torch.Tensor, before_Bd: torch.Tensor, slot: int) -> torch.Tensor:
        """scores_BV float32 of a slot's codes; `before_Bd`: the sum of the embeddings of the codes before."""
        scores = self.compiled or self._scores
        return scores(read_Bd, before_Bd, self.slot_Sd[slot], *self.head.by_slot()[slot])

    def _scores(self, read_Bd: torch.Tensor, before_Bd: torch.Tensor, slot_d: torch.Tensor, weight_Vd: torch.Tensor,
                bias_V: torch.Tensor | None) -> torch.Tensor:
        scores_BV = F.linear(self._feed(read_Bd + before_Bd + slot_d), weight_Vd).float()
        return scores_BV if bias_V is None else scores_BV + bias_V.float()

    def compile_sampling(self, backend: str) -> None:
        """Compiles the scores of a code, once for all slots."""
        self.compiled = torch.compile(self._scores, backend=backend, dynamic=False)

    def embedded(self, code_B: torch.Tensor, slot: int) -> torch.Tensor:
        """(B, d): what codes of a slot add to `before_Bd`, of folded tables."""
        return self.embed(code_B + slot * self.sizes.vocab)

    def fold_tied(self) -> None:
        """As models.lm.transformer."""
        if self.tied:
            fold_tables(self.embed, self.head, self.tied, 0)
            self.tied = None

    def flops_per_frame(self) -> float:
        """Training FLOPs a frame: 6 a weight of the matrix products, of the heads one slot's for each slot."""
        s = self.sizes
        own = sum(p.numel() for p in self.layers.parameters() if p.ndim == 2) + s.vocab * s.dim
        return 6.0 * (s.slots * own + self.read.weight.numel())
