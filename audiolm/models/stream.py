"""The residual stream under autocast: bfloat16 on a GPU, from the embeddings to the input of the heads.

Autocast computes products in bfloat16 and norms in float32, so that the stream and all that is kept of it for the backward
pass would be float32.  Here norms take and give the stream's type; their statistics stay float32 within the kernel, as do
parameters, scores and losses.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

DEVICES = {"cuda"}  # types of device; on others autocast alone decides


def to_stream(x: torch.Tensor) -> torch.Tensor:
    """x in the stream's type."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if _is_low(device) else x


def _is_low(device: str) -> bool:
    return device in DEVICES and torch.is_autocast_enabled(device)


class LayerNorm(nn.LayerNorm):
    """torch's, in the stream's type."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float32 or not _is_low(x.device.type):
            return super().forward(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """torch's, in the stream's type."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float32 or not _is_low(x.device.type):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
