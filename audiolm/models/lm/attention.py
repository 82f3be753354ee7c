"""Causal attention over rows that hold several documents; no document attends to another.

Dense, on any device: SDPA, causal alone where every row is one document, else with a mask.
Flash, for half precision on CUDA: one call over all documents of a batch.  Their bounds are counted on the CPU, before
the batch reaches the device, and padded to a few lengths: nothing waits for the device, nothing is compiled twice.
On a CPU a causal call for each document takes flash's place: with a mask all pairs of a row are computed.
Shapes: doc_BT int64, equal within a document of a row; q, k, v (B, T, H, E); bounds_N int32, the start of each document
in B x T, padded with B x T.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

DOCUMENTS = 16  # bounds a row to begin with, doubled until all fit: few lengths, so few compiled graphs


class Documents(NamedTuple):
    """Layout of a batch's documents; all None where every row is one document."""

    positions_BT: torch.Tensor | None = None  # from 0 within each document
    doc_BT: torch.Tensor | None = None  # for dense attention
    bounds_N: torch.Tensor | None = None  # for flash


ALONE = Documents()


def documents(doc_BT: torch.Tensor, flash: bool = False) -> Documents:
    """Layout of rows on the CPU, once a batch; the padding of a row is a document of its own."""
    if flash:
        return Documents(positions_of(doc_BT), None, _bounds(doc_BT))
    return Documents(positions_of(doc_BT), doc_BT, None)


def positions_of(doc_BT: torch.Tensor) -> torch.Tensor:
    """Positions that start at 0 with each document of a row."""
    at = torch.arange(doc_BT.shape[1], device=doc_BT.device).expand_as(doc_BT)
    # cummax carries the start of the current document forward: starts grow along a row
    return at - torch.where(_first(doc_BT), at, 0).cummax(1).values


def _first(doc_BT: torch.Tensor) -> torch.Tensor:
    first = torch.ones_like(doc_BT, dtype=torch.bool)
    first[:, 1:] = doc_BT[:, 1:] != doc_BT[:, :-1]
    return first


def _bounds(doc_BT: torch.Tensor) -> torch.Tensor:
    starts, room = _first(doc_BT).flatten().nonzero()[:, 0], DOCUMENTS * len(doc_BT)
    while room < len(starts):
        room *= 2
    # Unused bounds repeat the end: documents of no length, which cost nothing.
    bounds_N = torch.full((room + 1,), doc_BT.numel(), dtype=torch.int32)
    bounds_N[:len(starts)] = starts
    return bounds_N


def mask_of(doc_BT: torch.Tensor) -> torch.Tensor:
    """(B, 1, T, T): True where a query attends to a key."""
    T = doc_BT.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=doc_BT.device).tril()
    return (causal & (doc_BT[:, :, None] == doc_BT[:, None, :]))[:, None]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
           bounds_N: torch.Tensor | None) -> torch.Tensor:
    """Attention output (B, T, H x E). `mask` (B or 1, H or 1, T, T) as SDPA takes it; without mask and bounds causal."""
    B, T, H, E = q.shape
    if bounds_N is None:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return a.transpose(1, 2).reshape(B, T, H * E)
    q, k, v = (x.reshape(B * T, H, E) for x in (q, k, v))
    if q.device.type == "cpu":
        lengths = [n for n in bounds_N.diff().tolist() if n]
        each = zip(*(x.transpose(0, 1)[None].split(lengths, 2) for x in (q, k, v)), strict=True)
        a = torch.cat([F.scaled_dot_product_attention(*qkv, is_causal=True) for qkv in each], 2)
        return a.transpose(1, 2).reshape(B, T, H * E)
    # The operator below torch.nn.attention.varlen, because that function changed its arguments from release to release.
    # Queries and keys have the same bounds; 0.0: no dropout, True: causal, False: no debug mask.
    a = torch.ops.aten._flash_attention_forward(q, k, v, bounds_N, bounds_N, T, T, 0.0, True, False)[0]
    return a.view(B, T, H * E)
