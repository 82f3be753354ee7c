"""Attention maps of a Transformer, layer by layer, computed again beside the training path.

Shapes: ids_T int64 of one document, cond_TC what is added to them (models.lm.transformer); share_TT float32, the attention of
query i to keys j <= i averaged over heads, whose rows sum to 1; h_TD, a layer's output (normed, the last one equals
`Transformer.hidden`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from audiolm.models.lm.transformer import Transformer


@torch.no_grad()
def attention_maps(model: Transformer, ids_T: torch.Tensor,
                   cond_TC: torch.Tensor | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(share_TT, h_TD) of each layer of a model in eval mode. Heads are computed one at a time, to bound memory."""
    T, rope = len(ids_T), None
    bias_HTT = torch.full((T, T), -torch.inf, device=ids_T.device).triu(1).expand(model.heads, -1, -1)
    if model.bias is None:
        rope = tuple(x[None, :, None, None] for x in model._rope_table(torch.arange(T, device=ids_T.device)))
    else:
        bias_HTT = model.bias(T)
    h_BTD = model._embed(ids_T[None], None if cond_TC is None else cond_TC[None], None)
    for block in model.blocks:
        mean_TT, values = torch.zeros(T, T, device=ids_T.device), []
        for q_TE, k_TE, v_TE, bias_TT in zip(*(x[0].unbind(1) for x in block.project(h_BTD, rope)), bias_HTT, strict=True):
            share_TT = ((q_TE @ k_TE.T).float() * q_TE.shape[1] ** -0.5 + bias_TT).softmax(-1)
            mean_TT += share_TT / model.heads
            values.append(share_TT.to(v_TE.dtype) @ v_TE)
        h_BTD = h_BTD + block.out(torch.cat(values, 1)[None])
        h_BTD = h_BTD + block.feed(h_BTD)
        yield mean_TT, h_BTD[0]
