"""A CUDA graph in miniature, on a CPU: a step's operations, recorded and run again on the same tensors.

As with CUDA, capturing changes nothing, and what the host computed (numbers, shapes, slices) stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recording(TorchDispatchMode):
    """Operations with their arguments and outputs; views need no second run, as they share their memory."""

    def __init__(self):
        super().__init__()
        self.operations: list[tuple[Callable, tuple, dict, Any]] = []
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []  # what was written to, and what it held

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func is not torch.ops.aten._local_scalar_dense.default, "a graph cannot read a number from the device"
        if func._schema.is_mutable:
            written = [x for x, a in zip(args, func._schema.arguments, strict=False) if a.alias_info and a.alias_info.is_write]
            self.before += [(x, x.clone()) for x in written]
            out = func(*args, **kwargs)
            self.operations.append((func, args, kwargs, None))
            return out
        out = func(*args, **kwargs)
        inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        if not any(x.untyped_storage().data_ptr() in inputs for x in tree_leaves(out)):
            self.operations.append((func, args, kwargs, out))
        return out


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """The replay of a step, which is not yet run."""
    recording = Recording()
    with recording:
        step()
    for x, old in reversed(recording.before):
        x.copy_(old)

    def replay() -> None:
        for func, args, kwargs, out in recording.operations:
            again = func(*args, **kwargs)
            if out is not None:
                for x, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    x.copy_(new)

    return replay
