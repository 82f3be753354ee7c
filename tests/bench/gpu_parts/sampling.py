"""Part (c): ids a second of the coarse stage, and continuations of 3 s by 7 s from sound to sound, alone and 32 at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

from tests.bench.figures import Figure
from tests.bench.generation import SECONDS, random_system, stage_rate, whole


def items(device: str, tiny: bool) -> dict[str, Callable[[], Iterator[Figure]]]:
    @lru_cache(maxsize=1)  # one system in memory at a time
    def system(kind: str):
        return random_system(device, kind, *(("scratch.yaml", 2) if tiny else ("paper.yaml",)))

    ids, repeats, seconds = (12, 1, 0.2) if tiny else (256, 3, SECONDS)
    made = {}
    for kind in ("flat", "frame"):
        for batch in (1, 2) if tiny else (1, 16, 64):
            made[f"sample {kind}, batch {batch}"] = lambda kind=kind, batch=batch: [
                stage_rate(system(kind), batch, ids, repeats)]
        for batch in (1,) if tiny else (1, 32):
            made[f"continue {kind}, batch {batch}"] = lambda kind=kind, batch=batch: whole(
                system(kind), batch, repeats, seconds)
    def compiled() -> list[Figure]:
        flat = system("flat")
        for name in ("semantic", "coarse", "fine"):
            flat._samplers[name].compile(*(("eager",) if tiny else ()))
        return [figure._replace(name=f"{figure.name}, compiled") for figure in (
            stage_rate(flat, 1, ids, repeats), *whole(flat, 1, repeats, seconds))]

    return made | {"compiled, batch 1": compiled}
