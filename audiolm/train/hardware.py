"""Measurements of a GPU: rows of a forward pass that fit its memory, and the matmul rate that MFU is measured against."""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.benchmark import Timer

from audiolm.config.training import TrainConfig
from audiolm.train.engine import TorchEngine, all_sum, alone
from audiolm.train.objectives.base import Context, Objective

FREE_SHARE = 0.92  # of the memory is what a trial may use: later rows can be longer, and memory is cut into pieces
# torch's own error, the driver's, cuBLAS's and cuDNN's.
NO_MEMORY = re.compile("out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED")
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
    free, _ = torch.cuda.mem_get_info(ctx.device)
    room = int(FREE_SHARE * (free + torch.cuda.memory_reserved(ctx.device)))  # other processes may hold some
    # Stands in for the optimizer's state, which does not exist yet.
    ballast = torch.empty(STATE_BYTES * sum(p.numel() for m in objective.modules.values() for p in m.parameters()),
                          dtype=torch.uint8, device=ctx.device)
    torch.cuda.set_per_process_memory_fraction(FREE_SHARE)
    try:
        return largest(train, objective, ctx, share, room)
    finally:
        del ballast
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """The most bytes that tensors took on a GPU at once during `work`."""
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device)


def largest(train: TrainConfig, objective: Objective, ctx: Context, share: int, room: int,
            peak: Callable[[torch.device, Callable[[], object]], int] = peak_bytes) -> int:
    """The rows of an even part of the share with which no rank takes more than `room` bytes; all ranks take part.

    The peaks of 1 and 2 rows, without compiling, give the line that chooses; the choice is tried as it will run, and halved
    while it fails.  A try is the first step's forward and backward pass, before there are engines.  Weights, buffers and
    later steps are as if it had not been.  Raises OutOfMemoryError where one row does not fit.
    """
    modules = {name: module.to(ctx.device) for name, module in objective.modules.items()}
    before = {name: {k: v.to("cpu", copy=True) for k, v in m.state_dict().items()} for name, m in modules.items()}

    def tried(n: int, eager: bool = False) -> int | None:
        """The peak of a step in micro-batches of n rows, None where memory ran out."""
        stance = torch.compiler.set_stance("force_eager") if eager and ctx.compile else contextlib.nullcontext()
        with alone(), stance:  # ranks fail at different places: none may wait for another meanwhile
            found = _peak(train, objective, ctx, share, n, peak)
        for name, module in modules.items():
            module.zero_grad(set_to_none=True)
            module.load_state_dict(before[name])
        gc.collect()  # a compiler's error holds frames, and with them tensors
        if ctx.device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    def all_ranks(passed: list[bool]) -> list[bool]:
        """Which of the checks every rank passed."""
        return (all_sum(torch.tensor(passed, device=ctx.device).float()) == ctx.world).tolist()

    rows = share
    if share > 2:
        sizes = sorted({-(-share // k) for k in range(1, share + 1)})
        one, two = tried(1, eager=True), tried(2, eager=True)
        # Compiled, rows take less than measured: where not even two are measured, two are tried all the same.
        fits = [n == 1 or (n == 2 if None in (one, two) else one + (n - 1) * (two - one) <= room) for n in sizes]
        rows = max(n for n, fit in zip(sizes, all_ranks(fits), strict=True) if fit)
    while not all_ranks([(taken := tried(rows)) is not None and taken <= room])[0]:
        if rows == 1:
            raise torch.OutOfMemoryError("one row does not fit the GPU's memory: take a shorter crop_s, a smaller model or, on "
                                         f"several GPUs, train.zero 2 or 3 (it is {train.zero})")
        rows = -(-rows // 2)
    return rows


def _peak(train: TrainConfig, objective: Objective, ctx: Context, share: int, n: int,
          peak: Callable[[torch.device, Callable[[], object]], int]) -> int | None:
    """`peak` of one step of micro-batches of n rows, None where memory ran out.

    The exception is not kept: it would keep the tensors of its frames.
    """
    # Two micro-batches where there are as many: the second runs beside the first one's gradients.
    first, stop = ctx.rank * share, ctx.rank * share + min(2 * n, share)
    batches = [objective.load(0, range(i, min(i + n, stop))) for i in range(first, stop, n)]
    engines = {name: _trial(m, train, ctx) for name, m in objective.modules.items()}
    try:
        return peak(ctx.device, lambda: objective.train_step(engines, batches, 0))
    except RuntimeError as e:
        if not out_of_memory(e):
            raise
    return None


def out_of_memory(error: BaseException | None) -> bool:
    """True for a GPU's memory that ran out, as torch, its compiler (which wraps errors), the driver and cuBLAS report it."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or NO_MEMORY.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
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
