"""Part (b): a training step of the three stages and of the parallel decoder at 12 x 1024, under both engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

from tests.bench.figures import Figure
from tests.bench.lm import Setting, matmul_rate, training


def items(device: str, tiny: bool) -> dict[str, Callable[[], Iterator[Figure]]]:
    s = Setting(device=device, paper=not tiny, repeats=1 if tiny else 5)
    rate = lru_cache(lambda: matmul_rate(device))
    rows = [("semantic", "torch", "flat"), ("coarse", "torch", "flat"), ("semantic", "deepspeed", "flat"),
            ("parallel", "torch", "flat"), ("fine", "torch", "flat"), ("coarse", "torch", "frame"),
            ("coarse", "deepspeed", "flat")]
    return {f"train {name}, {kind}, {engine}": lambda name=name, engine=engine, kind=kind:
            training(name, s, rate(), engine, kind) for name, engine, kind in rows}
