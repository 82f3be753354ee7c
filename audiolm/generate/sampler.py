"""Sampling from a stage with a KV cache (2209.03143 III-D): only legal ids are drawn, each sample has its own seed.

A draw depends on (seed, target position) alone, so a sample does not depend on its neighbours; on a CPU the logits' bits
do not either (models/transformer.py).  Samples of one prompt share its prefill.  On a GPU the cache is static and a token
is one CUDA graph, one for each run of keys; both are kept for the next call.
`sample_ids` inverts the cumulative distribution at a uniform number.
Shapes: S draws, B rows, W ids of the widest slot, R ids that repetition-aware sampling looks back at.  scores_BW float32
over a slot's own ids, -inf where an id may not be drawn; noise_B2 float64 in [0, 1), the second number for a draw that is
repeated; ids_BW; recent_BR the row's last ids.  Prompts and targets are 1-D int64 ids in the stage's layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from audiolm.generate.params import SamplingParams
from audiolm.lm.stages import Stage
from audiolm.models.transformer import ROWS, Transformer

ONE_THREAD_DIM = 512  # models up to this width sample on one CPU thread
CHECK_EVERY = 16  # draws between two looks at a GPU's ids for samples that have ended: a look waits for the GPU
WARM_UP = 3  # tokens before a CUDA graph is captured: libraries allocate their workspaces first
KEPT_BUFFERS = 2  # of different sizes that a GPU keeps: a batch and its remainder
LENGTH_STEP = 512  # a kept buffer's length is a multiple of this, so that calls of similar lengths share it
PLAIN = SamplingParams()


class Buffers:
    """Device tensors of a group of rows: KV cache, and tables by step, so that a step needs nothing from the host."""

    def __init__(self, model: Transformer, rows: int, length: int, back: int):
        device = model.embed.weight.device
        self.length, self.back = length, back
        self.cache = model.cache(rows, length)
        self.last_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self.recent_BR = torch.full((rows, back), -1, device=device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)
        self.noise_SB2 = torch.zeros(length, rows, 2, dtype=torch.float64, device=device)
        self.slot_SB = torch.zeros(length, rows, dtype=torch.int64, device=device)
        self.eos_SB = torch.zeros(length, rows, dtype=torch.bool, device=device)  # where EOS may be drawn
        self.out_SB = torch.zeros(length, rows, dtype=torch.int64, device=device)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by the number of keys that a step attends to
        self.warmed = 0


class Sampler:
    """Draws from one trained stage; `model` in eval mode."""

    def __init__(self, model: Transformer, stage: Stage):
        self.model, self.stage = model, stage
        self.device = model.embed.weight.device
        self.static = self.device.type != "cpu"  # else (CPU) a row's bits must not depend on its batch
        # the ids that each slot's head scores; padded places score -inf
        slots = stage.slot_ids()
        ids_SW = np.stack([np.pad(ids, (0, max(map(len, slots)) - len(ids)), constant_values=stage.eos) for ids in slots])
        self._ids_SW = torch.from_numpy(ids_SW).to(self.device)
        self._kept: dict[tuple[int, SamplingParams], Buffers] = {}

    def __call__(self, prompts: Sequence[np.ndarray], n_target: Sequence[int] | int, *, seeds: Sequence[int],
                 forced: Sequence[np.ndarray] | None = None, eos_from: int | Sequence[int] | None = None,
                 params: SamplingParams = PLAIN) -> list[np.ndarray]:
        """Target ids of each prompt (`Stage.prompt`), `n_target` of them; those in `forced` come back first, unchanged.

        A sample may end sooner, with EOS as its last id, from `eos_from` targets on (for all, or each); None: no EOS.
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
        ends = np.broadcast_to(counts if eos_from is None else eos_from, B)
        out = list(given)
        todo = [i for i in range(B) if counts[i] > len(given[i])]
        # rows that end together run together; on a CPU in groups of ROWS, whose products all have one shape
        todo.sort(key=lambda i: counts[i] - len(given[i]))
        size = max(1, len(todo)) if self.static else ROWS
        with _threads(self.model), torch.inference_mode():
            for start in range(0, len(todo), size):
                group = todo[start:start + size]
                drawn = self._group([np.concatenate([prompts[i], given[i]]).astype(np.int64) for i in group],
                                    [len(given[i]) for i in group], [counts[i] - len(given[i]) for i in group],
                                    ends[group], params, [seeds[i] for i in group])
                for i, ids in zip(group, drawn, strict=True):
                    out[i] = np.concatenate([given[i], ids])
        return out

    def _group(self, rows: list[np.ndarray], starts: list[int], steps: list[int], ends_B: np.ndarray, params: SamplingParams,
               seeds: Sequence[int]) -> list[np.ndarray]:
        """The ids that follow each row, steps[b] of them, the first as target starts[b]; EOS from target ends_B[b] on."""
        stage, B, S = self.stage, len(rows), max(steps)
        m = self._buffers(B, max(map(len, rows)) + S - 1, params)
        # tables of the whole call, copied to the device once: slots, where EOS is legal, noise by target position
        n_SB = np.arange(S)[:, None] + np.array(starts)
        m.slot_SB[:S, :B] = torch.from_numpy(n_SB % stage.slots)
        m.eos_SB[:S, :B] = torch.from_numpy(stage.eos_legal(n_SB) & (n_SB >= ends_B))
        m.noise_SB2[:S, :B] = torch.stack([uniform_noise(seed, n, n + S) for seed, n in zip(seeds, starts, strict=True)], 1)
        m.at.zero_()
        m.last_B[:B] = torch.tensor([row[-1] for row in rows])
        if m.back:
            tails = [row[-min(m.back, n):] if n else row[:0] for row, n in zip(rows, starts, strict=True)]
            m.recent_BR[:B] = torch.from_numpy(np.stack([np.pad(t, (m.back - len(t), 0), constant_values=-1) for t in tails]))
        # keys of all ids but the last, which is the first step's input; then an id a step, until all rows have ended
        self._prefill(m, [row[:-1] for row in rows])
        may_end = (ends_B < np.array(starts) + steps).any()
        for s in range(S):
            if self.static:
                self._replay(m, params)
            else:
                self._step(m, params, (n_SB[s] % stage.slots).tolist())
            if may_end and (not self.static or s % CHECK_EVERY == CHECK_EVERY - 1):
                ended_B = (m.out_SB[:s + 1, :B] == stage.eos).any(0).cpu().numpy()
                if (ended_B | (s + 1 >= np.array(steps))).all():
                    break
        # each row up to its own number of steps, or its EOS
        ids_BS = m.out_SB[:s + 1, :B].T.cpu().numpy()
        out = []
        for ids, n in zip(ids_BS, steps, strict=True):
            ids = ids[:n]
            ends = np.flatnonzero(ids == stage.eos)
            out.append(ids[:ends[0] + 1] if len(ends) else ids)
        return out

    def _buffers(self, rows: int, length: int, params: SamplingParams) -> Buffers:
        """New buffers on a CPU; on a GPU kept ones, with their graphs, where rows and parameters are the same."""
        back = (params.window or 0) * self.stage.slots  # a slot's window spans that many frames
        if not self.static:
            return Buffers(self.model, rows, length, back)
        rows = 1 << (rows - 1).bit_length()  # powers of two: batches of similar size share buffers; spare rows are ignored
        kept = self._kept.pop((rows, params), None)
        if kept is None or kept.length < length:
            while len(self._kept) >= KEPT_BUFFERS:
                self._kept.pop(next(iter(self._kept)))
            kept = Buffers(self.model, rows, -(-length // LENGTH_STEP) * LENGTH_STEP, back)
        self._kept[rows, params] = kept  # the newest is last
        kept.cache.clear()
        return kept

    def _step(self, m: Buffers, params: SamplingParams, slots: list[int] | None) -> None:
        """Draws one id in every row. `slots`: this step's on a CPU, which then scores those alone; None in a CUDA graph."""
        slot_B, may_end_B, noise_B2 = (x.index_select(0, m.at)[0] for x in (m.slot_SB, m.eos_SB, m.noise_SB2))
        h_BD = self.model.advance(m.last_B[:, None], m.cache)[:, 0]
        ids_BW = self._ids_SW[slot_B]
        barred_BW = (ids_BW == self.stage.eos) & ~may_end_B[:, None]
        if self.stage.no_repeat:
            barred_BW = barred_BW | (ids_BW == m.last_B[:, None])
        scores_BW = self.model.scores(h_BD, slot_B if slots is None else slots).masked_fill(barred_BW, -torch.inf)
        drawn_B = sample_ids(scores_BW, noise_B2, params, ids_BW, m.recent_BR)
        m.last_B.copy_(drawn_B)
        m.out_SB.index_copy_(0, m.at, drawn_B[None])
        if m.back:  # repetition-aware sampling: the last `window` ids of every slot
            m.recent_BR.copy_(torch.cat([m.recent_BR[:, 1:], drawn_B[:, None]], 1))
        m.at += 1

    def _replay(self, m: Buffers, params: SamplingParams) -> None:
        """`_step` as a CUDA graph, captured when the cache first reaches a run of keys (models/cache.py)."""
        if m.warmed < WARM_UP:
            m.warmed += 1
            return self._step(m, params, None)
        held, keys = m.cache.longest, m.cache.keys(1)
        if keys not in m.graphs:
            graph, pool = torch.cuda.CUDAGraph(), next((g.pool() for g in m.graphs.values()), None)
            with torch.cuda.graph(graph, pool=pool):
                self._step(m, params, None)
            m.graphs[keys] = graph
        m.graphs[keys].replay()
        m.cache.longest = held + 1  # the host's count: a replay does not run its code

    def _prefill(self, m: Buffers, rows: list[np.ndarray]) -> None:
        """Fills the cache with prompts of any lengths; equal ones are computed once and their keys copied."""
        unique = {row.tobytes(): row for row in rows}
        numbers = {key: u for u, key in enumerate(unique)}
        different, cache = list(unique.values()), m.cache
        longest = max(map(len, different))
        if not longest:
            return
        if self.static:  # one padded batch; `truncate` forgets the padding's keys
            padded = np.stack([np.pad(row, (0, longest - len(row))) for row in different])
            self.model.advance(torch.from_numpy(padded).to(self.device), cache.rows(0, len(different)))
            cache.truncate(torch.tensor([len(row) for row in different]), longest)
        else:  # one by one: a prompt's rounding must not depend on the others' lengths
            for u, row in enumerate(different):
                if len(row):
                    self.model.advance(torch.from_numpy(row)[None], cache.rows(u, u + 1))
            cache.longest = longest
        if len(different) < len(rows):
            cache.spread([numbers[row.tobytes()] for row in rows])


@contextmanager
def _threads(model: Transformer) -> Iterator[None]:
    """One thread for a small model: its products of 8 rows gain nothing from more, and wait where cores are busy."""
    before = torch.get_num_threads()
    if model.dim <= ONE_THREAD_DIM:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def uniform_noise(seed: int, first: int, last: int) -> torch.Tensor:
    """noise_S2 of the target positions [first, last), from the sample's own generator."""
    return torch.rand(last, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)[first:]


def sample_ids(scores_BW: torch.Tensor, noise_B2: torch.Tensor, params: SamplingParams, ids_BW: torch.Tensor,
               recent_BR: torch.Tensor) -> torch.Tensor:
    """ids_B drawn by `params`; an id with score -inf is never drawn."""
    if params.temperature == 0:
        return ids_BW.gather(1, scores_BW.argmax(1, keepdim=True))[:, 0]
    full_BW = (scores_BW / params.temperature).softmax(1)
    cut_BW = full_BW
    if params.top_k is not None and params.top_k < scores_BW.shape[1]:
        least_B1 = cut_BW.topk(params.top_k, 1).values[:, -1:]
        cut_BW = cut_BW.masked_fill(cut_BW < least_B1, 0.0)
    if params.top_p is not None and params.top_p < 1:
        ranked, order = cut_BW.sort(1, descending=True)
        total_B1 = ranked.sum(1, keepdim=True)  # below 1 after top_k
        out = ranked.cumsum(1) - ranked >= params.top_p * total_B1  # the id that crosses top_p stays
        cut_BW = cut_BW.masked_fill(torch.zeros_like(out).scatter_(1, order, out), 0.0)
    drawn_B = _invert_cdf(cut_BW, noise_B2[:, 0], ids_BW)
    if params.window is None:
        return drawn_B
    # both draws are made for all rows: a CUDA graph cannot branch on a row's history
    often_B = (recent_BR == drawn_B[:, None]).sum(1) > params.repeats * params.window
    return torch.where(often_B, _invert_cdf(full_BW, noise_B2[:, 1], ids_BW), drawn_B)


def _invert_cdf(probs_BW: torch.Tensor, noise_B: torch.Tensor, ids_BW: torch.Tensor) -> torch.Tensor:
    """ids_B at the quantiles noise_B of unnormalised probabilities; float64, as rare ids vanish in a float32 sum."""
    cdf_BW = probs_BW.double().cumsum(1)
    # strictly below the total, so that the first place above it has a probability above 0
    at_B1 = (noise_B.clamp(max=1 - 1e-12) * cdf_BW[:, -1])[:, None]
    return ids_BW.gather(1, torch.searchsorted(cdf_BW, at_B1, right=True))[:, 0]
