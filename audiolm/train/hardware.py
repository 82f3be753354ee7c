"""Measurements of a GPU: rows of a forward pass that fit its memory, and the matmul rate that MFU is measured against."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.benchmark import Timer

from audiolm.config.training import TrainConfig
from audiolm.train.engine import TorchEngine, all_sum, alone
from audiolm.train.objectives.base import Context, Objective

FREE_SHARE = 0.92  # of the memory is what a trial may use: later rows can be longer, and memory is cut into pieces
STATE_BYTES = 12  # a parameter: two moments and a gradient buffer that an engine keeps, besides the trial's own


def micro_batch(train: TrainConfig, objective: Objective, ctx: Context) -> int:
    """Rows a forward pass of this rank; all ranks take part.

    `auto` tries on a GPU, for objectives of one module (a codec's first step says little of its later ones); elsewhere
    it is the rank's share.
    """
    share = train.batch // ctx.world
    if train.micro_batch != "auto":
        return min(train.micro_batch or share, share)
    if ctx.device.type != "cuda" or len(objective.modules) > 1:
        return share
    # Stands in for the optimizer's state, which does not exist yet.
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
    """The largest of share, share/2, ... rows with which no rank runs out of memory; all ranks take part.

    Each try is the first step's forward and backward pass, before there are engines.  Weights, buffers and later steps
    are as if it had not been.  Raises OutOfMemoryError where one row does not fit.
    """
    modules = {name: module.to(ctx.device) for name, module in objective.modules.items()}
    before = {name: {k: v.to("cpu", copy=True) for k, v in m.state_dict().items()} for name, m in modules.items()}
    first, rows = ctx.rank * share, share
    while True:
        # Two micro-batches where there are as many: the second runs beside the first one's gradients.
        failed = _out_of_memory(train, objective, ctx, range(first, first + min(2 * rows, share)), rows)
        for name, module in modules.items():
            module.zero_grad(set_to_none=True)
            module.load_state_dict(before[name])
        # All ranks take the same size, the one that the fullest GPU can hold.
        if not float(all_sum(torch.tensor(float(failed), device=ctx.device))):
            return rows
        if rows == 1:
            raise torch.OutOfMemoryError("one row does not fit the GPU's memory: take a shorter crop_s, a smaller model or, on "
                                         f"several GPUs, train.zero 2 or 3 (it is {train.zero})")
        rows = -(-rows // 2)


def _out_of_memory(train: TrainConfig, objective: Objective, ctx: Context, rows: range, n: int) -> bool:
    """Tries one step of micro-batches of n rows. The exception is not kept: it would keep the tensors of its frames."""
    batches = [objective.load(0, rows[i:i + n]) for i in range(0, len(rows), n)]
    try:
        with alone():  # ranks fail at different places: none may wait for another meanwhile
            objective.train_step({name: _trial(m, train, ctx) for name, m in objective.modules.items()}, batches, 0)
    except torch.OutOfMemoryError:
        return True
    finally:
        if ctx.device.type == "cuda":
            torch.cuda.empty_cache()
    return False


def _trial(module: nn.Module, train: TrainConfig, ctx: Context) -> TorchEngine:
    """An engine that computes gradients and changes no weight."""
    engine = TorchEngine(module, train, ctx, None, 0)
    engine.step = lambda: torch.zeros((), device=ctx.device)
    return engine


def matmul_rate(device: torch.device, n: int = 8192, repeats: int = 16) -> float:
    """Floating-point operations a second of bfloat16 matrix products on a GPU, measured in a fraction of a second."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    timer = Timer("a @ b", globals={"a": a, "b": b})  # warms up, and waits for the GPU's queue
    return 2 * n**3 / timer.timeit(repeats).mean
