"""Rows that are drawn together, for every sampler: requests, groups, prompts.

Shapes: ids_T and cond_TC as lm.stages, of prompt and forced targets; rows of a group may have different lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from audiolm.generate.params import SamplingParams
from audiolm.lm.stages import Stage
from audiolm.models.lm.block import ROWS
from audiolm.models.lm.cache import KVCache

ONE_THREAD_DIM = 512  # models up to this width sample on one CPU thread


@dataclass
class Request:
    """One row to draw: ids_T of prompt and forced targets, and what is to follow."""

    ids: np.ndarray
    start: int  # forced targets
    steps: int  # targets to draw, at most
    seed: int
    eos_from: int  # target from which EOS may be drawn
    cond_TC: np.ndarray  # of ids and of those to draw
    plain: np.ndarray  # ids without the condition, for guidance
    plain_TC: np.ndarray  # what is added to them
    length_T: np.ndarray  # frames of ids where the stage has run lengths
    frames: int = 0  # to draw where it has: the row ends with the id that fills them
    first: int = -1  # the first id to draw where it is known, its length at least `least`: a prompt cuts its last run
    least: int = 1


def requests_of(stage: Stage, prompts: Sequence[np.ndarray], n_target: Sequence[int] | int, seeds: Sequence[int],
                forced: Sequence[np.ndarray] | None, eos_from: int | Sequence[int] | None,
                cond: Sequence[np.ndarray] | None) -> tuple[list[Request], list[np.ndarray]]:
    """(requests, forced ids of each) of a sampler's arguments.

    Raises ValueError where the lists differ in length or more ids are forced than asked for.
    """
    n = len(prompts)
    counts = [int(n_target)] * n if np.isscalar(n_target) else [int(n) for n in n_target]
    given = [np.zeros(0, np.int64)] * n if forced is None else [np.asarray(f, np.int64) for f in forced]
    conds = [np.zeros((0, stage.n_cond), np.int64)] * n if cond is None else list(cond)
    if not n == len(counts) == len(given) == len(seeds) == len(conds):
        raise ValueError(f"{n} prompts need as many n_target, forced, cond and seeds, got {len(counts)}, {len(given)}, "
                         f"{len(conds)}, {len(seeds)}")
    for count, f, c in zip(counts, given, conds, strict=True):
        if len(f) > count:
            raise ValueError(f"{len(f)} ids are forced but n_target is {count}: ask for at least the forced ones")
        if cond is not None and stage.aligned and len(c) < count:
            raise ValueError(f"{len(c)} conditions for {count} targets: give one for each target")
    ends, requests = np.broadcast_to(counts if eos_from is None else eos_from, n), []
    for i in range(n):
        ids, steps = np.concatenate([prompts[i], given[i]]).astype(np.int64), counts[i] - len(given[i])
        plain = np.concatenate([stage.no_prompt(), given[i]]).astype(np.int64)
        requests.append(Request(ids, len(given[i]), steps, seeds[i], int(ends[i]),
                                stage.place_conditions(len(ids) + max(steps - 1, 0), len(prompts[i]), conds[i]), plain,
                                np.full((len(plain), stage.n_cond), stage.no_cond), np.zeros(0, np.int64)))
    return requests, given


def groups(requests: Sequence[Request], stage: Stage, params: SamplingParams, static: bool) -> list[list[int]]:
    """Numbers of the requests that run together; those that end together, on a CPU so many that products have one shape.

    Raises ValueError for guidance of a stage that was not trained for it.
    """
    guided = params.guidance != 1
    if guided and not stage.dropped:
        raise ValueError(f"guidance {params.guidance:g} needs a {stage.name} stage that was also trained without its "
                         "condition: train with lm.condition_dropout above 0, or leave guidance at 1")
    todo = sorted((i for i, r in enumerate(requests) if r.steps > 0), key=lambda i: requests[i].steps)
    size = max(1, len(todo)) if static else ROWS // (2 if guided else 1)
    return [todo[start:start + size] for start in range(0, len(todo), size)]


def prefill(cache: KVCache, first: int, rows: Sequence[tuple[np.ndarray, ...]], static: bool,
            advance: Callable[..., None]) -> None:
    """Fills the cache's rows from `first` on with (ids_T, and what goes with them) of any lengths: advance(cache, *batch).

    Equal ones are computed once and their keys copied.
    """
    unique = {b"".join(part.tobytes() for part in row): row for row in rows}
    numbers = {key: u for u, key in enumerate(unique)}
    different = list(unique.values())
    longest = max(len(ids) for ids, *_ in different)
    if not longest:
        return
    if static:  # one padded batch; `truncate` forgets the padding's keys
        parts = [[np.pad(part, ((0, longest - len(part)), *((0, 0),) * (part.ndim - 1)))
                  for part in row] for row in different]
        own = cache.rows(first, first + len(different))
        advance(own, *(np.stack(p) for p in zip(*parts, strict=True)))
        own.truncate(torch.tensor([len(ids) for ids, *_ in different]), longest)
    else:  # one by one: a prompt's rounding must not depend on the others' lengths
        for u, row in enumerate(different):
            if len(row[0]):
                advance(cache.rows(first + u, first + u + 1), *(part[None] for part in row))
    cache.longest = max(cache.longest, longest)
    if len(different) < len(rows):
        cache.spread([numbers[b"".join(part.tobytes() for part in row)] for row in rows], first)


@contextmanager
def one_thread(width: int) -> Iterator[None]:
    """One thread for a small model: its products of 8 rows gain nothing from more, and wait where cores are busy."""
    before = torch.get_num_threads()
    if width <= ONE_THREAD_DIM:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
