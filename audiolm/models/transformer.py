"""The decoder-only Transformer of all three stages (paper III-C, IV-B): pre-norm, rotary positions, GELU, untied head.

Shapes: ids_BT int64; doc_BT int64, equal within one document of a packed row; h_BTD; logits_BTV in the weights' dtype
(a sampler takes them to float32).  Documents of a row never see each other and their positions start at 0.
`step` with a cache gives the logits of `forward` up to rounding; rows of a batch may have different lengths.
On a CPU single tokens run in rows of 8 and keys in runs of 64, so that a row's bits do not depend on its batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

ROWS = 8  # rows of a CPU matrix product while sampling; a product's rounding depends on its shape
KEYS = 64  # keys come in whole runs of these, masked ones add exact zeros
ROTARY_BASE = 10_000.0


@dataclass
class Cache:
    """Keys and values of every layer; row b holds `lengths_B[b]` tokens at the places 0, 1, ..."""

    k: list[torch.Tensor]  # per layer (batch, heads, length, width of a head)
    v: list[torch.Tensor]
    lengths_B: torch.Tensor
    cos_LE: torch.Tensor
    sin_LE: torch.Tensor
    longest: int = 0  # the longest row, known without asking the device

    def row(self, b: int) -> Cache:
        """A view of one empty row that shares its memory; set `longest` of the whole afterwards."""
        return Cache([t[b:b + 1] for t in self.k], [t[b:b + 1] for t in self.v], self.lengths_B[b:b + 1],
                     self.cos_LE, self.sin_LE)

    def truncate(self, lengths_B: torch.Tensor, longest: int) -> None:
        """Declares the true lengths after a right-padded prompt; what lies beyond is masked and overwritten."""
        self.lengths_B.copy_(lengths_B)
        self.longest = longest


@dataclass
class Places:
    """Where a step's new tokens go and what they see; the same for every layer."""

    rows: torch.Tensor  # of the cache seen as (batch x heads x length, width), for each (row, head, new token)
    cos: torch.Tensor  # (B, t, 1, 1, width)
    sin: torch.Tensor
    keys: int
    seen: torch.Tensor | None  # (B, 1, t, keys) True where a new token sees a key; None: causal among themselves


