"""RQ-Transformer (2203.01941; Moshi, 2410.00037, 3.4): a backbone over frames and a small depth network over their codes.

The probability of a frame is the flat stage's product over its codes.  A position of the backbone is a prefix id or a
whole frame, the sum of its codes' embeddings; its output is the depth network's input at every step of the next frame.
Step s also reads the code of slot s - 1, and its output goes to the head of slot s.
Shapes: ids_BT, docs, index_SN, label_SN, nats_SN, cond_BTC as models.lm.transformer, cond_BTC with the other codes of a
frame (lm.frames); N frames that are predicted; S slots; D and d the widths of backbone and depth network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from audiolm.models.lm.attention import ALONE, Documents
from audiolm.models.lm.block import TransformerSizes, pad_rows
from audiolm.models.lm.cache import KVCache
from audiolm.models.lm.transformer import Transformer


@dataclass(frozen=True)
class FrameSizes:
    """Architecture of both networks. The backbone has no heads; the depth network's ids are codes, level after level, and
    BEGIN, which is the last."""

    backbone: TransformerSizes
    depth: TransformerSizes


class FrameTransformer(nn.Module):
    """Backbone over frames, depth network over the slots of a frame."""

    def __init__(self, sizes: FrameSizes):
        super().__init__()
        self.sizes, self.dim, self._compiled = sizes, sizes.backbone.dim, None
        self.backbone, self.depth = Transformer(sizes.backbone), Transformer(sizes.depth)
        self.read = nn.Linear(sizes.backbone.dim, sizes.depth.dim, bias=False)
        # as small as an embedding: a step reads the frame and the code before it alike
        nn.init.normal_(self.read.weight, std=0.02 * sizes.backbone.dim ** -0.5)
        first_S = F.pad(torch.tensor(sizes.depth.slots).cumsum(0), (1, -1))
        self.register_buffer("first_S", first_S, persistent=False)  # id of each slot's code 0

    @property
    def begin(self) -> int:
        """The depth network's id before slot 0."""
        return self.sizes.depth.vocab - 1

    def forward(self, ids_BT: torch.Tensor, docs: Documents, index_SN: torch.Tensor, label_SN: torch.Tensor,
                cond_BTC: torch.Tensor | None = None, length_BT: None = None) -> torch.Tensor:
        """nats_SN of the targets (models.lm.heads), N over B x T; a frame is predicted at one place, so index_SN's rows are
        equal where there are targets."""
        nats = self._compiled if self._compiled and self.training else self._nats
        return nats(ids_BT, docs, index_SN, label_SN, cond_BTC)

    def _nats(self, ids_BT, docs, index_SN, label_SN, cond_BTC) -> torch.Tensor:
        h_ND = self.backbone.hidden(ids_BT, docs, cond_BTC).flatten(0, 1)[index_SN[0]]
        # an empty place reads code 0; nothing is counted there
        before_NS = F.pad((label_SN[:-1].clamp_min(0) + self.first_S[:-1, None]).T, (1, 0), value=self.begin)
        h_NSd = self.depth.hidden(before_NS, ALONE, added_BTD=self.read(h_ND)[:, None])
        S, N = label_SN.shape
        at_SN = torch.arange(S, device=h_ND.device)[:, None] + S * torch.arange(N, device=h_ND.device)
        return self.depth.head(h_NSd.flatten(0, 1), at_SN, label_SN, tables=self.depth._heads())

    def compile_training(self, backend: str = "inductor") -> None:
        """As models.lm.transformer."""
        torch._dynamo.config.recompile_limit = 64
        self._compiled = torch.compile(self._nats, backend=backend, dynamic=False)

    def compile_sampling(self, backend: str = "inductor") -> None:
        """As models.lm.transformer, of both networks."""
        for network in (self.backbone, self.depth):
            network.compile_sampling(backend)

    def flops_per_token(self, length: int) -> float:
        """Training FLOPs a position on rows of `length` positions; as if each predicted a frame."""
        slots = len(self.first_S)
        return (self.backbone.flops_per_token(length) + slots * self.depth.flops_per_token(slots)
                + 6.0 * self.read.weight.numel())

    def fold_tied(self) -> None:
        """As models.lm.transformer, of both networks."""
        for network in (self.backbone, self.depth):
            network.fold_tied()

    def draw_frame(self, h_BD: torch.Tensor, cache: KVCache,
                   draw: Callable[[int, torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        """code_B of each slot, drawn one after another: code_B = draw(slot, scores_BW).

        h_BD as the backbone's `advance` returns it; `cache`: of the depth network, for B rows, cleared here.
        """
        added_B1d = self.read(pad_rows(h_BD, self.backbone.rows))[:len(h_BD), None]
        id_B, codes = torch.full((len(h_BD),), self.begin, device=h_BD.device), []
        cache.clear()
        for slot, first in enumerate(self.first_S):
            h_Bd = self.depth.advance(id_B[:, None], cache, added_BtD=added_B1d)[:, 0]
            codes.append(draw(slot, self.depth.scores(h_Bd, [slot] * len(h_Bd))))
            id_B = codes[-1] + first
        return codes
