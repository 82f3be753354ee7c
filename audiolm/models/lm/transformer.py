"""The decoder-only Transformer of all three stages (paper III-C, IV-B): pre-norm, rotary or T5 positions, no biases.

Shapes: ids_BT int64; docs of models.lm.attention: documents of a row never attend to each other and their positions start at
0; h_BTD; scores over the ids of a slot (models.lm.heads).  cond_BTC: ids whose embeddings are added to the one at their place;
length_BT: frames that an id lasts (models.lm.run_lengths); added_BTD: vectors that are added to the embeddings.
`advance` with a cache equals `hidden` up to rounding; rows of a batch may have different lengths.
On a CPU single tokens run in rows of 8 and keys in runs of 64, so a row's bits do not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from audiolm.models.lm.attention import ALONE, Documents, mask_of
from audiolm.models.lm.block import ROWS, Block, TransformerSizes, norm, pad_rows
from audiolm.models.lm.cache import KEYS, KVCache, places
from audiolm.models.lm.heads import LevelHeads, Table
from audiolm.models.lm.run_lengths import RunLengths
from audiolm.models.lm.tied import READ_STD, TiedCodes, embedding_table, fold_tables, head_tables
from audiolm.models.positions import RelativePositionBias, Rope, rope_table
from audiolm.models.stream import to_stream

RECOMPILES = 256  # of a layer's step: stages x rows x runs of keys; torch goes on uncompiled beyond its limit


class Transformer(nn.Module):
    """Embedding, blocks, final norm and one output head a slot."""

    def __init__(self, sizes: TransformerSizes):
        super().__init__()
        s = self.sizes = sizes
        self.vocab, self.dim, self.heads, self.dropout = s.vocab, s.dim, s.heads, s.dropout
        self.checkpointing, self._compiled = False, None  # of the training pass alone
        self.rows = ROWS  # single tokens run in multiples of it on a CPU; 1 is faster, but a row's bits depend on its batch
        self.embed = nn.Embedding(s.vocab, s.dim)
        self.bias = RelativePositionBias(s.heads) if s.positions == "t5" else None
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = norm(s)
        slots = (s.vocab,) if s.slots is None else s.slots
        self.head = LevelHeads(s.dim, slots) if slots else None
        self.lengths = RunLengths(s.vocab, s.dim, s.run) if s.run else None
        self.tied = TiedCodes(*s.tied[:3], len(slots), s.dim) if s.tied else None
        for name, p in self.named_parameters():
            if p.ndim == 2:
                # residual branches shrink with depth, so that the sum over 2 x layers of them keeps its scale
                deep = (2 * s.layers) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                # 0.02 as GPT-2 for embeddings and heads; other weights keep the variance of their input
                small = name.endswith(("embed.weight", "head.weight", "bias.table"))
                nn.init.normal_(p, std=0.02 if small else deep * p.shape[1] ** -0.5)
        if self.lengths:  # an id's length depends on the id first: features that a few steps can use
            nn.init.normal_(self.lengths.given.weight)
        if self.tied:  # free terms beside the tied ones start at zero
            levels, vocab, _, first = s.tied
            nn.init.normal_(self.embed.weight, std=READ_STD)
            nn.init.zeros_(self.embed.weight[first:first + levels * vocab])
            if self.head:
                nn.init.zeros_(self.head.weight)

    def forward(self, ids_BT: torch.Tensor, docs: Documents = ALONE, index_SN: torch.Tensor | None = None,
                label_SN: torch.Tensor | None = None, cond_BTC: torch.Tensor | None = None,
                length_BT: torch.Tensor | None = None) -> torch.Tensor:
        """nats_SN of the targets (models.lm.heads), N over B x T; without targets the scores (B, T, ids), slots side by side.

        Entry t predicts ids_BT[:, t + 1] from the ids up to t of the same document. Run lengths are the last row of SN.
        """
        if label_SN is None:
            h_BTD = self.hidden(ids_BT, docs, cond_BTC, length_BT)
            return torch.cat([F.linear(h_BTD, *table) for table in self._heads()], -1)
        nats = self._compiled if self._compiled and self.training else self._nats
        return nats(ids_BT, docs, index_SN, label_SN, cond_BTC, length_BT)

    def _nats(self, ids_BT, docs, index_SN, label_SN, cond_BTC, length_BT) -> torch.Tensor:
        h_ND = self.hidden(ids_BT, docs, cond_BTC, length_BT).flatten(0, 1)
        if self.lengths is None:
            return self.head(h_ND, index_SN, label_SN, tables=self._heads())
        nats_SN, at_N = self.head(h_ND, index_SN[:-1], label_SN[:-1]), index_SN[-1]
        next_N = ids_BT.flatten()[(at_N + 1).clamp_max(ids_BT.numel() - 1)]  # the last place has no target
        return torch.cat([nats_SN, self.lengths.nats(h_ND[at_N], next_N, label_SN[-1])[None]])

    def compile_training(self, backend: str = "inductor") -> None:
        """Compiles the training pass, for shapes that stay the same; evaluation, whose shapes vary, stays as it is."""
        torch._dynamo.config.recompile_limit = 64  # one graph for each number of rows that the loop tries
        self._compiled = torch.compile(self._nats, backend=backend, dynamic=False)

    def compile_sampling(self, backend: str = "inductor") -> None:
        """Compiles a layer's step over single tokens, once for each number of rows and of keys, and each length of cache."""
        torch._dynamo.config.recompile_limit = RECOMPILES
        for block in self.blocks:  # of one class and shape: they share what is compiled
            block.compiled = torch.compile(block.step, backend=backend, dynamic=False)

    def flops_per_token(self, length: int) -> float:
        """Training FLOPs a token on rows of `length` tokens: 6 N + 6 layers x dim x length, for causal attention.

        N counts the weights of matrix products, of the heads one slot's; recomputation by checkpointing does not count.
        """
        weights = sum(p.numel() for p in self.blocks.parameters() if p.ndim == 2)
        weights += max(self.head.sizes) * self.dim if self.head else 0
        return 6.0 * weights + 6.0 * len(self.blocks) * self.dim * length

    def _table(self) -> torch.Tensor:
        """Embeddings of all ids."""
        return embedding_table(self.embed, self.tied, self._first_code)

    def _heads(self) -> list[Table]:
        """Each slot's table."""
        return head_tables(self.head, self.tied)

    @property
    def _first_code(self) -> int:
        """Id of the first code that tied tables have."""
        return self.sizes.tied[3] if self.sizes.tied else 0

    def fold_tied(self) -> None:
        """Turns tied tables into plain ones, so that a token costs a lookup: for sampling, not for training."""
        if self.tied:
            fold_tables(self.embed, self.head, self.tied, self._first_code)
            self.tied = None

    def _embed(self, ids: torch.Tensor, cond: torch.Tensor | None, length: torch.Tensor | None,
               added: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T, D) of ids (B, T), conditions (B, T, C), lengths (B, T) and added vectors."""
        table = self._table()
        h = F.embedding(ids, table)
        if cond is not None:
            bag = F.embedding_bag(cond.flatten(0, 1), table, mode="sum", padding_idx=self.sizes.no_cond)
            h = h + bag.view_as(h)
        if added is not None:
            h = h + added
        return h if length is None else h + self.lengths.embed(length)

    def hidden(self, ids_BT: torch.Tensor, docs: Documents = ALONE, cond_BTC: torch.Tensor | None = None,
               length_BT: torch.Tensor | None = None, added_BTD: torch.Tensor | None = None) -> torch.Tensor:
        """h_BTD, the input of the heads. Raises ValueError for T5 positions on documents that were laid out for flash."""
        # Positions are rotary angles or a bias that joins the document mask; flash takes documents by their bounds.
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
            # rows begin at multiples of 8, else a GPU's kernel copies the mask in each layer
            mask = F.pad(mask, (0, -T % 8))[..., :T]
        h_BTD = to_stream(self._embed(ids_BT, cond_BTC, length_BT, added_BTD))
        h_BTD = F.dropout(h_BTD, self.dropout, self.training)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():  # keeps a block's input alone, runs it again backwards
                h_BTD = checkpoint(block, h_BTD, rope, mask, docs.bounds_N, use_reentrant=False)
            else:
                h_BTD = block(h_BTD, rope, mask, docs.bounds_N)
        return self.norm(h_BTD)

    def _rope_table(self, positions: torch.Tensor) -> Rope:
        cos, sin = rope_table(positions, self.dim // self.heads)
        dtype = self.embed.weight.dtype  # angles in float32, rounded once
        return cos.to(dtype), sin.to(dtype)

    def cache(self, batch: int, length: int, device: torch.device | str | None = None,
              dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for `batch` rows of at most `length` tokens; device and dtype default to the weights'."""
        device, dtype = device or self.embed.weight.device, dtype or self.embed.weight.dtype
        # whole runs of KEYS, which `KVCache.keys` reads
        shape = (batch, self.heads, -(-length // KEYS) * KEYS, self.dim // self.heads)
        kv = [torch.zeros(2, *shape, device=device, dtype=dtype) for _ in self.blocks]
        number_N = torch.arange(max(batch, shape[2]), device=device)
        rope = None if self.bias else torch.stack(self._rope_table(number_N[:shape[2]]), 1)
        return KVCache(kv, torch.zeros(batch, dtype=torch.int64, device=device), number_N, rope)

    def advance(self, ids_Bt: torch.Tensor, cache: KVCache, cond_BtC: torch.Tensor | None = None,
                length_Bt: torch.Tensor | None = None, added_BtD: torch.Tensor | None = None) -> torch.Tensor:
        """Appends t >= 1 tokens to each row; returns h_BtD. Use under torch.no_grad() and in eval mode.

        Raises ValueError where the cache is full.
        """
        t = ids_Bt.shape[1]
        at = places(cache, t, self.bias)
        h = self._embed(ids_Bt, cond_BtC, length_Bt, added_BtD)
        if t == 1:
            h = pad_rows(h, self.rows)
            at.room = torch.zeros_like(h) if len(h) > len(ids_Bt) else None
        for block, kv in zip(self.blocks, cache.kv, strict=True):
            step = block.compiled if block.compiled and t == 1 else block.step
            h = step(h, kv, at)
        cache.lengths_B += t
        cache.longest += t
        return self.norm(h)[:len(ids_Bt)]

    def scores(self, h_BD: torch.Tensor, slots: Sequence[int] | None) -> torch.Tensor:
        """Scores float32 of one token a row, as models.lm.heads has them; on a CPU as `advance`."""
        return self.head.scores(pad_rows(h_BD, self.rows), slots)[:len(h_BD)]


def _dtype(weight: torch.Tensor) -> torch.dtype:
    """The type that products are computed in: autocast's where it is on."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
