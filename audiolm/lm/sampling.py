"""Sampling from a stage with a KV cache (paper III-D): only legal ids are ever drawn, each sample has its own seed.

Shapes: prompts and targets are 1-D int64 ids in the stage's layout; scores_BW float32 over a slot's own ids (models.heads).
A draw is the inverse of the distribution at a uniform number that depends on (seed, target position) alone, so a
sample does not depend on its neighbours; on a CPU the logits' bits do not either (models/transformer.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from audiolm.lm.stages import Stage
from audiolm.models.cache import Cache
from audiolm.models.transformer import ROWS, Transformer

ONE_THREAD_DIM = 512  # models up to this width sample on one CPU thread


@dataclass(frozen=True)
class Draw:
    """How ids are drawn; temperature 0 takes the most likely id. top_k and top_p are off in the paper."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature ({self.temperature}) must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k ({self.top_k}) must be at least 1, or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p}) must lie in (0, 1], or be None")


def sample(model: Transformer, stage: Stage, prompts: Sequence[np.ndarray], n_target: Sequence[int] | int, *,
           forced: Sequence[np.ndarray] | None = None, stop_at_eos: bool = False, temperature: float = 1.0,
           top_k: int | None = None, top_p: float | None = None, seeds: Sequence[int]) -> list[np.ndarray]:
    """Target ids of each prompt (`Stage.prompt`), `n_target` of them; those in `forced` are given and come back first.

    With `stop_at_eos` a sample may end before, with EOS as its last id; without it EOS is never drawn.
    Raises ValueError where the lists differ in length or more ids are forced than asked for.
    """
    B = len(prompts)
    counts = [int(n_target)] * B if np.isscalar(n_target) else [int(n) for n in n_target]
    given = [np.zeros(0, np.int64)] * B if forced is None else [np.asarray(f, np.int64) for f in forced]
    if not B == len(counts) == len(given) == len(seeds):
        raise ValueError(f"{B} prompts need as many n_target, forced and seeds, got {len(counts)}, {len(given)}, "
                         f"{len(seeds)}")
    for n, f in zip(counts, given, strict=True):
        if len(f) > n:
            raise ValueError(f"{len(f)} ids are forced but n_target is {n}: ask for at least the forced ones")
    draw = Draw(temperature, top_k, top_p)
    out = list(given)
    todo = [i for i in range(B) if counts[i] > len(given[i])]
    # rows that end together run together; on a CPU in groups of ROWS, whose products all have one shape
    todo.sort(key=lambda i: counts[i] - len(given[i]))
    size = ROWS if next(model.parameters()).device.type == "cpu" else max(1, len(todo))
    with _threads(model):
        for start in range(0, len(todo), size):
            group = todo[start:start + size]
            drawn = _group(model, stage, [prompts[i] for i in group], [counts[i] for i in group],
                           [given[i] for i in group], stop_at_eos, draw, [seeds[i] for i in group])
            for i, ids in zip(group, drawn, strict=True):
                out[i] = np.concatenate([given[i], ids])
    return out


