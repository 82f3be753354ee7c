"""The one stopwatch of the benches."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def best(work: Callable[[], object], repeats: int, device: str, warm: int = 3) -> float:
    """Seconds of the fastest of `repeats` runs, after some that warm up (and compile, and capture)."""
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    took = []
    for i in range(repeats + warm):
        sync()
        began = time.perf_counter()
        work()
        sync()
        if i >= warm:
            took.append(time.perf_counter() - began)
    return min(took)
