"""The parallel acoustic decoder (SoundStorm, 2305.09636): a bidirectional Conformer that fills in masked codes.

A frame at 50 Hz is a set of ids: its semantic id, or the id of no condition, and of each level a code or the level's mask.
Their embeddings are added up and normalised; a head for each level scores its codes.
Ids: semantic, the codes of each level, no condition, a mask for each level.
Shapes: ids_BTC int64, C = 1 + Q ids of a frame; doc_BT int64, the document of a frame, -1 for padding; index_SN, label_SN,
nats_SN as models.lm.heads, a slot a level.  No document sees another: frames attend within theirs, and at least
conv_kernel // 2 frames of padding part two of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from audiolm.models.conformer import Block, EncoderSizes
from audiolm.models.lm.heads import LevelHeads
from audiolm.models.lm.tied import READ_STD, TiedCodes, embedding_table, fold_tables, head_tables
from audiolm.models.positions import rope_table
from audiolm.models.stream import LayerNorm, to_stream


@dataclass(frozen=True)
class ParallelSizes:
    """Architecture of a decoder: k semantic ids, `levels` of `vocab` codes; code_width: of the vectors tied to, 0: untied."""

    k: int
    vocab: int
    levels: int
    dim: int
    layers: int
    heads: int
    ff: int
    conv_kernel: int
    dropout: float
    code_width: int = 0

    def __post_init__(self):
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"lm.parallel.dim ({self.dim}) must be an even multiple of heads ({self.heads}), for rotary "
                             "positions")
        if self.conv_kernel % 2 == 0:
            raise ValueError(f"lm.parallel.conv_kernel ({self.conv_kernel}) must be odd, so that a frame stays in place")


class ParallelDecoder(nn.Module):
    """Embeddings, Conformer blocks, one output head a level."""

    def __init__(self, sizes: ParallelSizes):
        super().__init__()
        s = self.sizes = sizes
        self.embed = nn.Embedding(s.k + s.levels * s.vocab + 1 + s.levels, s.dim)
        self.norm, self.drop = LayerNorm(s.dim), nn.Dropout(s.dropout)
        block = EncoderSizes(s.dim, s.layers, s.heads, s.ff, s.conv_kernel, s.dropout)
        self.blocks = nn.ModuleList(Block(block) for _ in range(s.layers))
        self.head = LevelHeads(s.dim, [s.vocab] * s.levels)
        self.tied = TiedCodes(s.levels, s.vocab, s.code_width, s.levels, s.dim) if s.code_width else None
        nn.init.normal_(self.embed.weight, std=READ_STD if self.tied else 0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        if self.tied:  # free terms beside the tied ones start at zero
            nn.init.zeros_(self.embed.weight[s.k:s.k + s.levels * s.vocab])
            nn.init.zeros_(self.head.weight)

    def forward(self, ids_BTC: torch.Tensor, doc_BT: torch.Tensor, index_SN: torch.Tensor,
                label_SN: torch.Tensor) -> torch.Tensor:
        """nats_SN of the targets, places over B x T; 0 where there is none."""
        h_ND = self.hidden(ids_BTC, doc_BT).flatten(0, 1)
        return self.head(h_ND, index_SN, label_SN, tables=head_tables(self.head, self.tied))

    def hidden(self, ids_BTC: torch.Tensor, doc_BT: torch.Tensor) -> torch.Tensor:
        """h_BTD, the input of the heads; meaningless for padding."""
        table_VD = embedding_table(self.embed, self.tied, self.sizes.k)
        x_BTD = F.embedding_bag(ids_BTC.flatten(0, 1), table_VD, mode="sum").unflatten(0, doc_BT.shape)
        x_BTD = self.drop(self.norm(to_stream(x_BTD)))
        mask_B1TT = (doc_BT[:, :, None] == doc_BT[:, None])[:, None]
        rope = rope_table(torch.arange(doc_BT.shape[1], device=doc_BT.device), self.sizes.dim // self.sizes.heads)
        for block in self.blocks:
            x_BTD = block(x_BTD, doc_BT >= 0, rope, mask_B1TT)
        return x_BTD

    def scores(self, h_BTD: torch.Tensor, level: int) -> torch.Tensor:
        """scores_BTV float32 of a level's codes."""
        weight_VD, bias_V = head_tables(self.head, self.tied)[level]
        scores_BTV = F.linear(h_BTD, weight_VD).float()
        return scores_BTV if bias_V is None else scores_BTV + bias_V.float()

    def fold_tied(self) -> None:
        """Turns tied tables into plain ones, for sampling."""
        if self.tied:
            fold_tables(self.embed, self.head, self.tied, self.sizes.k)
            self.tied = None

    def flops_per_frame(self, length: int) -> float:
        """Training FLOPs a frame in documents of `length` frames: 6 N + 12 layers x dim x length; N as of the Transformer."""
        weights = sum(p.numel() for p in self.blocks.parameters() if p.ndim > 1) + self.sizes.vocab * self.sizes.dim
        return 6.0 * weights + 12.0 * len(self.blocks) * self.sizes.dim * length
