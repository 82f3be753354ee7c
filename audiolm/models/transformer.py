"""The decoder-only Transformer of all three stages (paper III-C, IV-B): pre-norm, rotary or T5 positions, no biases.

Shapes: ids_BT int64; docs of models.attention: documents of a row never see each other and their positions start at 0;
h_BTD; scores over the ids of a slot (models.heads), one slot of `vocab` ids unless `slots` says otherwise.
`advance` with a cache gives the result of `hidden` up to rounding; rows of a batch may have different lengths.
On a CPU single tokens run in rows of 8 and keys in runs of 64, so that a row's bits do not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from audiolm.models.attention import ALONE, Documents, attend, mask_of
from audiolm.models.cache import KEYS, KVCache, Places, places
from audiolm.models.heads import LevelHeads
from audiolm.models.positions import RelativePositionBias, Rope, apply_rope, rope_table

ROWS = 8  # rows of a CPU matrix product while sampling; a product's rounding depends on its shape
EPS = 1e-5


def _norm(kind: str, dim: int) -> nn.Module:
    return nn.RMSNorm(dim, eps=EPS) if kind == "rms" else nn.LayerNorm(dim, eps=EPS, bias=False)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, ff: int, dropout: float, gated: bool, norm: str, activation: str):
        super().__init__()
        self.heads, self.gated, self.silu, self.dropout = heads, gated, activation == "silu", dropout
        self.compiled = None  # (project, feed), see Transformer.compile_sampling
        self.norm1 = _norm(norm, dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.norm2 = _norm(norm, dim)
        self.up = nn.Linear(dim, 2 * ff if gated else ff, bias=False)
        self.down = nn.Linear(ff, dim, bias=False)

    def feed(self, h: torch.Tensor) -> torch.Tensor:
        x = self.up(self.norm2(h))
        gate, x = x.chunk(2, -1) if self.gated else (x, None)
        a = F.silu(gate) if self.silu else F.gelu(gate, approximate="tanh")
        return self.down(a if x is None else a * x)

    def project(self, h_BTD: torch.Tensor, rope: Rope | None, rows: int | None = None) -> tuple[torch.Tensor, ...]:
        """q, k, v (B, T, H, E), of the first rows alone where the rest is padding; rope (B or 1, T, 1, 1, E)."""
        B, T, D = h_BTD.shape
        qkv = self.qkv(self.norm1(h_BTD)).view(B, T, 3, self.heads, D // self.heads)[:rows]
        qk = apply_rope(qkv[:, :, :2], *rope) if rope else qkv[:, :, :2]
        return qk[:, :, 0], qk[:, :, 1], qkv[:, :, 2]

    def forward(self, h_BTD: torch.Tensor, rope: Rope | None, mask: torch.Tensor | None, bounds_N: torch.Tensor | None):
        """mask and bounds as `attend` takes them."""
        a = self.out(attend(*self.project(h_BTD, rope), mask, bounds_N))
        h = h_BTD + F.dropout(a, self.dropout, self.training)
        return h + F.dropout(self.feed(h), self.dropout, self.training)

    def step(self, h_RtD: torch.Tensor, k_BHLE: torch.Tensor, v_BHLE: torch.Tensor, at: Places) -> torch.Tensor:
        """One layer over t new tokens of B rows (R >= B rows of h, the rest is padding); keeps their keys, values."""
        R, t, D = h_RtD.shape
        B, _, _, E = k_BHLE.shape
        project, feed = self.compiled if self.compiled and t == 1 else (self.project, self.feed)
        q, k, v = (x.transpose(1, 2) for x in project(h_RtD, at.rope, B))
        k_BHLE.view(-1, E).index_copy_(0, at.rows, k.reshape(-1, E))
        v_BHLE.view(-1, E).index_copy_(0, at.rows, v.reshape(-1, E))
        if at.seen is None:
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=at.bias, is_causal=at.bias is None)
        else:
            k, v = k_BHLE[:, :, :at.keys], v_BHLE[:, :, :at.keys]
            if t == 1:  # fused kernels: on a CPU sums are split by threads and batch, on a GPU one with a mask is slow
                scores = torch.matmul(q * E ** -0.5, k.transpose(2, 3)).float()
                scores = scores.masked_fill_(~at.seen, -torch.inf) if at.bias is None else scores + at.bias
                a = scores.softmax(-1).to(v.dtype) @ v
            else:
                a = F.scaled_dot_product_attention(q, k, v, attn_mask=at.seen if at.bias is None else at.bias)
        a = a.transpose(1, 2).reshape(B, t, D)
        h = h_RtD + self.out(F.pad(a, (0, 0, 0, 0, 0, R - B)) if R > B else a)
        return h + feed(h)


class Transformer(nn.Module):
    """`vocab` ids in; dim, ff in channels (`gated`: each of the two); `longest` distance in tokens, for t5.

    Raises ValueError where dim does not split into even heads, or t5 is not told the longest distance.
    """

    def __init__(self, vocab: int, dim: int, layers: int, heads: int, ff: int, dropout: float, *,
                 slots: Sequence[int] | None = None, positions: str = "rotary", longest: int = 0, gated: bool = False,
                 norm: str = "layer", activation: str = "gelu"):
        super().__init__()
        if dim % heads or (dim // heads) % 2:
            raise ValueError(f"dim ({dim}) must be an even multiple of heads ({heads}), for rotary positions")
        if positions == "t5" and longest < 1:
            raise ValueError(f"positions t5 need the longest distance, got longest {longest}: pass the stage's max_len")
        self.vocab, self.dim, self.heads, self.dropout = vocab, dim, heads, dropout
        self.checkpointing, self._compiled = False, None  # of the training pass alone
        self.embed = nn.Embedding(vocab, dim)
        self.bias = RelativePositionBias(heads, longest) if positions == "t5" else None
        self.blocks = nn.ModuleList(Block(dim, heads, ff, dropout, gated, norm, activation) for _ in range(layers))
        self.norm = _norm(norm, dim)
        self.head = LevelHeads(dim, slots or (vocab,))
        for name, p in self.named_parameters():
            if p.ndim == 2:
                # residual branches shrink with depth, so that the sum over 2 x layers of them keeps its scale
                deep = (2 * layers) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                small = name in ("embed.weight", "head.weight", "bias.table")
                nn.init.normal_(p, std=0.02 if small else deep * p.shape[1] ** -0.5)

    def forward(self, ids_BT: torch.Tensor, docs: Documents = ALONE, index_SN: torch.Tensor | None = None,
                label_SN: torch.Tensor | None = None) -> torch.Tensor:
        """nats_SN of the targets that models.heads describes, N counted over B x T; without them the scores (B, T, ids) of
        all slots side by side. Entry t predicts ids_BT[:, t + 1] from the ids up to t of the same document."""
        if label_SN is None:
            return F.linear(self.hidden(ids_BT, docs), self.head.weight)
        return (self._compiled if self._compiled and self.training else self._nats)(ids_BT, docs, index_SN, label_SN)

    def _nats(self, ids_BT, docs, index_SN, label_SN) -> torch.Tensor:
        return self.head(self.hidden(ids_BT, docs).flatten(0, 1), index_SN, label_SN)

    def compile_training(self, backend: str = "inductor") -> None:
        """Compiles the training pass, for shapes that stay the same; evaluation, whose shapes vary, stays as it is."""
        torch._dynamo.config.recompile_limit = 64  # one graph for each number of rows that is tried
        self._compiled = torch.compile(self._nats, backend=backend, dynamic=False)

    def compile_sampling(self, backend: str = "inductor") -> None:
        """Compiles what `advance` does with single tokens around the attention, for numbers of rows that stay the same."""
        for block in self.blocks:
            block.compiled = tuple(torch.compile(f, backend=backend, dynamic=False) for f in (block.project, block.feed))

    def flops_per_token(self, length: int) -> float:
        """Of training on rows of `length` tokens: 6 N + 6 layers x dim x length (causal attention), N the weights of matrix
        products; of the heads that of one slot. What activation checkpointing does again is not counted."""
        weights = sum(p.numel() for p in self.blocks.parameters() if p.ndim == 2) + max(self.head.sizes) * self.dim
        return 6.0 * weights + 6.0 * len(self.blocks) * self.dim * length

    def hidden(self, ids_BT: torch.Tensor, docs: Documents = ALONE) -> torch.Tensor:
        """h_BTD, what the heads score. Raises ValueError for T5 positions on documents that were laid out for flash."""
        T, rope, mask = ids_BT.shape[1], None, None
        if docs.doc_BT is not None:
            mask = mask_of(docs.doc_BT)
        if self.bias is None:
            positions = torch.arange(T, device=ids_BT.device)[None] if docs.positions_BT is None else docs.positions_BT
            rope = tuple(x[:, :, None, None] for x in self._rope_table(positions))
        elif docs.bounds_N is not None:
            raise ValueError("T5 positions need documents laid out for dense attention: documents(doc_BT, flash=False)")
        else:
            bias = self.bias(T)[None]
            mask = (bias if mask is None else bias.masked_fill(~mask, -torch.inf)).to(_dtype(self.embed.weight))
            mask = F.pad(mask, (0, -T % 8))[..., :T]  # rows begin at multiples of 8, else a GPU's kernel copies it each layer
        h_BTD = F.dropout(self.embed(ids_BT), self.dropout, self.training)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                h_BTD = checkpoint(block, h_BTD, rope, mask, docs.bounds_N, use_reentrant=False)
            else:
                h_BTD = block(h_BTD, rope, mask, docs.bounds_N)
        return self.norm(h_BTD)

    def _rope_table(self, positions: torch.Tensor) -> Rope:
        cos, sin = rope_table(positions, self.dim // self.heads)
        dtype = self.embed.weight.dtype  # computed exactly, rounded once
        return cos.to(dtype), sin.to(dtype)

    def cache(self, batch: int, length: int, device: torch.device | str | None = None,
              dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for `batch` rows of at most `length` tokens; device and dtype default to the weights'."""
        device, dtype = device or self.embed.weight.device, dtype or self.embed.weight.dtype
        shape = (batch, self.heads, -(-length // KEYS) * KEYS, self.dim // self.heads)
        k, v = ([torch.zeros(shape, device=device, dtype=dtype) for _ in self.blocks] for _ in range(2))
        rope = None if self.bias else self._rope_table(torch.arange(shape[2], device=device))
        return KVCache(k, v, torch.zeros(batch, dtype=torch.int64, device=device), rope)

    def advance(self, ids_Bt: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Appends t >= 1 tokens to each row; rerope h_BtD. Use under torch.no_grad() and in eval mode.

        Raises ValueError where the cache is full.
        """
        t = ids_Bt.shape[1]
        at = places(cache, t, self.bias)
        h = self.embed(ids_Bt)
        if t == 1 and h.device.type == "cpu":
            h = F.pad(h, (0, 0, 0, 0, 0, -len(h) % ROWS))
        for block, k, v in zip(self.blocks, cache.k, cache.v, strict=True):
            h = block.step(h, k, v, at)
        cache.lengths_B += t
        cache.longest += t
        return self.norm(h)[:len(ids_Bt)]

    def scores(self, h_BD: torch.Tensor, slots: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """scores_BW float32 of one token a row, in slot slots[b] (models.heads), with the same care for a CPU's rounding."""
        if h_BD.device.type == "cpu":
            h_BD = F.pad(h_BD, (0, 0, 0, -len(h_BD) % ROWS))
        return self.head.scores(h_BD, slots)


def _dtype(weight: torch.Tensor) -> torch.dtype:
    """What products are computed in."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
