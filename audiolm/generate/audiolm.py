"""The cascade at work (paper III-D): semantic tokens, then coarse, then fine codes, then sound.

Modes: unconditional, acoustic generation from true semantic tokens, continuation of a prompt, codec resynthesis.
Shapes: wav_T float32 mono at 16 kHz; z_T int64 at 25 Hz; codes_TQ int64 at 50 Hz.  A wav never exceeds the seconds asked
for; it is shorter where stage 1 ended it.  The prompt's codes come back unchanged; without a fine stage (Q' = Q) the
coarse codes are all codes.  Seeds: one int a sample; the same seed gives the same sound, whatever else is generated with it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from audiolm.generate.params import PAPER_PARAMS, SamplingParams
from audiolm.generate.sampler import Sampler
from audiolm.lm.stages import FRAMES, SEMANTIC_HZ, Stage, dedupe
from audiolm.models.transformer import Transformer
from audiolm.rng import derive
from audiolm.tokenizers.base import ACOUSTIC_HOP, SAMPLE_RATE, SEMANTIC_HOP, Codec, Tokenizer, padded_samples

ROUNDS = 6  # of stages 1 and 2, where stage 2 needs fewer frames than stage 1's ids were to last; then EOS is barred
CAP = 1.5  # what stage 2 makes of its ids lasts at most this many times what they last on average, and at least 1 / CAP
OWN_RUN_S = 1.0  # a prompt's own mean run length counts from this length on


@dataclass(frozen=True)
class Sound:
    """One generated clip: wav_T, the ids stage 2 was given (deduplicated where the stage is), all its codes_TQ.

    Of wav_T the first `prompt` samples, of z the first `z_prompt` ids are the prompt's. `ended`: stage 1 drew EOS.
    """

    wav_T: np.ndarray
    z: np.ndarray
    codes_TQ: np.ndarray
    prompt: int = 0
    z_prompt: int = 0
    ended: bool = False


@dataclass
class AudioLM:
    """A whole system. `mean_run`: semantic frames per deduplicated token in training; `fine` None where Q' = Q.

    `spent_s` adds up the wall-clock seconds of tokenize, semantic, coarse, fine and decode.
    """

    tokenizer: Tokenizer
    codec: Codec
    models: dict[str, tuple[Transformer, Stage]]  # semantic, coarse and (where Q' < Q) fine
    mean_run: float
    draws: Mapping[str, SamplingParams] = field(default_factory=lambda: dict(PAPER_PARAMS))
    device: str = "cpu"
    spent_s: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        coarse = self.models["coarse"][1]
        have = (coarse.k, coarse.vocab, self.models["fine"][1].levels[1] if self.has_fine else coarse.levels[1])
        want = (self.tokenizer.spec.vocab, self.codec.spec.vocab, self.codec.spec.n_q)
        if have != want:
            raise ValueError(f"the stages were trained for (k, vocab, levels) = {have}, the tokenizers have {want}: "
                             "load the tokenizers and stages of one run; no lm_fine only where Q' = Q")
        self._samplers = {name: Sampler(model, stage) for name, (model, stage) in self.models.items()}

    @property
    def has_fine(self) -> bool:
        return "fine" in self.models

    def stage(self, name: str) -> Stage:
        return self.models[name][1]

    def compile_sampling(self) -> None:
        """Compiles the products of single tokens: worth it for many samples in one process."""
        for model, _ in self.models.values():
            model.compile_sampling()

    def continue_(self, prompt: str | np.ndarray, seconds: float = 7.0, samples: int = 1, seed: int = 0, prompt_s: float = 3.0,
                  sample_rate: int = SAMPLE_RATE) -> list[Sound]:
        """`samples` continuations of the first `prompt_s` seconds (0: all) of an audio file, or of wav_T or wav_TC at
        `sample_rate`. Raises ValueError, and FileNotFoundError for a file."""
        from audiolm.generate.prompts import of_array, read_prompt

        wav_T = read_prompt(prompt, prompt_s) if isinstance(prompt, str) else of_array(prompt, sample_rate, prompt_s)
        return self.continuation([wav_T] * samples, seconds, [derive(seed, "continue", i) for i in range(samples)])

    # -- modes ---------------------------------------------------------------------------------------------------

    def unconditional(self, seconds: float, seeds: Sequence[int], may_end: bool = True) -> list[Sound]:
        """New sounds of at most `seconds` each, one a seed. Raises ValueError beyond the stages' trained crops."""
        empty = [np.zeros(0, np.int64)] * len(seeds)
        return self._speak(empty, [round(seconds * SAMPLE_RATE)] * len(seeds), seeds, None, may_end)

    def continuation(self, prompts: Sequence[np.ndarray], seconds: float, seeds: Sequence[int],
                     may_end: bool = True) -> list[Sound]:
        """Prompts (wav_T at 16 kHz, cut to whole 40 ms frames before anything hears them) and at most `seconds` beyond each.

        `may_end`: stage 1 may draw EOS before. Raises ValueError for a prompt below one frame or a sum beyond the stages'
        trained crops.
        """
        cut = [whole_frames(wav) for wav in prompts]
        totals = [len(wav) + round(seconds * SAMPLE_RATE) for wav in cut]
        for n in totals:
            self._frames(n)
        return self._speak(self.tokenize(cut), totals, seeds, self.encode(cut), may_end)

    def acoustic(self, z_T: Sequence[np.ndarray], seeds: Sequence[int],
                 samples: Sequence[int] | None = None) -> list[Sound]:
        """Sounds that say what true (undeduplicated) semantic tokens say, each in a voice of its own.

        With `samples` each wav has exactly as many, at most all of its frames; without, stage 2's EOS ends it where tokens are
        deduplicated and so do not tell how long they last. Raises ValueError beyond the coarse stage's crop.
        """
        frames = [FRAMES * len(z) for z in z_T]
        zs = [self.stage("coarse").semantic_ids(z) for z in z_T]
        if samples is None and self.stage("coarse").dedupe:
            most = FRAMES * self.stage("coarse").crop_frames
            codes = self.coarse(zs, [max(n, min(most, math.ceil(CAP * n))) for n in frames], seeds,
                                least=[int(n / CAP) for n in frames])
        else:
            codes = self.coarse(zs, frames, seeds)
        counts = [ACOUSTIC_HOP * len(c) for c in codes] if samples is None else list(samples)
        return [Sound(self.decode(c, n), z, c)
                for z, c, n in zip(zs, self.fine(codes, seeds), counts, strict=True)]

    def resynthesis(self, wavs: Sequence[np.ndarray], levels: int | None = None) -> list[Sound]:
        """wavs through the codec and back with the first `levels` levels (default all): the bound of every mode."""
        codes = [c[:, :levels] for c in self.encode(wavs)]
        zs = [self.stage("semantic").targets(z) for z in self.tokenize(wavs)]
        return [Sound(self.decode(c, len(w)), z, c) for w, z, c in zip(wavs, zs, codes, strict=True)]

    # -- stages --------------------------------------------------------------------------------------------------

    def tokenize(self, wavs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """z_T of each wav, undeduplicated; one by one, so that none hears another's padding."""
        return [codes_TQ[:, 0] for codes_TQ in self._encode(self.tokenizer, wavs)]

    def encode(self, wavs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """codes_TQ of each wav, all levels."""
        return self._encode(self.codec, wavs)

    def _encode(self, tokenizer: Tokenizer, wavs: Sequence[np.ndarray]) -> list[np.ndarray]:
        start, made = time.perf_counter(), {}
        keys = [np.asarray(wav, np.float32).tobytes() for wav in wavs]  # samples of one prompt share its tokens
        for key, wav in dict(zip(keys, wavs, strict=True)).items():
            wav_BT = torch.zeros(1, padded_samples(len(wav)))
            wav_BT[0, :len(wav)] = torch.from_numpy(np.asarray(wav, np.float32))
            with torch.inference_mode():
                codes = tokenizer.encode(wav_BT.to(self.device), torch.tensor([len(wav)], device=self.device))[0]
            made[key] = codes.cpu().numpy().astype(np.int64)
        self._spend("tokenize", start)
        return [made[key] for key in keys]

    def semantic(self, z: Sequence[np.ndarray], more: Sequence[int], seeds: Sequence[int],
                 may_end: bool = True) -> tuple[list[np.ndarray], list[bool]]:
        """Stage 1: each row's ids `z` and at most `more` beyond them, within the trained crops; whether EOS ended them."""
        stage = self.stage("semantic")
        counts = [max(len(ids), min(len(ids) + n, self._most)) for ids, n in zip(z, more, strict=True)]
        out = self._sample("semantic", [stage.prompt()] * len(z), counts, z, seeds, 0 if may_end else None)
        return [stage.unpack(ids) for ids in out], [bool(len(ids) and ids[-1] == stage.eos) for ids in out]

    def coarse(self, z: Sequence[np.ndarray], frames: Sequence[int], seeds: Sequence[int],
               known: Sequence[np.ndarray] | None = None, least: Sequence[int] | None = None) -> list[np.ndarray]:
        """Stage 2: codes_TQ' of `frames` acoustic frames each, or of fewer, at `least` so many, where it ends by itself; z as
        the stage takes it. `known` coarse codes_TQ' come back first, unchanged. Raises ValueError beyond the trained crop."""
        stage = self.stage("coarse")
        for ids, n in zip(z, frames, strict=True):
            self._check("coarse", max(len(ids), -(-n // FRAMES)))
        forced = None if known is None else [stage.targets(c) for c in known]
        out = self._sample("coarse", [stage.prompt(ids) for ids in z], [n * stage.slots for n in frames], forced, seeds,
                           None if least is None else [n * stage.slots for n in least])
        return [stage.unpack(ids) for ids in out]

    def fine(self, coarse: Sequence[np.ndarray], seeds: Sequence[int],
             prompts: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """Stage 3: codes_TQ of all levels from coarse codes_TQ', in chunks of the stage's crop sampled as one batch.

        The grid starts at 0. Where a chunk overlaps the prompt, the prompt's fine codes (`prompts`, the fine levels)
        are forced; what is left at the end is a chunk that ends with the clip, its known codes forced.
        """
        if not self.has_fine:
            return [np.asarray(c) for c in coarse]
        stage, coarse = self.stage("fine"), [np.asarray(c) for c in coarse]
        size, n_fine = FRAMES * stage.crop_frames, stage.slots
        known = [np.zeros((0, n_fine), np.int64) for _ in coarse] if prompts is None else list(prompts)
        done = [np.zeros((len(c), n_fine), np.int64) for c in coarse]
        grid = [(i, a, min(a + size, len(c))) for i, c in enumerate(coarse)
                for a in range(0, max(size, len(c) - len(c) % size), size)]
        self._chunks(coarse, grid, known, done, seeds)
        tails = [(i, len(c) - size, len(c)) for i, c in enumerate(coarse) if len(c) > size and len(c) % size]
        reach = [max(len(c) - len(c) % size, len(k)) for c, k in zip(coarse, known, strict=True)]
        for d, k in zip(done, known, strict=True):
            d[:len(k)] = k
        self._chunks(coarse, tails, [d[:n] for d, n in zip(done, reach, strict=True)], done, seeds)
        return [np.concatenate([c, d], 1) for c, d in zip(coarse, done, strict=True)]

    def _chunks(self, coarse, spans, known, done, seeds) -> None:
        """Fills done[i][a:b] for the spans (i, a, b), as one batch."""
        stage = self.stage("fine")
        out = self._sample("fine", [stage.prompt(coarse_TQ=coarse[i][a:b]) for i, a, b in spans],
                           [(b - a) * stage.slots for _, a, b in spans],
                           [stage.targets(known[i][a:b]) for i, a, b in spans],
                           [derive(seeds[i], "chunk", a) for i, a, _ in spans])
        for (i, a, b), ids in zip(spans, out, strict=True):
            done[i][a:b] = stage.unpack(ids)

    def decode(self, codes_TQ: np.ndarray, samples: int) -> np.ndarray:
        """wav_T of exactly `samples` samples, at most 320 x T of them. Raises ValueError if it is not finite."""
        start = time.perf_counter()
        with torch.inference_mode():
            wav_BT = self.codec.decode(torch.from_numpy(np.ascontiguousarray(codes_TQ))[None].to(self.device))
        wav_T = wav_BT[0, :samples].float().cpu().numpy()
        self._spend("decode", start)
        if len(wav_T) != samples:
            raise ValueError(f"{len(codes_TQ)} frames give {len(wav_T)} samples, {samples} were asked for")
        if not np.isfinite(wav_T).all():
            raise ValueError("the codec decoded samples that are not finite: look at the codec step's losses")
        return wav_T

    # -- helpers -------------------------------------------------------------------------------------------------

    @property
    def _most(self) -> int:
        """Semantic ids that stages 1 and 2 can take."""
        return min(self.stage("semantic").crop_frames, self.stage("coarse").crop_frames)

    def _speak(self, prompts: Sequence[np.ndarray], samples: Sequence[int], seeds: Sequence[int],
               codes: Sequence[np.ndarray] | None, may_end: bool) -> list[Sound]:
        """All stages: sounds of at most `samples` samples, prompts (z_T and all levels of codes_TQ) included.

        A deduplicated id does not tell how long it lasts: stage 1 draws as many as are expected to last long enough, stage 2
        says by its EOS how long they do, and where that is too short stage 1 goes on.
        """
        stage, q = self.stage("semantic"), self.stage("coarse").levels[1]
        frames = [self._frames(n) for n in samples]
        runs = [len(z) / len(dedupe(z)) if len(z) >= OWN_RUN_S * SEMANTIC_HZ else self.mean_run for z in prompts]
        runs = runs if stage.dedupe else [1.0] * len(runs)
        heads = [stage.targets(z) for z in prompts]
        zs, ended = list(heads), [False] * len(heads)
        ys = [np.zeros((0, q), np.int64) for _ in heads] if codes is None else [c[:, :q] for c in codes]
        live = list(range(len(heads)))
        for turn in range(ROUNDS):
            more = [math.ceil((frames[i] - len(ys[i]) / FRAMES) / runs[i]) for i in live]
            last = turn == ROUNDS - 1
            z, ends = self.semantic([zs[i] for i in live], more, [seeds[i] for i in live], may_end)
            for i, ids, end in zip(live, z, ends, strict=True):
                zs[i], ended[i] = ids, end
            spans = [self._span(frames[i], len(zs[i]) * runs[i], ended[i], last or len(zs[i]) >= self._most) for i in live]
            y = self.coarse([zs[i] for i in live], [max(most, len(ys[i])) for i, (_, most) in zip(live, spans, strict=True)],
                            [seeds[i] for i in live], [ys[i] for i in live], [least for least, _ in spans])
            for i, c in zip(live, y, strict=True):
                ys[i] = c
            live = [i for i in live if len(ys[i]) < FRAMES * frames[i] and not ended[i]]
            if not live:
                break
        all_codes = self.fine(ys, seeds, None if codes is None else [c[:, q:] for c in codes])
        wavs = [self.decode(c, min(n, ACOUSTIC_HOP * len(c))) for c, n in zip(all_codes, samples, strict=True)]
        return [Sound(wav, z, c, SEMANTIC_HOP * len(prompt), len(head), end) for wav, z, c, prompt, head, end
                in zip(wavs, zs, all_codes, prompts, heads, ended, strict=True)]

    def _span(self, frames: int, lasting: float, ended: bool, last: bool) -> tuple[int, int]:
        """Acoustic frames that stage 2 shall draw, (at least, at most), for ids that are expected to last so many semantic
        frames. Where stage 1 has not ended the sound and cannot go on, all frames."""
        if not self.stage("semantic").dedupe:
            frames = min(frames, int(lasting))
            return FRAMES * frames, FRAMES * frames
        if ended:
            frames = min(frames, math.ceil(CAP * lasting))
        elif last:
            return FRAMES * frames, FRAMES * frames
        return FRAMES * min(frames, int(lasting / CAP)), FRAMES * frames

    def _sample(self, name: str, prompts, counts, forced, seeds,
                eos_from: int | Sequence[int] | None = None) -> list[np.ndarray]:
        start = time.perf_counter()
        out = self._samplers[name](prompts, counts, forced=forced, eos_from=eos_from, draw=self.draws[name],
                                   seeds=[derive(s, name) for s in seeds])
        self._spend(name, start)
        return out

    def _spend(self, name: str, start: float) -> None:
        self.spent_s[name] = self.spent_s.get(name, 0.0) + time.perf_counter() - start

    def _frames(self, samples: int) -> int:
        """Semantic frames that hold `samples` samples. Raises ValueError beyond a stage's trained crop."""
        if samples < 1:
            raise ValueError(f"seconds must ask for at least one sample, got {samples}")
        frames = padded_samples(samples) // SEMANTIC_HOP
        self._check("semantic", frames)
        self._check("coarse", frames)
        return frames

    def _check(self, name: str, frames: int) -> None:
        stage = self.stage(name)
        if frames > stage.crop_frames:
            raise ValueError(f"{frames / SEMANTIC_HZ:g} s (prompt and continuation together) exceed the "
                             f"{stage.crop_s:g} s the {name} stage was trained on: ask for at most that, or raise "
                             f"lm.{name}.crop_s and train")


def whole_frames(wav_T: np.ndarray) -> np.ndarray:
    """A prompt cut to whole 640-sample frames as waveform, so that no token of it has heard more. Raises ValueError."""
    wav_T = np.asarray(wav_T, np.float32)
    if wav_T.ndim != 1 or len(wav_T) < SEMANTIC_HOP:
        raise ValueError(f"a prompt must be mono, at least {SEMANTIC_HOP} samples at 16 kHz, got shape {wav_T.shape}")
    if not np.isfinite(wav_T).all():
        raise ValueError("the prompt has samples that are not finite: look at the file")
    return wav_T[:len(wav_T) // SEMANTIC_HOP * SEMANTIC_HOP]
