"""Stages 1 and 2 by turns: the cascade of stages that know no durations (2209.03143, III-B: both deduplicate).

A deduplicated id does not tell how long it lasts, and the paper does not say how it fixes the length of a sound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from audiolm.data.tokens import RATIO
from audiolm.lm.run_lengths import dedupe
from audiolm.lm.stages import SEMANTIC_HZ

MAX_ROUNDS = 6  # of stages 1 and 2 in turn; in the last one stage 2 draws all frames that are asked for
DURATION_FACTOR = 1.5  # stage 2 may stretch or shrink its ids by this against the mean: no EOS far too early or late
PROMPT_RUN_S = 1.0  # from this length on the prompt's own mean run counts, below it is an average of too few runs


Drawn = tuple[list[np.ndarray], list[np.ndarray], list[int], list[bool]]


def by_turns(lm: Any, prompts: Sequence[np.ndarray], frames: Sequence[int], seeds: Sequence[int],
             codes: Sequence[np.ndarray] | None, may_end: bool) -> Drawn:
    """(ids, codes, ids of the prompt, True where EOS ended it) of `lm`, an AudioLM whose stages know no durations.

    Stage 1 draws as many ids as are expected to last long enough. Stage 2's EOS decides how long they last. Where that is
    too short stage 1 goes on.
    """
    stage, q = lm.stage("semantic"), lm.stage("coarse").levels[1]
    ys = [np.zeros((0, q), np.int64) for _ in prompts] if codes is None else [c[:, :q] for c in codes]
    runs = [len(z) / len(dedupe(z)) if len(z) >= PROMPT_RUN_S * SEMANTIC_HZ else lm.mean_run for z in prompts]
    # what a round drew is forced in the next, so the sound goes on where it was
    zs, ended = [stage.targets(z) for z in prompts], [False] * len(prompts)
    heads, live = [len(z) for z in zs], list(range(len(zs)))
    for turn in range(MAX_ROUNDS):
        more = [math.ceil((frames[i] - len(ys[i]) / RATIO) / runs[i]) for i in live]
        drawn = lm.semantic([zs[i] for i in live], more, [seeds[i] for i in live], may_end)
        for i, ids, end in zip(live, *drawn, strict=True):
            zs[i], ended[i] = ids, end
        last = turn == MAX_ROUNDS - 1
        spans = [coarse_span(frames[i], len(zs[i]) * runs[i], ended[i], last or len(zs[i]) >= lm.longest)
                 for i in live]
        y = lm.coarse([zs[i] for i in live], [max(most, len(ys[i])) for i, (_, most) in zip(live, spans, strict=True)],
                      [seeds[i] for i in live], [ys[i] for i in live], [least for least, _ in spans])
        for i, c in zip(live, y, strict=True):
            ys[i] = c
        live = [i for i in live if len(ys[i]) < RATIO * frames[i] and not ended[i]]
        if not live:
            break
    return zs, lm.fine(ys, seeds, None if codes is None else [c[:, q:] for c in codes]), heads, ended


def coarse_span(frames: int, expected: float, ended: bool, last: bool) -> tuple[int, int]:
    """(least, most) acoustic frames that stage 2 draws, for ids expected to last so many semantic frames.

    `frames`: semantic frames asked for. `last`: stage 1 cannot go on, so stage 2 draws all frames.
    """
    if ended:
        frames = min(frames, math.ceil(DURATION_FACTOR * expected))
    elif last:
        return RATIO * frames, RATIO * frames
    return RATIO * min(frames, int(expected / DURATION_FACTOR)), RATIO * frames
