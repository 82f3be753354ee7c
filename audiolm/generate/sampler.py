"""Sampling from a stage with a KV cache (2209.03143 III-D): only legal ids are drawn, each sample has its own seed.

A draw depends on (seed, target position) alone, so a sample does not depend on its neighbours; on a CPU the logits' bits
do not either (models/lm/transformer.py).  Samples of one prompt share its prefill.  On a GPU the cache is static and a token
is one CUDA graph (generate.graphs); logits there depend on the batch, and on kept rows, up to rounding.
`sample_ids` inverts the cumulative distribution at a uniform number.
Shapes: S draws, B rows, W ids of the widest slot, V of all slots, L = 2 x slots without and with EOS, R ids that
repetition-aware sampling looks back at.  scores_BW float32 over a slot's own ids, -inf where an id may not be drawn;
noise_B2 float64 in [0, 1), the second number for a draw that is repeated; ids_BW; recent_BR the row's last ids.  Prompts and
targets are 1-D int64 ids in the stage's layout; cond_NC, cond_TC and length_T as lm.stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from audiolm.generate.graphs import Graphs, Kept, kept_on, replay
from audiolm.generate.params import SamplingParams
from audiolm.generate.rows import Request, groups, one_thread, prefill, requests_of
from audiolm.lm.run_lengths import run_lengths
from audiolm.lm.stages import Stage
from audiolm.models.lm.block import pad_rows
from audiolm.models.lm.cache import KVCache
from audiolm.models.lm.transformer import Transformer
from audiolm.rng import derive

CHECK_EVERY = 16  # draws between two looks at a GPU's ids for samples that have ended: a look waits for the GPU
PLAIN = SamplingParams()


class Numbers(NamedTuple):
    """Sampling parameters that a CUDA graph reads from the device, 0-D float32: a change needs no new graph."""

    temperature: torch.Tensor
    top_p: torch.Tensor
    repeats: torch.Tensor
    guidance: torch.Tensor

    @classmethod
    def on(cls, device: torch.device | str) -> Numbers:
        return cls(*torch.ones(len(cls._fields), device=device).unbind())

    def set(self, params: SamplingParams) -> None:
        for name, number in zip(self._fields, self, strict=True):
            number.fill_(getattr(params, name) or 0.0)


def branches(params: SamplingParams) -> SamplingParams:
    """One `params` for all whose draws differ in Numbers alone."""
    return replace(params, temperature=float(params.temperature > 0), repeats=0.0, guidance=1.0 + (params.guidance != 1),
                   top_p=None if params.top_p in (None, 1) else 0.5)


class Buffers:
    """Device tensors of a group of rows: KV cache, and tables by step, so that a step needs nothing from the host.

    With guidance the cache has the rows without a condition behind the others.
    """

    def __init__(self, model: Transformer, stage: Stage, rows: int, length: int, device: torch.device | str | None, back: int,
                 guided: bool):
        device = device or model.embed.weight.device
        self.rows, self.length, self.back, self.copies = rows, length, back, 2 if guided else 1
        self.cache, self.numbers = model.cache(self.copies * rows, length, device), Numbers.on(device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)
        self.recent_BR = torch.full((rows, back), -1, device=device)
        self.noise_SB2 = torch.zeros(length, rows, 2, dtype=torch.float64, device=device)
        self.cond_SBC = torch.full((length, self.copies * rows, stage.n_cond), stage.no_cond, device=device)
        ids = {"last_B": self.copies * rows, "length_B": rows, "first_B": rows, "least_B": rows}
        for name, size in ids.items():
            setattr(self, name, torch.zeros(size, dtype=torch.int64, device=device))
        for name in ("legal_SB", "out_SB", "runs_SB"):
            setattr(self, name, torch.zeros(length, rows, dtype=torch.int64, device=device))
        self.length_noise_SB = torch.zeros(length, rows, dtype=torch.float64, device=device)
        self.graphs = Graphs()


class Sampler:
    """Draws from one trained stage; `model` in eval mode. `kept`: the GPU's memory that samplers share; one thread at a time.
    """

    def __init__(self, model: Transformer, stage: Stage, kept: Kept | None = None):
        self.model, self.stage = model, stage
        self.device = model.embed.weight.device
        self.static = self.device.type != "cpu"  # else (CPU) a row's bits must not depend on its batch
        self._kept, self._sample = kept or kept_on(self.device), sample_ids
        self.check = lambda: None  # before every step: what it raises ends the call
        # The ids of each slot, the places of their scores, and those that may not be drawn; row slots + slot is that of a
        # slot where EOS may be drawn.  Padded places have the score behind all others, -inf.
        own = stage.slot_ids()
        width, first = max(map(len, own)), np.cumsum([0, *map(len, own)])
        ids_SW = np.stack([np.pad(ids, (0, width - len(ids)), constant_values=stage.eos) for ids in own])
        place_SW = np.stack([np.pad(a + np.arange(len(ids)), (0, width - len(ids)), constant_values=first[-1])
                             for a, ids in zip(first, own, strict=False)])
        barred_LW = np.concatenate([ids_SW == stage.eos, place_SW == first[-1]])
        self._ids_LW, self._place_LW, self._barred_LW = (
            torch.from_numpy(x).to(self.device) for x in (np.tile(ids_SW, (2, 1)), np.tile(place_SW, (2, 1)), barred_LW))

    def compile(self, backend: str = "inductor") -> None:
        """Compiles a token: its layers, and what draws from its scores."""
        self.model.compile_sampling(backend)
        self._sample = torch.compile(sample_ids, backend=backend, dynamic=False)

    def __call__(self, prompts: Sequence[np.ndarray], n_target: Sequence[int] | int, *, seeds: Sequence[int],
                 forced: Sequence[np.ndarray] | None = None, eos_from: int | Sequence[int] | None = None,
                 params: SamplingParams = PLAIN, cond: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """Target ids of each prompt (`Stage.prompt`), `n_target` of them; those in `forced` come back first, unchanged.

        A sample may end sooner, with EOS as its last id, from `eos_from` targets on (for all, or each); None: no EOS.
        `cond`: cond_NC of each row's targets (`Stage.conditions`), for a stage that has them.
        Raises ValueError where the lists differ in length or more ids are forced than asked for.
        """
        requests, given = requests_of(self.stage, prompts, n_target, seeds, forced, eos_from, cond)
        return [np.concatenate([f, ids]) for f, (ids, _) in zip(given, self._draw(requests, params), strict=True)]

    def runs(self, z: Sequence[np.ndarray], frames: Sequence[int], seeds: Sequence[int], may_end: bool = True,
             params: SamplingParams = PLAIN) -> list[tuple[np.ndarray, bool]]:
        """(z_T of each undeduplicated prompt and `frames` beyond it, True where EOS ended it), of a stage with run lengths.

        A prompt's last run goes on for as long as the stage draws, given the frames that the prompt has of it.
        """
        requests, heads = [], []
        for prompt, more, seed in zip(z, frames, seeds, strict=True):
            (ids, lengths), stage = run_lengths(prompt), self.stage
            known = max(len(ids) - 1, 0)  # the last one's length is drawn anew
            first, least = (int(ids[-1]), int(lengths[-1])) if len(ids) else (-1, 1)
            row = np.append(stage.bos, ids[:known]).astype(np.int64)
            more = int(more) + (least if len(ids) else 0)
            requests.append(Request(row, known, more, seed, known + 1 if may_end else known + more + 1,
                                    np.zeros((len(row) + more, 0), np.int64), row, np.zeros((len(row), 0), np.int64),
                                    np.append(0, lengths[:known]), more, first, least))
            heads.append(np.repeat(ids[:known], lengths[:known]))
        out = []
        for head, request, (ids, lengths) in zip(heads, requests, self._draw(requests, params), strict=True):
            ended = bool(len(ids) and ids[-1] == self.stage.eos)
            ids, lengths = (x[:len(x) - ended] for x in (ids, lengths))
            out.append((np.concatenate([head, np.repeat(ids, lengths)[:request.frames]]), ended))
        return out

    def _draw(self, requests: list[Request], params: SamplingParams) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, their lengths where the stage has them) drawn for each request."""
        out = [(np.zeros(0, np.int64), np.zeros(0, np.int64)) for _ in requests]
        with one_thread(self.model.dim), torch.inference_mode():
            for group in groups(requests, self.stage, params, self.static):
                for i, drawn in zip(group, self._group([requests[i] for i in group], params), strict=True):
                    out[i] = drawn
        return out

    def _group(self, rows: list[Request], params: SamplingParams) -> list[tuple[np.ndarray, np.ndarray]]:
        """Draws a group of rows, each from its own first target on."""
        S, stage = max(r.steps for r in rows), self.stage
        m = self._fill(rows, S, params)
        n_SB = np.arange(S)[:, None] + np.array([r.start for r in rows])
        may_end = stage.lengths or any(r.eos_from < r.start + r.steps for r in rows)
        for s in range(S):
            self.check()
            if self.static:
                self._replay(m, params)
            else:
                self._step(m, params, (n_SB[s] % stage.slots).tolist())
            if may_end and (not self.static or s % CHECK_EVERY == CHECK_EVERY - 1):
                if all(n <= s + 1 for n in self._ends(m, rows, s + 1)):
                    break
        ends, ids_BS, runs_BS = self._ends(m, rows, s + 1), m.out_SB.T.cpu().numpy(), m.runs_SB.T.cpu().numpy()
        return [(ids_BS[b, :n].copy(), runs_BS[b, :n].copy()) for b, n in enumerate(ends)]

    def _ends(self, m: Buffers, rows: list[Request], drawn: int) -> list[int]:
        """Targets of each row up to its EOS, its frames or its steps, of the first `drawn`."""
        ids_BS, runs_BS = (x[:drawn, :len(rows)].T.cpu().numpy() for x in (m.out_SB, m.runs_SB))
        ends = []
        for row, ids, runs in zip(rows, ids_BS, runs_BS, strict=True):
            over = ids == self.stage.eos
            if self.stage.lengths:
                over = over | (runs.cumsum() >= row.frames)
            at = np.flatnonzero(over)
            ends.append(min(row.steps, int(at[0]) + 1 if len(at) else drawn + (drawn < row.steps)))
        return ends

    def _fill(self, rows: list[Request], S: int, params: SamplingParams) -> Buffers:
        """Buffers with the tables of the whole call, copied to the device once, and the keys of all ids but the last."""
        stage, B, starts = self.stage, len(rows), [r.start for r in rows]
        m = self._buffers(B, max(len(r.ids) for r in rows) + S - 1, params)
        n_SB = np.arange(S)[:, None] + np.array(starts)
        may_end_SB = stage.eos_legal(n_SB) & (n_SB >= np.array([r.eos_from for r in rows]))
        m.legal_SB[:S, :B] = torch.from_numpy(n_SB % stage.slots + stage.slots * may_end_SB)
        m.noise_SB2[:S, :B] = torch.stack([uniform_noise(r.seed, r.start, r.start + S) for r in rows], 1)
        m.at.zero_()
        m.last_B[:B] = torch.tensor([r.ids[-1] for r in rows])
        if stage.aligned:
            m.cond_SBC.fill_(stage.no_cond)
            for b, r in enumerate(rows):
                own = r.cond_TC[len(r.ids) - 1:][:S]
                m.cond_SBC[:len(own), b] = torch.from_numpy(own)
        if stage.lengths:
            m.length_B[:B] = torch.tensor([r.length_T[-1] for r in rows])
            m.first_B[:B], m.least_B[:B] = (torch.tensor([getattr(r, n) for r in rows]) for n in ("first", "least"))
            m.length_noise_SB[:S, :B] = torch.stack([uniform_noise(derive(r.seed, "lengths"), r.start, r.start + S)[:, 0]
                                                     for r in rows], 1)
        if m.back:
            tails = [r.ids[-min(m.back, r.start):] if r.start else r.ids[:0] for r in rows]
            m.recent_BR[:B] = torch.from_numpy(np.stack([np.pad(t, (m.back - len(t), 0), constant_values=-1) for t in tails]))
        prefill(m.cache, 0, [(r.ids[:-1], r.cond_TC[:len(r.ids) - 1], r.length_T[:-1]) for r in rows], self.static,
                self._advance)
        if m.copies == 2:
            m.last_B[m.rows:m.rows + B] = m.last_B[:B]
            prefill(m.cache, m.rows, [(r.plain[:-1], r.plain_TC[:-1], r.length_T[:-1]) for r in rows], self.static,
                    self._advance)
        return m

    def _buffers(self, rows: int, length: int, params: SamplingParams) -> Buffers:
        """New buffers on a CPU; on a GPU kept ones, with their graphs."""
        back = (params.window or 0) * self.stage.slots  # a slot's window spans that many frames
        make = partial(Buffers, self.model, self.stage, back=back, guided=params.guidance != 1)
        if not self.static:
            return make(rows, length, None)
        m = self._kept.take((self.model, branches(params)), rows, length, make)
        m.numbers.set(params)
        return m

    def _step(self, m: Buffers, params: SamplingParams, slots: list[int] | None) -> None:
        """Draws one id in every row. `slots`: this step's on a CPU, which then scores those alone; None in a CUDA graph."""
        legal_B, noise_B2 = m.legal_SB.index_select(0, m.at)[0], m.noise_SB2.index_select(0, m.at)[0]
        cond_BtC = m.cond_SBC.index_select(0, m.at).transpose(0, 1) if self.stage.aligned else None
        length_Bt = m.length_B[:, None] if self.stage.lengths else None
        h_BD = self.model.advance(m.last_B[:, None], m.cache, cond_BtC, length_Bt)[:, 0]
        ids_BW, barred_BW = self._ids_LW[legal_B], self._barred_LW[legal_B]
        if self.stage.no_repeat:
            barred_BW = barred_BW | (ids_BW == m.last_B[:, None])
        if slots is None:
            all_BV, place_BW = F.pad(self.model.scores(h_BD, None), (0, 1), value=-torch.inf), self._place_LW[legal_B]
            scores = [x.gather(1, place_BW) for x in all_BV.chunk(m.copies)]
        else:
            scores = self.model.scores(h_BD, m.copies * slots).chunk(m.copies)
        numbers = m.numbers if slots is None else params
        scores_BW = scores[0] if m.copies == 1 else guided(*scores, numbers.guidance)
        drawn_B = self._sample(scores_BW.masked_fill(barred_BW, -torch.inf), noise_B2, params, ids_BW, m.recent_BR, numbers)
        if self.stage.lengths:
            drawn_B = self._draw_lengths(m, h_BD, drawn_B)
        m.last_B.view(m.copies, -1).copy_(drawn_B)
        m.out_SB.index_copy_(0, m.at, drawn_B[None])
        if m.back:  # repetition-aware sampling: the last `window` ids of every slot
            m.recent_BR.copy_(torch.cat([m.recent_BR[:, 1:], drawn_B[:, None]], 1))
        m.at += 1

    def _draw_lengths(self, m: Buffers, h_BD: torch.Tensor, drawn_B: torch.Tensor) -> torch.Tensor:
        """Draws how many frames each id lasts, at temperature 1 so that sounds keep their rate; returns the ids.

        The first id of a row may be known, with the frames that its prompt has of it.
        """
        known_B = (m.at == 0) & (m.first_B >= 0)
        drawn_B = torch.where(known_B, m.first_B, drawn_B)
        scores_BL = self.model.lengths.scores(*(pad_rows(x, self.model.rows) for x in (h_BD, drawn_B)))[:len(drawn_B)]
        length_L = torch.arange(1, scores_BL.shape[1] + 1, device=scores_BL.device)
        scores_BL = scores_BL.masked_fill(known_B[:, None] & (length_L < m.least_B[:, None]), -torch.inf)
        run_B = _invert_cdf(scores_BL.softmax(1), m.length_noise_SB.index_select(0, m.at)[0],
                            length_L.expand(len(drawn_B), -1))
        run_B = torch.where(drawn_B == self.stage.eos, 0, run_B)
        m.length_B.copy_(run_B)
        m.runs_SB.index_copy_(0, m.at, run_B[None])
        return drawn_B

    def _replay(self, m: Buffers, params: SamplingParams) -> None:
        """`_step` as a CUDA graph."""
        replay(m, partial(self._step, m, branches(params), None))

    def _advance(self, cache: KVCache, ids_Bt: np.ndarray, cond_BtC: np.ndarray, length_Bt: np.ndarray) -> None:
        stage, (ids, cond, length) = self.stage, (torch.from_numpy(x).to(self.device) for x in (ids_Bt, cond_BtC, length_Bt))
        self.model.advance(ids, cache, cond if stage.aligned else None, length if stage.lengths else None)


