"""AudioLM's cascade (2209.03143 III-D): semantic tokens, then coarse codes, then fine codes, then sound.

Modes: unconditional, acoustic generation from true semantic tokens, continuation of a prompt, codec resynthesis.  A wav is
at most as long as asked for, shorter where stage 1 drew EOS.  The prompt's codes come back unchanged.  Without a fine
stage (Q' = Q) the coarse codes are all codes.  A parallel decoder, where there is one, draws all codes in place of both stages.
Seeds: one int a sample; a sample depends on its seed and inputs, never on the others of its batch.
Shapes: wav_T float32 mono at 16 kHz; z_T int64 at 25 Hz; codes_TQ int64 at 50 Hz.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from audiolm.data.tokens import RATIO
from audiolm.generate.by_turns import DURATION_FACTOR, by_turns
from audiolm.generate.frame_sampler import FrameSampler
from audiolm.generate.graphs import kept_on
from audiolm.generate.parallel import ParallelSampler
from audiolm.generate.params import PAPER_PARAMS, SamplingParams
from audiolm.generate.prompts import prompt_from_array, read_prompt, whole_frames
from audiolm.generate.sampler import Sampler
from audiolm.generate.sound import Sound
from audiolm.lm.model import Model
from audiolm.lm.stages import SEMANTIC_HZ, Stage
from audiolm.models.lm.block import ROWS
from audiolm.models.lm.transformer import Transformer
from audiolm.rng import derive
from audiolm.tokenizers.base import ACOUSTIC_HOP, SAMPLE_RATE, SEMANTIC_HOP, Codec, Tokenizer, padded_samples
from audiolm.tokenizers.hearing import HearingCodec

MODES = ("continuation", "unconditional", "acoustic", "resynthesis")


@dataclass
class AudioLM:
    """Tokenizers and stages of one run. `mean_run`: semantic frames per deduplicated token in training.

    `spent_s` adds up the wall-clock seconds of tokenize, semantic, coarse, fine (or parallel) and decode.
    """

    tokenizer: Tokenizer
    codec: Codec
    models: dict[str, tuple[Model, Stage]]  # semantic, coarse and (where Q' < Q) fine, or parallel
    mean_run: float
    sampling: Mapping[str, SamplingParams] = field(default_factory=lambda: dict(PAPER_PARAMS))  # by stage
    hearing: HearingCodec | None = None  # decodes what is drawn, in the codec's place
    device: str = "cpu"
    spent_s: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        first = self.acoustic_stage
        stages = (first.k, first.vocab, self.stage("fine").levels[1] if self.has_fine else first.levels[1])
        tokenizers = (self.tokenizer.spec.vocab, self.codec.spec.vocab, self.codec.spec.n_q)
        if stages != tokenizers:
            raise ValueError(f"the stages were trained for (k, vocab, levels) = {stages}, the tokenizers have {tokenizers}: "
                             "load the tokenizers and stages of one run; no lm_fine only where Q' = Q")
        kept = kept_on(torch.device(self.device))
        self._samplers = {name: ParallelSampler(model, stage) if name == "parallel" else
                          (FrameSampler if stage.frames else Sampler)(model, stage, kept)
                          for name, (model, stage) in self.models.items()}

    @property
    def has_fine(self) -> bool:
        return "fine" in self.models

    def stage(self, name: str) -> Stage:
        return self.models[name][1]

    @property
    def acoustic_stage(self) -> Stage:
        """The stage that follows stage 1: coarse or parallel."""
        return self.stage("parallel" if "parallel" in self.models else "coarse")

    @property
    def longest(self) -> int:
        """Semantic frames, or ids, of the longest sound that the stages were trained for; a parallel decoder has no bound."""
        return min(self.stage(name).crop_frames for name in ("semantic", "coarse") if name in self.models)

    def compile_sampling(self) -> None:
        """Compiles a token's layers and draws, in every stage that draws token by token.

        Worth it for many samples in one process: each number of rows and each run of keys takes seconds.
        """
        for sampler in self._samplers.values():
            if not isinstance(sampler, ParallelSampler):
                sampler.compile()

    def exact_batches(self, on: bool) -> None:
        """On (the default), a sample's bits on a CPU are the same in any batch; off, one sample alone is faster."""
        for model, _ in self.models.values():
            for part in model.modules():
                if isinstance(part, Transformer):
                    part.rows = ROWS if on else 1

    def stop_when(self, check: Callable[[], None]) -> None:
        """Calls `check` before every step of a stage from now on; what it raises ends the call that it is in."""
        for sampler in self._samplers.values():
            sampler.check = check

    def continue_(self, prompt: str | np.ndarray, seconds: float = 7.0, samples: int = 1, seed: int = 0, prompt_s: float = 3.0,
                  sample_rate: int = SAMPLE_RATE) -> list[Sound]:
        """`samples` continuations of the first `prompt_s` seconds (0: all) of an audio file, or of wav_T or wav_TC at
        `sample_rate`. Raises ValueError, and FileNotFoundError for a file."""
        wav_T = read_prompt(prompt, prompt_s) if isinstance(prompt, str) else prompt_from_array(prompt, sample_rate, prompt_s)
        return self.continuation([wav_T] * samples, seconds, [derive(seed, "continue", i) for i in range(samples)])

    # -- modes ---------------------------------------------------------------------------------------------------

    def generate(self, mode: str, wavs: Sequence[np.ndarray], seconds: float | None, seeds: Sequence[int],
                 may_end: bool = True) -> list[Sound]:
        """A sound a seed in one of MODES, of the prompts `wavs` (not read by unconditional); acoustic as long as its wav."""
        if mode == "unconditional":
            return self.unconditional(seconds, seeds, may_end)
        if mode == "continuation":
            return self.continuation(wavs, seconds, seeds, may_end)
        if mode == "acoustic":
            return self.acoustic(self.tokenize(wavs), seeds, [*map(len, wavs)])
        return self.resynthesis(wavs)

    def unconditional(self, seconds: float, seeds: Sequence[int], may_end: bool = True) -> list[Sound]:
        """New sounds of at most `seconds` each, one a seed. Raises ValueError beyond the stages' trained crops."""
        empty = [np.zeros(0, np.int64)] * len(seeds)
        return self._cascade(empty, [round(seconds * SAMPLE_RATE)] * len(seeds), seeds, None, may_end)

    def continuation(self, prompts: Sequence[np.ndarray], seconds: float, seeds: Sequence[int],
                     may_end: bool = True) -> list[Sound]:
        """Prompts (wav_T, cut to whole 40 ms frames before they are tokenized) and at most `seconds` beyond each.

        `may_end`: stage 1 may draw EOS. Raises ValueError for a prompt below one frame, and beyond the stages' crops.
        """
        cut = [whole_frames(wav) for wav in prompts]
        totals = [len(wav) + round(seconds * SAMPLE_RATE) for wav in cut]
        for n in totals:
            self._frames(n)
        return self._cascade(self.tokenize(cut), totals, seeds, self.encode(cut), may_end)

    def acoustic(self, z_T: Sequence[np.ndarray], seeds: Sequence[int],
                 samples: Sequence[int] | None = None) -> list[Sound]:
        """Sounds with the content of true (undeduplicated) semantic tokens, each in a random voice.

        With `samples` each wav has exactly as many, at most all of its frames. Without, stage 2's EOS ends it where tokens
        are deduplicated. Raises ValueError beyond the coarse stage's crop.
        """
        if samples is None and self.acoustic_stage.dedupe:
            frames, most = [RATIO * len(z) for z in z_T], RATIO * self.stage("coarse").crop_frames
            codes = self.fine(self.coarse(z_T, [max(n, min(most, math.ceil(DURATION_FACTOR * n))) for n in frames], seeds,
                                          least=[int(n / DURATION_FACTOR) for n in frames]), seeds)
        else:
            codes = self.codes(z_T, seeds)
        counts = [ACOUSTIC_HOP * len(c) for c in codes] if samples is None else list(samples)
        return [Sound(self.decode(c, n, z), self._ids(z), c) for z, c, n in zip(z_T, codes, counts, strict=True)]

    def resynthesis(self, wavs: Sequence[np.ndarray], levels: int | None = None) -> list[Sound]:
        """wavs through the codec and back, with the first `levels` levels (default all): the upper bound of every mode."""
        codes = [c[:, :levels] for c in self.encode(wavs)]
        zs = [self._ids(z) for z in self.tokenize(wavs)]
        return [Sound(self.decode(c, len(w)), z, c) for w, z, c in zip(wavs, zs, codes, strict=True)]

    # -- stages --------------------------------------------------------------------------------------------------

    def tokenize(self, wavs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """z_T of each wav, undeduplicated."""
        return [codes_TQ[:, 0] for codes_TQ in self._encode(self.tokenizer, wavs)]

    def encode(self, wavs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """codes_TQ of each wav, all levels."""
        return self._encode(self.codec, wavs)

    def _encode(self, tokenizer: Tokenizer, wavs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Each wav alone, so that its tokens do not depend on another's padding; equal wavs once."""
        start, encoded = time.perf_counter(), {}
        keys = [np.asarray(wav, np.float32).tobytes() for wav in wavs]
        for key, wav in dict(zip(keys, wavs, strict=True)).items():
            wav_BT = torch.zeros(1, padded_samples(len(wav)))
            wav_BT[0, :len(wav)] = torch.from_numpy(np.asarray(wav, np.float32))
            with torch.inference_mode():
                codes = tokenizer.encode(wav_BT, torch.tensor([len(wav)]))[0]  # which moves the sound to its device
            encoded[key] = codes.cpu().numpy().astype(np.int64)
        self._spend("tokenize", start)
        return [encoded[key] for key in keys]

    def semantic(self, z: Sequence[np.ndarray], more: Sequence[int], seeds: Sequence[int],
                 may_end: bool = True) -> tuple[list[np.ndarray], list[bool]]:
        """Stage 1: (each row's `z` and at most `more` beyond it, within the trained crops; True where EOS ended it).

        z and `more` are frames; where the stage deduplicates without lengths they are deduplicated ids. Nothing is drawn for
        an acoustic stage that hears no tokens (lm.ablation): id 0 then stands for each frame.
        """
        stage, most = self.stage("semantic"), self.longest
        more = [max(0, min(n, most - len(ids))) for ids, n in zip(z, more, strict=True)]
        if not self.acoustic_stage.conditioned:
            return [np.pad(z_T, (0, n)) for z_T, n in zip(z, more, strict=True)], [False] * len(z)
        if stage.lengths:
            start = time.perf_counter()
            out = self._samplers["semantic"].runs(z, more, [derive(s, "semantic") for s in seeds], may_end,
                                                  self.sampling["semantic"])
            self._spend("semantic", start)
            return [z_T for z_T, _ in out], [ended for _, ended in out]
        counts = [len(ids) + n for ids, n in zip(z, more, strict=True)]
        out = self._sample("semantic", [stage.prompt()] * len(z), counts, z, seeds, 0 if may_end else None)
        return [stage.unpack(ids) for ids in out], [bool(len(ids) and ids[-1] == stage.eos) for ids in out]

    def codes(self, z: Sequence[np.ndarray], seeds: Sequence[int],
              known: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """codes_TQ of all levels, RATIO frames for each id of z. Codes of all levels in `known` come back first, unchanged.

        The acoustic stages one after the other, or the parallel decoder. Raises ValueError beyond the coarse stage's crop.
        """
        if "parallel" in self.models:
            start = time.perf_counter()
            out = self._samplers["parallel"](z, [derive(s, "parallel") for s in seeds], known, self.sampling["coarse"],
                                             self.sampling["fine"])
            self._spend("parallel", start)
            return out
        q = self.stage("coarse").levels[1]
        coarse = self.coarse(z, [RATIO * len(ids) for ids in z], seeds, known and [c[:, :q] for c in known])
        return self.fine(coarse, seeds, known and [c[:, q:] for c in known])

    def coarse(self, z: Sequence[np.ndarray], frames: Sequence[int], seeds: Sequence[int],
               known: Sequence[np.ndarray] | None = None, least: Sequence[int] | None = None) -> list[np.ndarray]:
        """Stage 2: coarse codes_TQ of `frames` acoustic frames each, for z (deduplicated or not where the stage is).

        With `least`, EOS may end them from so many frames on. `known` coarse codes come back first, unchanged.
        Raises ValueError beyond the trained crop.
        """
        stage = self.stage("coarse")
        for ids, n in zip(z, frames, strict=True):
            self._check("coarse", max(len(ids), -(-n // RATIO)))
        cond = [stage.conditions(ids) for ids in z]
        forced = None if known is None else [stage.targets(c) for c in known]
        out = self._sample("coarse", [stage.prompt(ids) for ids in z], [n * stage.slots for n in frames], forced, seeds,
                           None if least is None else [n * stage.slots for n in least], cond)
        return [stage.unpack(ids) for ids in out]

    def fine(self, coarse: Sequence[np.ndarray], seeds: Sequence[int],
             prompts: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """Stage 3: codes_TQ of all levels from coarse codes, in chunks of the stage's crop; all clips' chunks are one batch.

        `prompts`: each prompt's codes of the fine levels, which come back unchanged.
        """
        if not self.has_fine:
            return [np.asarray(c) for c in coarse]
        stage, coarse = self.stage("fine"), [np.asarray(c) for c in coarse]
        size, n_fine = RATIO * stage.crop_frames, stage.slots
        known = [np.zeros((0, n_fine), np.int64) for _ in coarse] if prompts is None else list(prompts)
        fine = [np.zeros((len(c), n_fine), np.int64) for c in coarse]
        # whole chunks on a grid from 0 (one shorter chunk where the clip is shorter); independent given the coarse codes
        grid = [(i, a, min(a + size, len(c))) for i, c in enumerate(coarse)
                for a in range(0, max(size, len(c) - len(c) % size), size)]
        self._fine_chunks(coarse, grid, known, fine, seeds)
        # what the grid leaves at a clip's end: a full chunk that ends with the clip, its beginning forced to be what is there
        tails = [(i, len(c) - size, len(c)) for i, c in enumerate(coarse) if len(c) > size and len(c) % size]
        reach = [max(len(c) - len(c) % size, len(k)) for c, k in zip(coarse, known, strict=True)]
        for f, k in zip(fine, known, strict=True):
            f[:len(k)] = k
        self._fine_chunks(coarse, tails, [f[:n] for f, n in zip(fine, reach, strict=True)], fine, seeds)
        return [np.concatenate([c, f], 1) for c, f in zip(coarse, fine, strict=True)]

    def _fine_chunks(self, coarse: Sequence[np.ndarray], spans: Sequence[tuple[int, int, int]], known: Sequence[np.ndarray],
                     fine: Sequence[np.ndarray], seeds: Sequence[int]) -> None:
        """Fills fine[i][a:b] of the spans (i, a, b), as one batch; codes of `known` that a span covers are forced."""
        stage = self.stage("fine")
        out = self._sample("fine", [stage.prompt(coarse_TQ=coarse[i][a:b]) for i, a, b in spans],
                           [(b - a) * stage.slots for _, a, b in spans],
                           [stage.targets(known[i][a:b]) for i, a, b in spans],
                           [derive(seeds[i], "chunk", a) for i, a, _ in spans],
                           cond=[stage.conditions(coarse_TQ=coarse[i][a:b]) for i, a, b in spans])
        for (i, a, b), ids in zip(spans, out, strict=True):
            fine[i][a:b] = stage.unpack(ids)

    def decode(self, codes_TQ: np.ndarray, samples: int, z_T: np.ndarray | None = None, true: int = 0,
               voice_TQ: np.ndarray | None = None) -> np.ndarray:
        """wav_T of exactly `samples` samples, at most 320 x T of them. Raises ValueError if it is not finite.

        z_T: for a decoder that hears: semantic ids of codes that were drawn behind the first `true`, in the voice of voice_TQ.
        """
        start = time.perf_counter()
        if self.hearing and z_T is not None:
            wav_T = self.hearing.decode(codes_TQ, z_T, true, voice_TQ)
        else:
            with torch.inference_mode():
                wav_T = self.codec.decode(torch.from_numpy(np.ascontiguousarray(codes_TQ))[None].to(self.device))[0]
        wav_T = wav_T[:samples].float().cpu().numpy()
        self._spend("decode", start)
        if len(wav_T) != samples:
            raise ValueError(f"{len(codes_TQ)} frames give {len(wav_T)} samples, {samples} were asked for")
        if not np.isfinite(wav_T).all():
            raise ValueError("the codec decoded samples that are not finite: look at the codec step's losses")
        return wav_T

    # -- the cascade ---------------------------------------------------------------------------------------------

    def _ids(self, z_T: np.ndarray) -> np.ndarray:
        """Semantic ids as stage 1 has them."""
        return self.stage("semantic").targets(z_T)

    def _cascade(self, prompts: Sequence[np.ndarray], samples: Sequence[int], seeds: Sequence[int],
                 codes: Sequence[np.ndarray] | None, may_end: bool) -> list[Sound]:
        """All stages: sounds of at most `samples` samples, prompts (z_T and all levels of codes_TQ) included."""
        frames = [self._frames(n) for n in samples]
        if self.acoustic_stage.dedupe:
            zs, all_codes, heads, ended = by_turns(self, prompts, frames, seeds, codes, may_end)
            heard = [None] * len(zs)  # no token has a place in time
        else:
            heard, ended = self.semantic(prompts, [n - len(z) for n, z in zip(frames, prompts, strict=True)], seeds, may_end)
            all_codes = self.codes(heard, seeds, codes)
            known = [self._ids(z) for z in prompts]
            zs, heads = [self._ids(z) for z in heard] if self.acoustic_stage.conditioned else known, [*map(len, known)]
        wavs = [self.decode(c, min(n, ACOUSTIC_HOP * len(c)), z, RATIO * len(prompt), c[:RATIO * len(prompt) or None])
                for c, n, z, prompt in zip(all_codes, samples, heard, prompts, strict=True)]
        return [Sound(wav, z, c, SEMANTIC_HOP * len(prompt), head, end) for wav, z, c, prompt, head, end
                in zip(wavs, zs, all_codes, prompts, heads, ended, strict=True)]

    # -- helpers -------------------------------------------------------------------------------------------------

    def _sample(self, name: str, prompts: Sequence[np.ndarray], counts: Sequence[int], forced: Sequence[np.ndarray] | None,
                seeds: Sequence[int], eos_from: int | Sequence[int] | None = None,
                cond: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """Target ids of one stage; each stage has its own stream of every seed."""
        start = time.perf_counter()
        out = self._samplers[name](prompts, counts, forced=forced, eos_from=eos_from, params=self.sampling[name],
                                   seeds=[derive(s, name) for s in seeds], cond=cond)
        self._spend(name, start)
        return out

    def _spend(self, name: str, start: float) -> None:
        self.spent_s[name] = self.spent_s.get(name, 0.0) + time.perf_counter() - start

    def _frames(self, samples: int) -> int:
        """Semantic frames that hold `samples` samples. Raises ValueError beyond a stage's trained crop."""
        if samples < 1:
            raise ValueError(f"seconds must ask for at least one sample, got {samples}")
        frames = padded_samples(samples) // SEMANTIC_HOP
        for name in ("semantic", "coarse"):
            if name in self.models:
                self._check(name, frames)
        return frames

    def _check(self, name: str, frames: int) -> None:
        stage = self.stage(name)
        if frames > stage.crop_frames:
            raise ValueError(f"{frames / SEMANTIC_HZ:g} s (prompt and continuation together) exceed the "
                             f"{stage.crop_s:g} s the {name} stage was trained on: ask for at most that, or raise "
                             f"lm.{name}.crop_s and train")
