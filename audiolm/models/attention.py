"""Causal attention over rows that hold several documents; none sees another (DESIGN 1.8).

Dense, on any device: SDPA, causal alone where every row is one document, else with a mask.  Flash, for half precision on
CUDA: one call over all documents of a batch, whose bounds were counted before it reached the device, at a length that
stays the same, so that nothing waits for the device and nothing is compiled twice.
Shapes: doc_BT int64, equal within a document of a row; q, k, v (B, T, H, E); bounds_N int32, where in B x T each document
starts, filled up with B x T.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

DOCUMENTS = 16  # places a row for bounds, to start with; what needs more doubles them


class Documents(NamedTuple):
    """The documents of a batch; all None where every row is one."""

    positions_BT: torch.Tensor | None = None  # from 0 within each document
    doc_BT: torch.Tensor | None = None  # for dense attention
    bounds_N: torch.Tensor | None = None  # for flash


ALONE = Documents()


def documents(doc_BT: torch.Tensor, flash: bool = False) -> Documents:
    """Of rows on the CPU; the padding of a row is a document of its own."""
    if flash:
        return Documents(positions_of(doc_BT), None, _bounds(doc_BT))
    return Documents(positions_of(doc_BT), doc_BT, None)


def positions_of(doc_BT: torch.Tensor) -> torch.Tensor:
    """Positions that start at 0 with each document of a row."""
    at = torch.arange(doc_BT.shape[1], device=doc_BT.device).expand_as(doc_BT)
    return at - torch.where(_first(doc_BT), at, 0).cummax(1).values


def _first(doc_BT: torch.Tensor) -> torch.Tensor:
    first = torch.ones_like(doc_BT, dtype=torch.bool)
    first[:, 1:] = doc_BT[:, 1:] != doc_BT[:, :-1]
    return first


def _bounds(doc_BT: torch.Tensor) -> torch.Tensor:
    starts, room = _first(doc_BT).flatten().nonzero()[:, 0], DOCUMENTS * len(doc_BT)
    while room < len(starts):
        room *= 2
    bounds = torch.full((room + 1,), doc_BT.numel(), dtype=torch.int32)
    bounds[:len(starts)] = starts
    return bounds


def mask_of(doc_BT: torch.Tensor) -> torch.Tensor:
    """(B, 1, T, T): True where a query sees a key."""
    T = doc_BT.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=doc_BT.device).tril()
    return (causal & (doc_BT[:, :, None] == doc_BT[:, None, :]))[:, None]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
           bounds_N: torch.Tensor | None) -> torch.Tensor:
    """(B, T, H x E). `mask` (B or 1, H or 1, T, T) as SDPA takes it; without mask and bounds causal alone."""
    B, T, H, E = q.shape
    if bounds_N is None:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return a.transpose(1, 2).reshape(B, T, H * E)
    q, k, v = (x.reshape(B * T, H, E) for x in (q, k, v))
    # The operator below torch.nn.attention.varlen: the function itself changed its arguments from release to release.
    a = torch.ops.aten._flash_attention_forward(q, k, v, bounds_N, bounds_N, T, T, 0.0, True, False)[0]
    return a.view(B, T, H * E)