def rotary(positions: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines (..., width) in float32: positions do not fit in bfloat16."""
    half = torch.arange(width // 2, device=positions.device, dtype=torch.float32)
    angles = positions.float()[..., None] * ROTARY_BASE ** (-2.0 * half / width)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (i, i + width/2) of the last axis; sin carries the sign of its half."""
    y = torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
    return y.to(x.dtype)


def positions_of(doc_BT: torch.Tensor) -> torch.Tensor:
    """Positions that start at 0 with each document of a row."""
    at = torch.arange(doc_BT.shape[1], device=doc_BT.device).expand_as(doc_BT)
    new = torch.ones_like(doc_BT, dtype=torch.bool)
    new[:, 1:] = doc_BT[:, 1:] != doc_BT[:, :-1]
    return at - torch.where(new, at, 0).cummax(1).values


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, ff: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, bias=False)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.norm2 = nn.LayerNorm(dim, bias=False)
        self.up = nn.Linear(dim, ff, bias=False)
        self.down = nn.Linear(ff, dim, bias=False)
        self.dropout = dropout

    def feed(self, h: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(self.norm2(h)), approximate="tanh"))

    def forward(self, h_BTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None):
        """`mask` (B, 1, T, T): True where a query sees a key; None is causal. cos, sin (B or 1, T, 1, 1, D / heads)."""
        B, T, D = h_BTD.shape
        qkv = self.qkv(self.norm1(h_BTD)).view(B, T, 3, self.heads, D // self.heads)
        qk = _rotate(qkv[:, :, :2], cos, sin)
        q, k, v = (x.transpose(1, 2) for x in (qk[:, :, 0], qk[:, :, 1], qkv[:, :, 2]))
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        a = self.out(a.transpose(1, 2).reshape(B, T, D))
        h = h_BTD + F.dropout(a, self.dropout, self.training)
        return h + F.dropout(self.feed(h), self.dropout, self.training)

    def step(self, h_RtD: torch.Tensor, k_BHLE: torch.Tensor, v_BHLE: torch.Tensor, at: Places) -> torch.Tensor:
        """One layer over t new tokens of B rows (R >= B rows of h, the rest is padding); keeps their keys, values."""
        R, t, D = h_RtD.shape
        B, H, _, E = k_BHLE.shape
        qkv = self.qkv(self.norm1(h_RtD))[:B].view(B, t, 3, H, E)
        qk = _rotate(qkv[:, :, :2], at.cos, at.sin)
        q, k, v = (x.transpose(1, 2) for x in (qk[:, :, 0], qk[:, :, 1], qkv[:, :, 2]))
        k_BHLE.view(-1, E).index_copy_(0, at.rows, k.reshape(-1, E))
        v_BHLE.view(-1, E).index_copy_(0, at.rows, v.reshape(-1, E))
        if at.seen is None:  # an empty cache's new tokens see each other only
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v = k_BHLE[:, :, :at.keys], v_BHLE[:, :, :at.keys]
            if t == 1 and q.device.type == "cpu":  # the fused kernel splits its sums by threads and batch
                a = torch.matmul(q * E ** -0.5, k.transpose(2, 3)).masked_fill_(~at.seen, -torch.inf).softmax(-1) @ v
            else:
                a = F.scaled_dot_product_attention(q, k, v, attn_mask=at.seen)
        a = a.transpose(1, 2).reshape(B, t, D)
        h = h_RtD + self.out(F.pad(a, (0, 0, 0, 0, 0, R - B)) if R > B else a)
        return h + self.feed(h)


class Transformer(nn.Module):
    """`vocab` ids in and out; dim, ff in channels; raises ValueError where dim does not split into even heads."""

    def __init__(self, vocab: int, dim: int, layers: int, heads: int, ff: int, dropout: float):
        super().__init__()
        if dim % heads or (dim // heads) % 2:
            raise ValueError(f"dim ({dim}) must be an even multiple of heads ({heads}), for rotary positions")
        self.vocab, self.dim, self.heads, self.dropout = vocab, dim, heads, dropout
        self.embed = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, ff, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, bias=False)
        self.head = nn.Linear(dim, vocab, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                # residual branches shrink with depth, so that the sum over 2 x layers of them keeps its scale
                deep = (2 * layers) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(p, std=0.02 if name in ("embed.weight", "head.weight") else deep * p.shape[1] ** -0.5)

    def forward(self, ids_BT: torch.Tensor, doc_BT: torch.Tensor | None = None) -> torch.Tensor:
        """logits_BTV; entry t predicts ids_BT[:, t + 1] from the ids up to t of the same document."""
        T = ids_BT.shape[1]
        if doc_BT is None:
            positions, mask = torch.arange(T, device=ids_BT.device)[None], None
        else:
            positions = positions_of(doc_BT)
            causal = torch.ones(T, T, dtype=torch.bool, device=ids_BT.device).tril()
            mask = (causal & (doc_BT[:, :, None] == doc_BT[:, None, :]))[:, None]
        cos, sin = (x[:, :, None, None] for x in self._rotary(positions))
        h_BTD = F.dropout(self.embed(ids_BT), self.dropout, self.training)
        for block in self.blocks:
            h_BTD = block(h_BTD, cos, sin, mask)
        return self.head(self.norm(h_BTD))

    def _rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = rotary(positions, self.dim // self.heads)
        dtype = self.embed.weight.dtype  # computed exactly, rounded once
        return cos.to(dtype), sin.to(dtype)

    def cache(self, batch: int, length: int, device: torch.device | str | None = None,
              dtype: torch.dtype | None = None) -> Cache:
        """An empty cache for `batch` rows of at most `length` tokens; device and dtype default to the weights'."""
        device, dtype = device or self.embed.weight.device, dtype or self.embed.weight.dtype
        shape = (batch, self.heads, -(-length // KEYS) * KEYS, self.dim // self.heads)
        k, v = ([torch.zeros(shape, device=device, dtype=dtype) for _ in self.blocks] for _ in range(2))
        cos, sin = self._rotary(torch.arange(shape[2], device=device))
        return Cache(k, v, torch.zeros(batch, dtype=torch.int64, device=device), cos, sin)

    def advance(self, ids_Bt: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Appends t >= 1 tokens to each row; returns h_BtD, what `head` turns into logits.

        Raises ValueError where the cache is full.
        """
        t, length = ids_Bt.shape[1], cache.k[0].shape[2]
        if cache.longest + t > length:
            raise ValueError(f"cache of {length} tokens is full: {cache.longest} held, {t} more; ask for a longer one")
        at = self._places(cache, t)
        h = self.embed(ids_Bt)
        if t == 1 and h.device.type == "cpu":
            h = F.pad(h, (0, 0, 0, 0, 0, -len(h) % ROWS))
        for block, k, v in zip(self.blocks, cache.k, cache.v, strict=True):
            h = block.step(h, k, v, at)
        cache.lengths_B += t
        cache.longest += t
        return self.norm(h)[:len(ids_Bt)]

    def _places(self, cache: Cache, t: int) -> Places:
        B, H, length, _ = cache.k[0].shape
        device = cache.lengths_B.device
        at_Bt = cache.lengths_B[:, None] + torch.arange(t, device=device)
        rows = length * torch.arange(B * H, device=device).view(B, H, 1) + at_Bt[:, None]
        keys = min(length, -(-(cache.longest + t) // KEYS) * KEYS)
        alone = cache.longest == 0 and t > 1
        seen = None if alone else (torch.arange(keys, device=device) <= at_Bt[..., None])[:, None]
        cos, sin = (x[at_Bt][:, :, None, None] for x in (cache.cos_LE, cache.sin_LE))
        return Places(rows.view(-1), cos, sin, keys, seen)

    def logits(self, h_BtD: torch.Tensor) -> torch.Tensor:
        """logits_BtV of `advance`'s result, with the same care for a CPU's rounding."""
        B, t, _ = h_BtD.shape
        if t == 1 and h_BtD.device.type == "cpu":
            h_BtD = F.pad(h_BtD, (0, 0, 0, 0, 0, -B % ROWS))
        return self.head(h_BtD)[:B]

    def step(self, ids_Bt: torch.Tensor, cache: Cache) -> torch.Tensor:
        """logits_BtV of t >= 1 new tokens of each row; use under torch.no_grad() and in eval mode."""
        return self.logits(self.advance(ids_Bt, cache))
