"""One layer of a Transformer, and the sizes of the whole (2209.03143 III-C, IV-B): pre-norm, no biases.

`forward` is the training pass, `step` a layer over new tokens with a cache; shapes as models.lm.transformer.
On a CPU single tokens run in rows of 8, so that a row's bits do not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from audiolm.models.lm.attention import attend
from audiolm.models.lm.cache import Places
from audiolm.models.positions import Rope, apply_rope
from audiolm.models.stream import LayerNorm, RMSNorm

ROWS = 8  # rows of a CPU matrix product while sampling; a product's rounding depends on its shape
EPS = 1e-5


def norm(s: TransformerSizes) -> nn.Module:
    return RMSNorm(s.dim, eps=EPS) if s.norm == "rms" else LayerNorm(s.dim, eps=EPS, bias=False)


@dataclass(frozen=True)
class TransformerSizes:
    """Architecture of a Transformer: dim and ff in channels, `gated`: ff each of value and gate.

    slots: the ids of each slot of a frame (None: one slot of `vocab` ids; empty: no heads); positions: rotary or t5; norm:
    layer or rms; activation: gelu or silu; no_cond: the id that is no condition, run: the longest run length (0: none).
    tied: (levels, vocab, width, id of the first code) of a codec's code vectors that embeddings and heads are tied to.
    Raises ValueError where dim does not split into even heads.
    """

    vocab: int
    dim: int
    layers: int
    heads: int
    ff: int
    dropout: float
    slots: Sequence[int] | None = None
    positions: str = "rotary"
    gated: bool = False
    norm: str = "layer"
    activation: str = "gelu"
    no_cond: int = 0
    run: int = 0
    tied: Sequence[int] | None = None

    def __post_init__(self):
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"dim ({self.dim}) must be an even multiple of heads ({self.heads}), for rotary positions")


class Block(nn.Module):
    """Pre-norm attention, then a pre-norm feed-forward layer, both added to the residual stream."""

    def __init__(self, s: TransformerSizes):
        super().__init__()
        self.heads, self.gated, self.silu, self.dropout = s.heads, s.gated, s.activation == "silu", s.dropout
        self.compiled = None  # `step`, see Transformer.compile_sampling
        self.norm1 = norm(s)
        self.qkv = nn.Linear(s.dim, 3 * s.dim, bias=False)
        self.out = nn.Linear(s.dim, s.dim, bias=False)
        self.norm2 = norm(s)
        self.up = nn.Linear(s.dim, 2 * s.ff if s.gated else s.ff, bias=False)
        self.down = nn.Linear(s.ff, s.dim, bias=False)

    def feed(self, h: torch.Tensor) -> torch.Tensor:
        """Feed-forward layer, without the residual."""
        x = self.up(self.norm2(h))
        # gated (SwiGLU and GEGLU, 2002.05202): half of the channels multiply the other half
        gate, x = x.chunk(2, -1) if self.gated else (x, None)
        a = F.silu(gate) if self.silu else F.gelu(gate, approximate="tanh")
        return self.down(a if x is None else a * x)

    def project(self, h_BTD: torch.Tensor, rope: Rope | None) -> tuple[torch.Tensor, ...]:
        """q, k, v (B, T, H, E); rope (B or 1, T, 1, 1, E)."""
        B, T, D = h_BTD.shape
        qkv = self.qkv(self.norm1(h_BTD)).view(B, T, 3, self.heads, D // self.heads)
        qk = apply_rope(qkv[:, :, :2], *rope) if rope else qkv[:, :, :2]
        return qk[:, :, 0], qk[:, :, 1], qkv[:, :, 2]

    def forward(self, h_BTD: torch.Tensor, rope: Rope | None, mask: torch.Tensor | None, bounds_N: torch.Tensor | None):
        """The training pass; mask and bounds as `attend` takes them."""
        a = self.out(attend(*self.project(h_BTD, rope), mask, bounds_N))
        h = h_BTD + F.dropout(a, self.dropout, self.training)
        return h + F.dropout(self.feed(h), self.dropout, self.training)

    def step(self, h_RtD: torch.Tensor, kv_2BHLE: torch.Tensor, at: Places) -> torch.Tensor:
        """One layer over t new tokens of B rows (R >= B rows of h, the rest is padding); writes their keys and values."""
        R, t, D = h_RtD.shape
        B, H, _, E = kv_2BHLE.shape[1:]
        qkv = self.qkv(self.norm1(h_RtD)).view(R, t, 3, H, E)[:B]
        if at.rope:
            rotate_(qkv[:, :, :2], *at.rope)
        kv_2BHLE[:, at.row_B1, :, at.at_Bt] = qkv[:, :, 1:]  # one copy for rows of any lengths
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        if at.hidden is None:  # a prompt in an empty cache: its tokens attend to each other alone
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=at.bias, is_causal=at.bias is None)
        else:
            k, v = kv_2BHLE[..., :at.keys, :]
            # A single token is written out: the fused kernels split sums by threads and batch on a CPU, which moves
            # bits, and are slow with a mask on a GPU.
            if t == 1:
                scores = torch.matmul(q * E ** -0.5, k.transpose(2, 3))
                # softmax sums in float32, whatever it is given
                scores = scores.masked_fill_(at.hidden, -torch.inf) if at.bias is None else scores + at.bias
                a = scores.softmax(-1).to(v.dtype) @ v
            else:
                a = F.scaled_dot_product_attention(q, k, v, attn_mask=~at.hidden if at.bias is None else at.bias)
        a = a.transpose(1, 2).reshape(B, t, D)
        if at.room is not None:
            at.room[:B] = a
            a = at.room
        h = h_RtD + self.out(a)
        return h + self.feed(h)


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """`apply_rope` in place, with the same bits."""
    other = x.roll(x.shape[-1] // 2, -1)
    x.mul_(cos).addcmul_(other, sin)


def pad_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    """On a CPU zero rows up to a multiple of `rows`: a matrix product's bits depend on its number of rows."""
    if x.device.type != "cpu":
        return x
    return F.pad(x, (*(0,) * (2 * x.ndim - 1), -len(x) % rows))
