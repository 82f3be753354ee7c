"""What a GPU can take and do: rows of a forward pass that fit, and the matmul rate that MFU is measured against."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from audiolm.config.training import TrainConfig
from audiolm.train.engine import all_sum, alone
from audiolm.train.objectives.base import Context, Objective

FREE_SHARE = 0.92  # of the memory is what a trial may use: later rows can be longer, and memory is cut into pieces
STATE_BYTES = 12  # a parameter, of moments and gradients that an engine keeps besides the trial's own


def micro_batch(train: TrainConfig, objective: Objective, ctx: Context) -> int:
    """Rows a forward pass of this rank; all ranks take part. `auto` tries on a GPU, for objectives of one module (a codec's
    first step says little of its later ones); it is the rank's share elsewhere."""
    share = train.batch // ctx.world
    if train.micro_batch != "auto":
        return min(train.micro_batch or share, share)
    if ctx.device.type != "cuda" or len(objective.modules) > 1:
        return share
    ballast = torch.empty(STATE_BYTES * sum(p.numel() for m in objective.modules.values() for p in m.parameters()),
                          dtype=torch.uint8, device=ctx.device)
    torch.cuda.set_per_process_memory_fraction(FREE_SHARE)
    try:
        return largest(train, objective, ctx, share)
    finally:
        del ballast
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)


def largest(train: TrainConfig, objective: Objective, ctx: Context, share: int) -> int:
    """The largest of share, share/2, ... that no rank runs out of memory with, by its first step's forward and backward
    passes before there are engines. Weights, buffers and later steps are as if it had not been. All ranks take part."""
    modules = {name: module.to(ctx.device) for name, module in objective.modules.items()}
    before = {name: {k: v.to("cpu", copy=True) for k, v in m.state_dict().items()} for name, m in modules.items()}
    first, rows = ctx.rank * share, share
    while True:
        error = _try(train, objective, modules, ctx, range(first, first + min(2 * rows, share)), rows)
        for name, module in modules.items():
            module.zero_grad(set_to_none=True)
            module.load_state_dict(before[name])
        if not float(all_sum(torch.tensor(float(error is not None), device=ctx.device))):
            return rows
        if rows == 1:
            raise torch.OutOfMemoryError("one row does not fit the GPU's memory: take a shorter crop_s, a smaller model or, on "
                                         f"several GPUs, train.zero 2 or 3 (it is {train.zero})")
        rows = -(-rows // 2)


def _try(train: TrainConfig, objective: Objective, modules: dict[str, nn.Module], ctx: Context, rows: range, n: int) -> str | None:
    """What it failed with for want of memory; text, since a kept exception would keep the tensors of its frames."""
    batches = [objective.load(0, rows[i:i + n]) for i in range(0, len(rows), n)]
    try:
        with alone():
            objective.train_step({name: _Trial(m, train, ctx) for name, m in modules.items()}, batches, 0)
    except torch.OutOfMemoryError as e:
        return str(e)
    finally:
        if ctx.device.type == "cuda":
            torch.cuda.empty_cache()
    return None


class _Trial:
    """An engine that computes gradients and changes no weight."""

    def __init__(self, module: nn.Module, train: TrainConfig, ctx: Context):
        self.module, self.train, self.ctx = module, train, ctx

    def __call__(self, *args) -> Any:
        with torch.autocast(self.ctx.device.type, torch.bfloat16, enabled=self.train.dtype == "bfloat16"):
            return self.module(*args)

    def backward(self, loss: torch.Tensor, last: bool = True) -> None:
        loss.backward()

    def step(self) -> torch.Tensor:
        return torch.zeros((), device=self.ctx.device)


def matmul_rate(device: torch.device, n: int = 8192, repeats: int = 16) -> float:
    """Floating-point operations a second of bfloat16 matrix products on a GPU, measured in a fraction of a second."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        a @ b
    torch.cuda.synchronize(device)
    return repeats * 2 * n**3 / (time.perf_counter() - began)
