"""A backbone over frames and a depth network over their codes (RQ-Transformer, 2203.01941; Moshi, 2410.00037, 3.4).

The probability of a frame is the flat stage's product over its codes.  A position of the backbone is a prefix id or a
whole frame, the sum of its codes' embeddings; its output is what the depth network reads at every level of the next frame.
Shapes: ids_BT, docs, index_SN, label_SN, nats_SN, cond_BTC as models.lm.transformer, cond_BTC with the other codes of a
frame (lm.frames); S slots; D and d the widths of backbone and depth network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from audiolm.models.lm.attention import Documents
from audiolm.models.lm.block import TransformerSizes, pad_rows
from audiolm.models.lm.depth import DepthNetwork, DepthSizes
from audiolm.models.lm.transformer import Transformer


@dataclass(frozen=True)
class FrameSizes:
    """Architecture of both networks. The backbone has no heads."""

    backbone: TransformerSizes
    depth: DepthSizes


class FrameTransformer(nn.Module):
    """Backbone over frames, depth network over the slots of a frame."""

    def __init__(self, sizes: FrameSizes):
        super().__init__()
        self.sizes, self.dim, self._compiled = sizes, sizes.backbone.dim, None
        self.backbone, self.depth = Transformer(sizes.backbone), DepthNetwork(sizes.depth)

    def forward(self, ids_BT: torch.Tensor, docs: Documents, index_SN: torch.Tensor, label_SN: torch.Tensor,
                cond_BTC: torch.Tensor | None = None, length_BT: None = None,
                uniform_NS: torch.Tensor | None = None) -> torch.Tensor:
        """nats_SN of the targets (models.lm.heads), N over B x T; a frame is predicted at one place, so index_SN's rows are
        equal where there are targets. With `uniform_NS`, numbers in 0..1: codes_NS that the model draws there instead."""
        if uniform_NS is not None:  # in a forward pass, since ZeRO 3 has the weights together in these alone
            h_ND = self.backbone.hidden(ids_BT, docs, cond_BTC).flatten(0, 1)[index_SN[0]]
            return self.depth.drawn(h_ND, uniform_NS)
        nats = self._compiled if self._compiled and self.training else self._nats
        return nats(ids_BT, docs, index_SN, label_SN, cond_BTC)

    def _nats(self, ids_BT, docs, index_SN, label_SN, cond_BTC) -> torch.Tensor:
        h_ND = self.backbone.hidden(ids_BT, docs, cond_BTC).flatten(0, 1)[index_SN[0]]
        return self.depth.nats(h_ND, label_SN)

    def compile_training(self, backend: str = "inductor") -> None:
        """As models.lm.transformer."""
        torch._dynamo.config.recompile_limit = 64
        self._compiled = torch.compile(self._nats, backend=backend, dynamic=False)

    def compile_sampling(self, backend: str = "inductor") -> None:
        """As models.lm.transformer, of both networks."""
        self.backbone.compile_sampling(backend)
        self.depth.compile_sampling(backend)

    def flops_per_token(self, length: int) -> float:
        """Training FLOPs a position on rows of `length` positions; as if each predicted a frame."""
        return self.backbone.flops_per_token(length) + self.depth.flops_per_frame()

    def fold_tied(self) -> None:
        """As models.lm.transformer, of both networks."""
        self.backbone.fold_tied()
        self.depth.fold_tied()

    def draw_frame(self, h_BD: torch.Tensor, draw: Callable[[int, torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        """code_B of each slot, drawn one after another: code_B = draw(slot, scores_BV).

        h_BD as the backbone's `advance` returns it.
        """
        read_Rd, codes = self.depth.read(pad_rows(h_BD, self.backbone.rows)), []
        before_Rd = torch.zeros_like(read_Rd)
        for slot in range(self.sizes.depth.slots):
            codes.append(draw(slot, self.depth.scores(read_Rd, before_Rd, slot)[:len(h_BD)]))
            before_Rd[:len(h_BD)] += self.depth.embedded(codes[-1], slot)
        return codes
