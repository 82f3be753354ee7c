"""Precision of float32 work on a GPU, where TF32 keeps 10 bits of a product's factors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_tf32() -> Iterator[None]:
    """Convolutions and products of float32 in float32, whatever the process chose; that is restored at the end.

    Rounded latents get other codes: with cuDNN's default, 8 % of a SoundStream's codes of level 12 changed.
    """
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed
