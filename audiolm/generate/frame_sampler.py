"""Sampling from a stage whose positions are frames: a step advances the backbone once and draws a code of every slot.

The rules are generate.sampler's: forced frames come back unchanged, a draw depends on (seed, target) alone, on a CPU a
sample's bits do not depend on its batch, and on a GPU a frame is one CUDA graph.
Shapes: S frames that are drawn; B rows, with guidance those without the condition behind them; Q slots; others as
generate.sampler.  Positions are those of lm.frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from audiolm.generate.graphs import Graphs, Kept, kept_on, replay
from audiolm.generate.params import SamplingParams
from audiolm.generate.rows import Request, groups, one_thread, prefill, requests_of
from audiolm.generate.sampler import PLAIN, Numbers, branches, guided, sample_ids, uniform_noise
from audiolm.lm.frames import frame_positions
from audiolm.lm.stages import Stage
from audiolm.models.lm.cache import KVCache
from audiolm.models.lm.frame_transformer import FrameTransformer


class FrameBuffers:
    """Device tensors of a group of rows: KV cache, and tables by step, so that a step needs nothing from the host."""

    def __init__(self, model: FrameTransformer, stage: Stage, rows: int, length: int, device: torch.device | str | None,
                 window: int, guided: bool):
        device, slots = device or model.backbone.embed.weight.device, stage.slots
        self.rows, self.length, self.copies = rows, length, 2 if guided else 1
        self.cache, self.numbers = model.backbone.cache(self.copies * rows, length, device), Numbers.on(device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)
        self.recent_BWQ = torch.full((rows, window, slots), -1, device=device)
        self.noise_SBQ2 = torch.zeros(length, rows, slots, 2, dtype=torch.float64, device=device)
        self.cond_SBC = torch.full((length, self.copies * rows, stage.n_cond), stage.no_cond, device=device)
        self.last_BQ = torch.full((self.copies * rows, slots), stage.no_cond, device=device)  # ids of the last position
        self.out_SBQ = torch.zeros(length, rows, slots, dtype=torch.int64, device=device)
        self.graphs = Graphs()


class FrameSampler:
    """Draws from one trained stage whose positions are frames; `model` in eval mode, `kept` as Sampler."""

    def __init__(self, model: FrameTransformer, stage: Stage, kept: Kept | None = None):
        self.model, self.stage = model, stage
        self.device = model.backbone.embed.weight.device
        self.static = self.device.type != "cpu"
        self._ids_QV = torch.from_numpy(np.stack(stage.slot_ids())).to(self.device)
        self._kept, self._sample = kept or kept_on(self.device), sample_ids
        self.check = lambda: None  # before every step: what it raises ends the call

    def compile(self, backend: str = "inductor") -> None:
        """Compiles a frame: the layers of both networks, and what draws from their scores."""
        self.model.compile_sampling(backend)
        self._sample = torch.compile(sample_ids, backend=backend, dynamic=False)

    def __call__(self, prompts: Sequence[np.ndarray], n_target: Sequence[int] | int, *, seeds: Sequence[int],
                 forced: Sequence[np.ndarray] | None = None, eos_from: None = None, params: SamplingParams = PLAIN,
                 cond: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """Target ids as Sampler draws them, in whole frames; there is no EOS. Raises ValueError for parts of frames."""
        slots = self.stage.slots
        requests, given = requests_of(self.stage, prompts, n_target, seeds, forced, None, cond)
        for r in requests:
            if r.start % slots or r.steps % slots:
                raise ValueError(f"{r.start} ids are forced and {r.steps} asked for beyond them, in frames of {slots}: give "
                                 "whole frames")
        requests, out = [self._frames(r) for r in requests], given
        with one_thread(self.model.dim), torch.inference_mode():
            for group in groups(requests, self.stage, params, self.static):
                for i, ids in zip(group, self._group([requests[i] for i in group], params), strict=True):
                    out[i] = np.concatenate([given[i], ids])
        return out

    def _frames(self, r: Request) -> Request:
        """A request whose ids, steps and conditions are positions."""
        slots = self.stage.slots
        ids, cond_TC = frame_positions(self.stage, r.ids, len(r.ids) - r.start, r.cond_TC)
        plain, plain_TC = frame_positions(self.stage, r.plain, len(r.plain) - r.start, r.plain_TC)
        return replace(r, ids=ids, start=r.start // slots, steps=r.steps // slots, cond_TC=cond_TC, plain=plain,
                       plain_TC=plain_TC)

    def _group(self, rows: list[Request], params: SamplingParams) -> list[np.ndarray]:
        m, steps = self._fill(rows, params), max(r.steps for r in rows)
        for _ in range(steps):
            self.check()
            if self.static:
                self._replay(m, params)
            else:
                self._step(m, params)
        out_BSQ = m.out_SBQ[:steps].transpose(0, 1).cpu().numpy()
        return [out_BSQ[b, :r.steps].reshape(-1) for b, r in enumerate(rows)]

    def _fill(self, rows: list[Request], params: SamplingParams) -> FrameBuffers:
        """Buffers with the tables of the whole call and the keys of all positions but the last."""
        stage, B, S, slots = self.stage, len(rows), max(r.steps for r in rows), self.stage.slots
        make = partial(FrameBuffers, self.model, stage, window=params.window or 0, guided=params.guidance != 1)
        length = max(len(r.ids) for r in rows) + S - 1
        m = self._kept.take((self.model, branches(params)), B, length, make) if self.static else make(B, length, None)
        m.numbers.set(params)
        m.at.zero_()
        m.cond_SBC.fill_(stage.no_cond)
        m.recent_BWQ.fill_(-1)
        noise_BN2 = torch.stack([uniform_noise(r.seed, r.start * slots, (r.start + S) * slots) for r in rows])
        m.noise_SBQ2[:S, :B] = noise_BN2.view(B, S, slots, 2).transpose(0, 1)
        for b, r in enumerate(rows):
            own_SC = torch.from_numpy(r.cond_TC[len(r.ids) - 1:, :stage.n_cond])[:S]
            m.cond_SBC[:len(own_SC), b] = own_SC
            held_PQ = torch.from_numpy(np.concatenate([r.ids[:, None], r.cond_TC[:len(r.ids), stage.n_cond:]], 1))
            m.last_BQ[b::m.rows] = held_PQ[-1]
            if params.window and r.start:
                recent_WQ = held_PQ[-r.start:][-params.window:]
                m.recent_BWQ[b, -len(recent_WQ):] = recent_WQ
        prefill(m.cache, 0, [(r.ids[:-1], r.cond_TC[:len(r.ids) - 1]) for r in rows], self.static, self._advance)
        if m.copies == 2:
            prefill(m.cache, m.rows, [(r.plain[:-1], r.plain_TC[:-1]) for r in rows], self.static, self._advance)
        return m

    def _advance(self, cache: KVCache, ids_Bt: np.ndarray, added_BtA: np.ndarray) -> None:
        ids_Bt, added_BtA = (torch.from_numpy(x).to(self.device) for x in (ids_Bt, added_BtA))
        self.model.backbone.advance(ids_Bt, cache, added_BtA if self.stage.n_added else None)

    def _step(self, m: FrameBuffers, params: SamplingParams) -> None:
        """Draws one frame in every row."""
        noise_BQ2, cond_BC = (x.index_select(0, m.at)[0] for x in (m.noise_SBQ2, m.cond_SBC))
        added_B1A = torch.cat([cond_BC, m.last_BQ[:, 1:]], 1)[:, None] if self.stage.n_added else None
        h_BD = self.model.backbone.advance(m.last_BQ[:, :1], m.cache, added_B1A)[:, 0]
        numbers = m.numbers if self.static else params

        def draw(slot: int, scores_BV: torch.Tensor) -> torch.Tensor:
            if m.copies == 2:
                scores_BV = guided(*scores_BV.chunk(2), numbers.guidance)
            ids_BV = self._ids_QV[slot].expand_as(scores_BV)
            drawn_B = self._sample(scores_BV, noise_BQ2[:, slot], params, ids_BV, m.recent_BWQ[:, :, slot], numbers)
            code_B = drawn_B - self._ids_QV[slot, 0]
            return code_B if m.copies == 1 else code_B.repeat(2)

        m.last_BQ.copy_(torch.stack(self.model.draw_frame(h_BD, draw), 1) + self._ids_QV[:, 0])
        frame_BQ = m.last_BQ[:m.rows]
        m.out_SBQ.index_copy_(0, m.at, frame_BQ[None])
        if params.window:
            m.recent_BWQ.copy_(torch.cat([m.recent_BWQ[:, 1:], frame_BQ[:, None]], 1))
        m.at += 1

    def _replay(self, m: FrameBuffers, params: SamplingParams) -> None:
        """`_step` as a CUDA graph."""
        replay(m, partial(self._step, m, branches(params)))
