"""Causal attention over rows that hold several documents; no document attends to another.

Dense, on any device: SDPA, causal alone where every row is one document, else with a mask.
Flash, for half precision on CUDA: one call over all documents of a batch.  Their bounds are counted on the CPU, before
the batch reaches the device, and padded to a few lengths: nothing waits for the device, nothing is compiled twice.
On a CPU a causal call for each document takes flash's place: with a mask all pairs of a row are computed.
Shapes: doc_BT int64, equal within a document of a row; q, k, v (B, T, H, E); bounds_N int32, the start of each document
in B x T, padded with B x T.
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import torch
from torch.nn import functional as F

# Bounds a row to begin with, doubled until all fit: few lengths, so few compiled graphs.  The kernels launch blocks for
# empty documents too, as many as for long ones, and the backward pass clears memory for each.
DOCUMENTS = 4
FLASH_WIDTH = 256  # of a head, at most: FlashAttention's limit (2307.08691)
FLASH = "_flash_attention_forward"  # the operator that torch.nn.attention.varlen calls
ARGUMENTS = ["query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal",
             "return_debug_mask"]  # those that `_flash` gives by place; later ones have defaults


class Documents(NamedTuple):
    """Layout of a batch's documents; all None where every row is one document."""

    positions_BT: torch.Tensor | None = None  # from 0 within each document
    doc_BT: torch.Tensor | None = None  # for dense attention
    bounds_N: torch.Tensor | None = None  # for flash


ALONE = Documents()


def takes_flash(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """True where batches may be laid out for flash: for heads of `width` channels that compute in `dtype` on `device`.

    Asked once, before the first batch.  Where it is False dense attention works, and one log line a process says why.
    """
    why = flash_refusal(device, dtype, width)
    if why:
        _warn(why)
    return not why


@functools.cache
def _warn(why: str) -> None:
    logging.getLogger(__name__).warning("dense attention with a mask, which is slower: %s", why)


def flash_refusal(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why `takes_flash` is False, or None."""
    if device.type == "cpu":  # documents one by one, in any type
        return None
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention takes bfloat16, not {dtype}: set train.dtype to bfloat16"
    if width % 8 or width > FLASH_WIDTH:
        return f"heads of dim / heads = {width} channels; flash attention takes a multiple of 8, at most {FLASH_WIDTH}"
    operator = getattr(torch.ops.aten, FLASH, None)
    arguments = operator.default._schema.arguments if operator else []
    n = len(ARGUMENTS)
    if [a.name for a in arguments[:n]] != ARGUMENTS or not all(a.has_default_value() for a in arguments[n:]):
        return f"torch {torch.__version__} has no aten.{FLASH}({', '.join(ARGUMENTS)})"
    return _trial(device, dtype, width)


def _trial(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """The error of one forward and backward pass: a build or a GPU may have no kernel for them."""
    q = torch.zeros(8, 1, width, device=device, dtype=dtype, requires_grad=True)
    bounds_N = torch.tensor([0, 3, 8, 8], dtype=torch.int32, device=device)
    try:
        with torch.enable_grad():
            _flash(q, q, q, bounds_N, 8).sum().backward()
    except RuntimeError as e:
        return f"{device} refuses flash attention: {str(e).partition(chr(10))[0]}"
    return None


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
    return _flash(q, k, v, bounds_N, T).view(B, T, H * E)


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds_N: torch.Tensor, longest: int) -> torch.Tensor:
    """(B x T, H, E) of documents of at most `longest` tokens.

    torch.nn.attention.varlen is not called: after torch 2.10 its argument is_causal became window_size, while the
    operator's first ten arguments are the same from 2.5 to 2.13.
    """
    # Queries and keys have the same bounds; 0.0: no dropout, True: causal, False: no debug mask.
    return getattr(torch.ops.aten, FLASH).default(q, k, v, bounds_N, bounds_N, longest, longest, 0.0, True, False)[0]
