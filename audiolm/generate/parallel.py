"""Sampling from the parallel decoder (SoundStorm, 2305.09636): level by level, the first one in several passes.

A pass draws all masked codes of a level at once and keeps the most confident ones; the others stay masked for the next pass
(MaskGIT, 2202.04200).  What is kept is never masked again, nor are coarser levels and the prompt.  Finer levels stay masked
until their turn, and take one pass each.
A sound beyond the trained crop is drawn in windows, each prompted by the end of the one before.  On a CPU rows run alone, so
a sample's bits do not depend on its batch.
Shapes: z_T int64 at 25 Hz, undeduplicated; codes_TQ int64 at 50 Hz; ids_BTC, doc_BT as models.lm.parallel_decoder; masks
(B, T) bool.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from audiolm.data.tokens import RATIO
from audiolm.generate.params import SamplingParams
from audiolm.generate.sampler import PLAIN, guided, sample_ids, uniform_noise
from audiolm.lm.parallel import frame_ids
from audiolm.lm.stages import Stage
from audiolm.models.lm.parallel_decoder import ParallelDecoder
from audiolm.rng import derive

PASSES = 16  # of level 1, as SoundStorm; finer levels take one each
GUMBEL = 4.5  # noise of the confidence in the first pass, of MaskGIT's code; times the temperature, so that 0 is greedy
OVERLAP = 0.3  # of the crop: 3 s of 10, as generate.long_form


class Window(NamedTuple):
    """Frames [a, b) of sound i, of which those before `known` are given."""

    i: int
    a: int
    b: int
    known: int


class ParallelSampler:
    """Draws the codes of all levels; `model` in eval mode."""

    def __init__(self, model: ParallelDecoder, stage: Stage):
        self.model, self.stage, self.device = model, stage, model.embed.weight.device
        self.check = lambda: None  # before every step: what it raises ends the call

    def __call__(self, z: Sequence[np.ndarray], seeds: Sequence[int], known: Sequence[np.ndarray] | None = None,
                 first: SamplingParams = PLAIN, rest: SamplingParams = PLAIN, passes: int = PASSES) -> list[np.ndarray]:
        """codes_TQ of each z_T, RATIO frames an id; those of `known` come back first, unchanged.

        `first` draws level 1, `rest` the others. Raises ValueError for parameters that the decoder cannot follow.
        """
        for params in (first, rest):
            if params.guidance != 1 and not self.stage.dropped:
                raise ValueError(f"guidance {params.guidance:g} needs a decoder that was also trained without its condition: "
                                 "train with lm.condition_dropout above 0, or leave guidance at 1")
            if params.window is not None:
                raise ValueError(f"window {params.window}: the parallel decoder draws all frames at once, so there are no last "
                                 "ids to look back at; leave it out for coarse and fine")
        sounds = [np.zeros((RATIO * len(z_T), self.stage.slots), np.int64) for z_T in z]
        known = [sound[:0] for sound in sounds] if known is None else known
        for sound, codes_TQ in zip(sounds, known, strict=True):
            sound[:len(codes_TQ)] = codes_TQ
        each = [self._windows(i, len(sound), len(codes_TQ))
                for i, (sound, codes_TQ) in enumerate(zip(sounds, known, strict=True))]
        rows = 1 if self.device.type == "cpu" else max(1, len(sounds))
        with torch.inference_mode():
            for number in range(max(map(len, each), default=0)):  # a sound's windows follow each other
                turn = [windows[number] for windows in each if number < len(windows)]
                for at in range(0, len(turn), rows):
                    self._draw(turn[at:at + rows], z, sounds, seeds, (first, rest), passes)
        return sounds

    def _windows(self, i: int, frames: int, known: int) -> list[Window]:
        """Windows of sound i in order; all but those of a shorter sound are as long as the trained crop."""
        size, a, windows = RATIO * self.stage.crop_frames, 0, []
        overlap = RATIO * int(OVERLAP * self.stage.crop_frames)
        while known < frames:
            if known >= a + size:
                a = (known - overlap) // RATIO * RATIO
            b = min(a + size, frames)
            windows.append(Window(i, max(0, b - size), b, known))
            known = b
        return windows

    def _draw(self, windows: Sequence[Window], z: Sequence[np.ndarray], sounds: Sequence[np.ndarray], seeds: Sequence[int],
              params: tuple[SamplingParams, SamplingParams], passes: int) -> None:
        """Fills the windows of `sounds`, as one batch."""
        stage, length = self.stage, max(w.b - w.a for w in windows)
        ids_BTC = np.full((len(windows), length, 1 + stage.slots), stage.no_cond, np.int64)
        doc_BT = np.full((len(windows), length), -1, np.int64)
        new_BT = np.zeros((len(windows), length), bool)
        for row, (i, a, b, known) in enumerate(windows):
            masked_TQ = np.repeat(np.arange(a, b)[:, None] >= known, stage.slots, 1)
            ids_BTC[row, :b - a] = frame_ids(stage, z[i][a // RATIO:b // RATIO], sounds[i][a:b], masked_TQ)
            doc_BT[row, :b - a], new_BT[row, :b - a] = 0, masked_TQ[:, 0]
        ids_BTC, doc_BT, new_BT = (torch.from_numpy(x).to(self.device) for x in (ids_BTC, doc_BT, new_BT))
        own = [(derive(seeds[w.i], "window", w.a), w.b - w.a) for w in windows]
        for level in range(stage.slots):
            self._draw_level(ids_BTC, doc_BT, new_BT, level, own, params[min(level, 1)], 1 if level else passes)
        drawn_BTQ = ids_BTC[..., 1:].cpu().numpy() - stage.offset - stage.vocab * np.arange(stage.slots)
        for row, (i, a, b, known) in enumerate(windows):
            sounds[i][known:b] = drawn_BTQ[row, known - a:b - a]

    def _draw_level(self, ids_BTC: torch.Tensor, doc_BT: torch.Tensor, new_BT: torch.Tensor, level: int,
                    own: Sequence[tuple[int, int]], params: SamplingParams, passes: int) -> None:
        """Replaces a level's masks under new_BT by drawn codes, in place. `own`: each row's seed and frames."""
        (rows, length), vocab = doc_BT.shape, self.stage.vocab
        every_NV = torch.arange(vocab, device=self.device).expand(rows * length, -1)
        left_BT, total_B1 = new_BT.clone(), new_BT.sum(1, keepdim=True)
        for n in range(passes):
            self.check()
            log_NV = self._scores(ids_BTC, doc_BT, level, params.guidance).flatten(0, 1).log_softmax(1)
            noise_NB2 = [uniform_noise(derive(seed, "pass", level, n), 0, frames) for seed, frames in own]
            noise_BT2 = torch.nn.utils.rnn.pad_sequence(noise_NB2, True, 0.5).to(self.device)
            code_N = sample_ids(log_NV, noise_BT2.flatten(0, 1), params, every_NV, every_NV[:, :0])
            # the noise lets unlikely codes be first, so that sounds differ; it falls to zero with the passes
            gumbel_BT = -(-noise_BT2[..., 1].clamp(1e-12, 1 - 1e-12).log()).log()
            sure_BT = log_NV.gather(1, code_N[:, None]).view(rows, length).double()
            sure_BT = sure_BT + GUMBEL * params.temperature * (1 - (n + 1) / passes) * gumbel_BT
            rank_BT = sure_BT.masked_fill(~left_BT, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(1)
            # cosine schedule of what stays masked; each pass keeps one code at least
            count_B1 = left_BT.sum(1, keepdim=True)
            stay_B1 = (total_B1 * math.cos(math.pi / 2 * (n + 1) / passes)).long().minimum((count_B1 - 1).clamp_min(0))
            kept_BT = left_BT & (rank_BT < count_B1 - stay_B1)
            ids_BT = code_N.view(rows, length) + self.stage.offset + level * vocab
            ids_BTC[..., 1 + level] = torch.where(kept_BT, ids_BT, ids_BTC[..., 1 + level])
            left_BT = left_BT & ~kept_BT

    def _scores(self, ids_BTC: torch.Tensor, doc_BT: torch.Tensor, level: int, guidance: float) -> torch.Tensor:
        """scores_BTV of a level, with guidance away from those without the condition."""
        if guidance == 1:
            return self.model.scores(self.model.hidden(ids_BTC, doc_BT), level)
        plain_BTC = ids_BTC.clone()
        plain_BTC[..., 0] = self.stage.no_cond
        hidden = self.model.hidden(torch.cat([ids_BTC, plain_BTC]), doc_BT.repeat(2, 1))
        with_NV, without_NV = (x.flatten(0, 1) for x in self.model.scores(hidden, level).chunk(2))
        return guided(with_NV, without_NV, guidance).unflatten(0, doc_BT.shape)
