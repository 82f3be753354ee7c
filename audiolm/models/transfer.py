"""Copies from the CPU to a GPU for which the CPU does not wait.

A copy from ordinary memory waits until the GPU has done all that it was given before; one from page-locked memory joins the
GPU's queue.
"""

from __future__ import annotations

import torch


def pin(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor in page-locked memory where `device` is a GPU, else the tensor itself."""
    return x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x


def send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; the CPU waits for nothing, and may drop x at once."""
    return pin(x, device).to(device, non_blocking=True)
