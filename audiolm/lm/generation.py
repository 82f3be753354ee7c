"""The cascade at work (paper III-D): semantic tokens, then coarse, then fine codes, then sound.

Modes: unconditional, acoustic generation from true semantic tokens, continuation of a prompt, codec resynthesis.
Shapes: wav_T float32 mono at 16 kHz; z_T int64 at 25 Hz; codes_TQ int64 at 50 Hz.  A wav has exactly the samples asked
for.  The prompt's codes come back unchanged; without a fine stage (Q' = Q) the coarse codes are all codes.
Seeds: one int a sample; the same seed gives the same sound, whatever else is generated with it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from audiolm import store
from audiolm.lm.model import load_lm
from audiolm.lm.sampling import sample
from audiolm.lm.stages import FRAMES, SEMANTIC_HZ, Stage
from audiolm.models.transformer import Transformer
from audiolm.rng import derive
from audiolm.tokenizers.base import SAMPLE_RATE, SEMANTIC_HOP, Codec, Tokenizer, padded_samples

TEMPERATURES = {"semantic": 0.6, "coarse": 0.8, "fine": 0.6}  # paper III-D


@dataclass(frozen=True)
class Sound:
    """One generated clip: wav_T, the ids stage 2 was given (deduplicated where the stage is), all its codes_TQ."""

    wav_T: np.ndarray
    z: np.ndarray
    codes_TQ: np.ndarray


@dataclass
class AudioLM:
    """A whole system. `mean_run`: semantic frames per deduplicated token in training; `fine` None where Q' = Q.

    `spent_s` adds up the wall-clock seconds of tokenize, semantic, coarse, fine and decode.
    """

    tokenizer: Tokenizer
    codec: Codec
    models: dict[str, tuple[Transformer, Stage]]  # semantic, coarse and (where Q' < Q) fine
    mean_run: float
    temperatures: Mapping[str, float] = field(default_factory=lambda: dict(TEMPERATURES))
    top_k: int | None = None
    top_p: float | None = None
    device: str = "cpu"
    spent_s: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        coarse = self.models["coarse"][1]
        have = (coarse.k, coarse.vocab, self.models["fine"][1].levels[1] if self.has_fine else coarse.levels[1])
        want = (self.tokenizer.spec.vocab, self.codec.spec.vocab, self.codec.spec.n_q)
        if have != want:
            raise ValueError(f"the stages were trained for (k, vocab, levels) = {have}, the tokenizers have {want}: "
                             "load the tokenizers and stages of one run; no lm_fine only where Q' = Q")

    @property
    def has_fine(self) -> bool:
        return "fine" in self.models

    def stage(self, name: str) -> Stage:
        return self.models[name][1]

    # -- modes ---------------------------------------------------------------------------------------------------

    def unconditional(self, seconds: float, seeds: Sequence[int]) -> list[Sound]:
        """New sounds of `seconds` each, one a seed. Raises ValueError beyond the stages' trained crops."""
        samples = round(seconds * SAMPLE_RATE)
        frames = self._frames(samples)
        zs = self._continue_z([np.zeros(0, np.int64)] * len(seeds), [frames] * len(seeds), seeds)
        return self._finish(zs, [FRAMES * frames] * len(seeds), [samples] * len(seeds), seeds, None)

    def acoustic(self, z_T: Sequence[np.ndarray], seeds: Sequence[int],
                 samples: Sequence[int] | None = None) -> list[Sound]:
        """Sounds that say what true (undeduplicated) semantic tokens say, each in a voice of its own.

        `samples` cuts each wav (default: all of its frames). Raises ValueError beyond the coarse stage's crop.
        """
        counts = [SEMANTIC_HOP * len(z) for z in z_T] if samples is None else list(samples)
        return self._finish(list(z_T), [FRAMES * len(z) for z in z_T], counts, seeds, None)

    def continuation(self, prompts: Sequence[np.ndarray], seconds: float, seeds: Sequence[int]) -> list[Sound]:
        """Prompts (wav_T at 16 kHz, cut to whole 40 ms frames before anything hears them) and `seconds` beyond each.

        Raises ValueError for a prompt below one frame or a sum beyond the stages' trained crops.
        """
        cut = [whole_frames(wav) for wav in prompts]
        totals = [len(wav) + round(seconds * SAMPLE_RATE) for wav in cut]
        frames = [self._frames(n) for n in totals]
        z_prompts, codes = self.tokenize(cut), self.encode(cut)
        more = [n - len(z) for n, z in zip(frames, z_prompts, strict=True)]
        zs = self._continue_z(z_prompts, more, seeds)
        return self._finish(zs, [FRAMES * n for n in frames], totals, seeds, codes)

    def resynthesis(self, wavs: Sequence[np.ndarray], levels: int | None = None) -> list[Sound]:
        """wavs through the codec and back with the first `levels` levels (default all): the bound of every mode."""
        codes = [c[:, :levels] for c in self.encode(wavs)]
        zs = self.tokenize(wavs)
        return [Sound(self.decode(c, len(w)), z, c) for w, z, c in zip(wavs, zs, codes, strict=True)]

    # -- stages --------------------------------------------------------------------------------------------------

    def tokenize(self, wavs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """z_T of each wav, undeduplicated; one by one, so that none hears another's padding."""
        return [codes_TQ[:, 0] for codes_TQ in self._encode(self.tokenizer, wavs)]

    def encode(self, wavs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """codes_TQ of each wav, all levels."""
        return self._encode(self.codec, wavs)

    def _encode(self, tokenizer: Tokenizer, wavs: Sequence[np.ndarray]) -> list[np.ndarray]:
        start, out = time.perf_counter(), []
        for wav in wavs:
            wav_BT = torch.zeros(1, padded_samples(len(wav)))
            wav_BT[0, :len(wav)] = torch.from_numpy(np.asarray(wav, np.float32))
            with torch.inference_mode():
                codes = tokenizer.encode(wav_BT.to(self.device), torch.tensor([len(wav)], device=self.device))[0]
            out.append(codes.cpu().numpy().astype(np.int64))
        self._spend("tokenize", start)
        return out

    def _continue_z(self, prompts: list[np.ndarray], frames: list[int], seeds: Sequence[int]) -> list[np.ndarray]:
        """Stage 1: each prompt's ids and as many more as `frames` frames take by the mean run length; no early EOS."""
        stage = self.stage("semantic")
        forced = [stage.targets(z) for z in prompts]
        run = self.mean_run if stage.dedupe else 1.0
        counts = [len(f) + math.ceil(n / run) for f, n in zip(forced, frames, strict=True)]
        return self._sample("semantic", [stage.prompt()] * len(prompts), counts, forced, seeds)

    def coarse(self, z: Sequence[np.ndarray], frames: Sequence[int], seeds: Sequence[int],
               prompts: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """Stage 2: codes_TQ' of `frames` acoustic frames each; a prompt's coarse codes_TQ' come back first, unchanged.

        Raises ValueError where a clip is longer than the stage's trained crop (no long form yet).
        """
        stage = self.stage("coarse")
        for ids, n in zip(z, frames, strict=True):
            self._check("coarse", max(len(ids), -(-n // FRAMES)))
        forced = None if prompts is None else [stage.targets(c) for c in prompts]
        out = self._sample("coarse", [stage.prompt(ids) for ids in z], [n * stage.slots for n in frames], forced, seeds)
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
        if not spans:
            return
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

    def _finish(self, zs, frames, samples, seeds, prompt_codes) -> list[Sound]:
        """Stages 2 and 3 and the decoder; prompt_codes: all levels of each prompt, or None."""
        q = self.stage("coarse").levels[1]
        first, rest = (None, None) if prompt_codes is None else ([c[:, :q] for c in prompt_codes],
                                                                 [c[:, q:] for c in prompt_codes])
        codes = self.fine(self.coarse(zs, frames, seeds, first), seeds, rest)
        return [Sound(self.decode(c, n), np.asarray(z), c) for c, n, z in zip(codes, samples, zs, strict=True)]

    def _sample(self, name: str, prompts, counts, forced, seeds) -> list[np.ndarray]:
        start = time.perf_counter()
        model, stage = self.models[name]
        out = sample(model, stage, prompts, counts, forced=forced, temperature=self.temperatures[name],
                     top_k=self.top_k, top_p=self.top_p, seeds=[derive(s, name) for s in seeds])
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


def load(paths: Mapping[str, str], device: str = "cpu", mean_run: float | None = None,
         temperatures: Mapping[str, float] | None = None) -> AudioLM:
    """The system from the steps' output folders: kmeans, codec, lm_semantic, lm_coarse and (where Q' < Q) lm_fine.

    `mean_run` defaults to the fact of that name of the `semantic_tokens` folder. Raises ValueError for a missing step.
    """
    from audiolm.tokenizers.acoustic import load_codec
    from audiolm.tokenizers.semantic import load_semantic

    for name in ("kmeans", "codec", "lm_semantic", "lm_coarse"):
        if name not in paths:
            raise ValueError(f"step {name} is missing, there are {sorted(paths)}: run the pipeline up to it")
    if mean_run is None:
        if "semantic_tokens" not in paths:
            raise ValueError("pass mean_run, or the semantic_tokens step's folder in paths")
        done = store.get_json(store.join(paths["semantic_tokens"], "done.json"))
        if done is None:
            raise ValueError(f"{paths['semantic_tokens']} holds no finished semantic_tokens step: run it")
        mean_run = done["facts"]["mean_run"]
    models = {name: load_lm(paths[f"lm_{name}"], device)
              for name in ("semantic", "coarse", "fine") if f"lm_{name}" in paths}
    return AudioLM(load_semantic(paths["kmeans"], device), load_codec(paths["codec"], device), models, float(mean_run),
                   dict(temperatures or TEMPERATURES), device=device)