@contextmanager
def _threads(model: Transformer) -> Iterator[None]:
    """A small model's products of 8 rows gain nothing from threads, and wait for each other where cores are busy."""
    before = torch.get_num_threads()
    if model.dim <= ONE_THREAD_DIM:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def _group(model: Transformer, stage: Stage, prompts, counts, given, stop_at_eos: bool, draw: Draw, seeds):
    device = next(model.parameters()).device
    B = len(prompts)
    starts = [len(g) for g in given]
    steps = [n - s for n, s in zip(counts, starts, strict=True)]
    rows = [np.concatenate([p, g]).astype(np.int64) for p, g in zip(prompts, given, strict=True)]
    cache = model.cache(B, max(map(len, rows)) + max(steps), device)
    h_BD = _prefill(model, rows, cache)

    noise = [_noise(seed, s, s + max(steps)) for seed, s in zip(seeds, starts, strict=True)]
    noise_SB = torch.stack(noise, 1).to(device)
    n_SB = np.arange(max(steps))[:, None] + np.array(starts)
    slots_SB = (n_SB % stage.slots).tolist()
    own = stage.slot_ids()  # what a slot's head scores, nothing else can be drawn
    ids_SW = np.stack([np.pad(ids, (0, max(map(len, own)) - len(ids)), constant_values=stage.eos) for ids in own])
    ids_SW, eos_W = torch.from_numpy(ids_SW).to(device), torch.from_numpy(own[0] == stage.eos).to(device)
    eos_SB = torch.from_numpy(stage.eos_legal(n_SB) & stop_at_eos).to(device)
    slot_SB = torch.tensor(slots_SB, device=device)
    last_B = torch.tensor([row[-1] for row in rows], device=device)

    drawn, ended_B = [], torch.zeros(B, dtype=torch.bool, device=device)
    for s in range(max(steps)):
        ids_BW = ids_SW[slot_SB[s]]
        barred_BW = eos_W & ~eos_SB[s][:, None]
        if stage.no_repeat:
            barred_BW = barred_BW | (ids_BW == last_B[:, None])
        scores_BW = model.scores(h_BD, slots_SB[s]).masked_fill(barred_BW, -torch.inf)
        last_B = ids_BW.gather(1, _draw(scores_BW, noise_SB[s], draw)[:, None])[:, 0]
        drawn.append(last_B)
        if stop_at_eos:
            ended_B |= (last_B == stage.eos) | torch.tensor([s + 1 >= n for n in steps], device=device)
            if bool(ended_B.all()):
                break
        if s + 1 < max(steps):
            h_BD = model.advance(last_B[:, None], cache)[:, 0]
    ids_BS = torch.stack(drawn, 1).cpu().numpy()
    out = []
    for ids, n in zip(ids_BS, steps, strict=True):
        ids = ids[:n]
        ends = np.flatnonzero(ids == stage.eos)
        out.append(ids[:ends[0] + 1] if len(ends) else ids)
    return out


def _prefill(model: Transformer, rows: list[np.ndarray], cache: Cache) -> torch.Tensor:
    """Fills the cache with prompts of any lengths; returns h_BD, what scores each row's next id."""
    device = cache.lengths_B.device
    longest = max(map(len, rows))
    if device.type == "cpu":  # one by one: a prompt's rounding must not depend on the others' lengths
        hidden = [model.advance(torch.from_numpy(row)[None], cache.row(b))[:, -1] for b, row in enumerate(rows)]
        cache.longest = longest
        return torch.cat(hidden)
    padded = torch.zeros(len(rows), longest, dtype=torch.int64)
    for b, row in enumerate(rows):
        padded[b, :len(row)] = torch.from_numpy(row)
    lengths_B = torch.tensor([len(row) for row in rows], device=device)
    h_BTD = model.advance(padded.to(device), cache)
    cache.truncate(lengths_B, longest)
    return h_BTD[torch.arange(len(rows), device=device), lengths_B - 1]


def _noise(seed: int, first: int, last: int) -> torch.Tensor:
    """Uniform numbers of the target positions [first, last), from the sample's own generator."""
    return torch.rand(last, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)[first:]


def _draw(logits_BV: torch.Tensor, noise_B: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Columns drawn, one a row: -inf has probability 0 and is never drawn."""
    if draw.temperature == 0:
        return logits_BV.argmax(1)
    logits_BV = logits_BV / draw.temperature
    if draw.top_k is not None and draw.top_k < logits_BV.shape[1]:
        least = logits_BV.topk(draw.top_k, 1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, -torch.inf)
    probs_BV = logits_BV.softmax(1)
    if draw.top_p is not None and draw.top_p < 1:
        ranked, order = probs_BV.sort(1, descending=True)
        out = ranked.cumsum(1) - ranked >= draw.top_p  # the id that crosses top_p stays
        probs_BV = probs_BV.masked_fill(torch.zeros_like(out).scatter_(1, order, out), 0.0)
    cdf_BV = probs_BV.double().cumsum(1)
    # strictly below the total, so that the first place above it has a probability above 0
    at_B = noise_B.clamp(max=1 - 1e-12) * cdf_BV[:, -1]
    return torch.searchsorted(cdf_BV, at_B[:, None], right=True)[:, 0]
