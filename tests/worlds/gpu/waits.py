"""Finds what a CPU would wait for a GPU for, without one: tensors on `meta` stand for a GPU's.

They have shapes and no values, so torch itself refuses whatever reads a value: `item`, `tolist`, `bool`, `.cpu()`, `nonzero`,
an index by a mask, `bincount`.  What it lets pass and a GPU would wait for, `Waits` and `Numbers` refuse: copies from memory
that is not page-locked, a mask or CPU numbers as an index, tensors of Python's numbers.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from audiolm.models import transfer

META, CPU = torch.device("meta"), torch.device("cpu")
MOVES = ("aten::_to_copy", "aten::to")
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class Waits(TorchDispatchMode):
    """Raises AssertionError at an operation for which the CPU would wait."""

    def __init__(self):
        super().__init__()
        self.locked: set[int] = set()  # memory of the tensors that would be page-locked
        self.reads: int | None = None  # copies to the CPU, counted from 0 where they are allowed; they hold zeros

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name
        # by name, as an operator's arguments have places of their own
        given = dict(zip([each.name for each in func._schema.arguments], args, strict=False)) | kwargs
        if name in MOVES and self.reads is not None and args[0].device == META and given.get("device") == CPU:
            self.reads += 1
            return torch.zeros(args[0].shape, dtype=given.get("dtype") or args[0].dtype)
        result = func(*args, **kwargs)
        if name in MOVES or name == "aten::copy_" and given["src"].ndim:
            self._check_copy(given.get("src", args[0]), result, given.get("non_blocking"))
        if name in INDEXED and args[0].device == META:
            for index in (i for i in args[1] if i is not None):
                assert index.device == META, f"{name}: an index on the CPU is copied, and waited for"
                assert index.dtype != torch.bool, f"{name}: a GPU is asked how many places a mask has"
        return result

    def _check_copy(self, source: torch.Tensor, result: torch.Tensor, non_blocking: bool | None) -> None:
        if source.device == CPU and result.device == META:
            assert non_blocking, "a copy that waits"
            assert source.untyped_storage().data_ptr() in self.locked, "a copy of memory that is not page-locked"


class Numbers(TorchFunctionMode):
    """Raises AssertionError where numbers of Python's become a tensor on `meta`, which no operator shows."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            made = func is torch.Tensor.new_tensor or not isinstance(args[0], torch.Tensor)
            assert result.device != META or not made, "a copy that waits: use torch.full or transfer.send"
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and args[0].device == META:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(i, list) for i in index), "a list of places is copied, and waited for"
        return result


@contextmanager
def no_waits(checked: bool = True) -> Iterator[Waits]:
    """Within the block the CPU may not wait for what is on `meta`; unchecked, copies to it may wait."""
    waits, autocast = Waits(), torch.autocast

    def pin(x: torch.Tensor, device: torch.device) -> torch.Tensor:
        if device == META and x.device.type == "cpu":
            waits.locked.add(x.untyped_storage().data_ptr())
        return x

    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as modes:
        for module in list(_users_of_pin()):
            patch.setattr(module, "pin", pin)
        # `meta` has no autocast: its dtypes are those of float32 training
        patch.setattr(torch, "autocast", lambda kind, *args, **options: contextlib.nullcontext() if kind == "meta"
                      else autocast(kind, *args, **options))
        for mode in (waits, Numbers()) if checked else ():
            modes.enter_context(mode)
        yield waits


@contextmanager
def reads() -> Iterator[Waits]:
    """As `no_waits`, but that copies to the CPU are counted instead of refused."""
    with no_waits() as waits:
        waits.reads = 0
        yield waits


def _users_of_pin():
    """The modules that hold `transfer.pin` by name."""
    return [m for name, m in sys.modules.items() if name.startswith("audiolm.") and getattr(m, "pin", None) is transfer.pin]