def uniform_noise(seed: int, first: int, last: int) -> torch.Tensor:
    """noise_S2 of the target positions [first, last), from the sample's own generator."""
    return torch.rand(last, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)[first:]


def guided(with_BW: torch.Tensor, without_BW: torch.Tensor, guidance: float | torch.Tensor) -> torch.Tensor:
    """Scores moved away from those without the condition (classifier-free guidance, 2207.12598); 1: as they are."""
    log_with, log_without = with_BW.log_softmax(1), without_BW.log_softmax(1)
    return torch.where(with_BW.isneginf(), with_BW, log_without + guidance * (log_with - log_without))


def sample_ids(scores_BW: torch.Tensor, noise_B2: torch.Tensor, params: SamplingParams, ids_BW: torch.Tensor,
               recent_BR: torch.Tensor, numbers: Numbers | SamplingParams | None = None) -> torch.Tensor:
    """ids_B drawn by `params`, with their `numbers` where those are elsewhere; an id with score -inf is never drawn."""
    numbers = params if numbers is None else numbers
    if params.temperature == 0:
        return ids_BW.gather(1, scores_BW.argmax(1, keepdim=True))[:, 0]
    full_BW = (scores_BW / numbers.temperature).softmax(1)
    cut_BW = full_BW
    if params.top_k is not None and params.top_k < scores_BW.shape[1]:
        least_B1 = cut_BW.topk(params.top_k, 1).values[:, -1:]
        cut_BW = cut_BW.masked_fill(cut_BW < least_B1, 0.0)
    if params.top_p is not None and params.top_p < 1:
        ranked, order = cut_BW.sort(1, descending=True)
        total_B1 = ranked.sum(1, keepdim=True)  # below 1 after top_k
        out = ranked.cumsum(1) - ranked >= numbers.top_p * total_B1  # the id that crosses top_p stays
        cut_BW = cut_BW.masked_fill(torch.zeros_like(out).scatter_(1, order, out), 0.0)
    drawn_B = _invert_cdf(cut_BW, noise_B2[:, 0], ids_BW)
    if params.window is None:
        return drawn_B
    # both draws are made for all rows: a CUDA graph cannot branch on a row's history
    often_B = (recent_BR == drawn_B[:, None]).sum(1) > numbers.repeats * params.window
    return torch.where(often_B, _invert_cdf(full_BW, noise_B2[:, 1], ids_BW), drawn_B)


def _invert_cdf(probs_BW: torch.Tensor, noise_B: torch.Tensor, ids_BW: torch.Tensor) -> torch.Tensor:
    """ids_B at the quantiles noise_B of unnormalised probabilities; float64, as rare ids vanish in a float32 sum."""
    cdf_BW = probs_BW.double().cumsum(1)
    # strictly below the total, so that the first place above it has a probability above 0
    at_B1 = (noise_B.clamp(max=1 - 1e-12) * cdf_BW[:, -1])[:, None]
    return ids_BW.gather(1, torch.searchsorted(cdf_BW, at_B1, right=True))[:, 0]
