"""One task of a generation: reads prompts, generates their samples together, writes what eval.sounds describes.

A prompt that cannot be used, or not by these models, fails alone.  wav_T: float32 mono at 16 kHz.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

import audiolm
from audiolm import store
from audiolm.data.audio import wav_bytes
from audiolm.data.look import told
from audiolm.eval.plots import spectrogram
from audiolm.eval.sounds import Asked, Sample, settings
from audiolm.lm.prompts import read_prompt, seed_of
from audiolm.lm.system import load_system
from audiolm.tokenizers.base import SAMPLE_RATE
from audiolm.tokenizers.files import appears

if TYPE_CHECKING:
    from audiolm.lm.generation import AudioLM

SHOWN_S = 60.0  # of a sound, in its picture


@dataclass
class Prompt:
    wav_T: np.ndarray
    z_T: np.ndarray


@dataclass
class Made:
    """A sound as it comes; `facts` is whole once all pieces came."""

    pieces: Iterable[np.ndarray]
    prompt: int  # samples of the prompt that it begins with
    facts: dict[str, Any] = field(default_factory=dict)


def make(asked: Asked, samples: Sequence[Sample], folder: str, device: str) -> list[str]:
    """Makes the samples; returns a line for each prompt that failed."""
    lm = load_system(asked.models, device, asked.draws)
    prompts, wrong = {}, {}
    lm.spent_s.clear()
    for sample in samples:
        if not sample.prompt or sample.prompt in prompts or sample.prompt in wrong:
            continue
        try:
            wav_T = read_prompt(sample.place, asked.prompt_s)
        except Exception as e:  # noqa: BLE001  whatever a file or a place raises, the others have their turn
            wrong[sample.prompt] = told(sample.prompt, e)
            continue
        prompts[sample.prompt] = Prompt(wav_T, lm.tokenize([wav_T])[0])
        name = store.join(folder, "page", f"{sample.name}-prompt")
        store.put(f"{name}.wav", wav_bytes(wav_T))
        store.put(f"{name}.png", spectrogram(wav_T[:round(SHOWN_S * SAMPLE_RATE)], "prompt"))
    return [*wrong.values(), *_make(lm, asked, [s for s in samples if s.prompt not in wrong], prompts, folder)]


def _make(lm: AudioLM, asked: Asked, samples: Sequence[Sample], prompts: dict[str, Prompt], folder: str) -> list[str]:
    """All together; where that fails, each alone."""
    if not samples:
        return []
    try:
        for sample, made in zip(samples, _generate(lm, asked, samples, prompts), strict=True):
            _publish(folder, asked, sample, made)
        return []
    except ValueError as e:
        if len(samples) == 1:
            return [told(samples[0].prompt or asked.mode, e)]
    return [line for sample in samples for line in _make(lm, asked, [sample], prompts, folder)]


def _generate(lm: AudioLM, asked: Asked, samples: Sequence[Sample], prompts: dict[str, Prompt]) -> list[Made]:
    seeds = [seed_of(asked.seed, s.prompt, s.number) for s in samples]
    of = [prompts.get(s.prompt) for s in samples]
    if asked.long:
        return [_long(lm, asked, of[0], seeds[0])]
    began, wavs = time.perf_counter(), [p.wav_T for p in of if p]
    # MERGE: may_end=not asked.whole to the first two; sound.prompt for `heard`, sound.ended for False
    if asked.mode == "unconditional":
        sounds = lm.unconditional(asked.seconds, seeds)
    elif asked.mode == "continuation":
        sounds = lm.continuation(wavs, asked.seconds, seeds)
    elif asked.mode == "acoustic":
        sounds = lm.acoustic([p.z_T for p in of], seeds, [*map(len, wavs)])
    else:
        sounds = lm.resynthesis(wavs)
    n, wall_s, spent_s = len(samples), time.perf_counter() - began, dict(lm.spent_s)
    lm.spent_s.clear()
    made = []
    for sound, p in zip(sounds, of, strict=True):
        heard = len(p.wav_T) if asked.mode == "continuation" else 0
        facts = {"ended": False, "prompt_s": len(p.wav_T) / SAMPLE_RATE if p else None, "device": lm.device,
                 **_took(len(sound.wav_T) - heard, wall_s / n, {k: v / n for k, v in spent_s.items()})}
        if asked.mode in ("continuation", "unconditional"):
            facts |= _rates(lm, p.z_T if p else np.zeros(0, np.int64), len(sound.z), heard, len(sound.wav_T))
        made.append(Made([sound.wav_T], heard, facts))
    return made


def _long(lm: AudioLM, asked: Asked, prompt: Prompt, seed: int) -> Made:
    """A sound that is generated while it is written."""
    from audiolm.lm.long_form import stream

    made = Made((), len(prompt.wav_T), {"prompt_s": len(prompt.wav_T) / SAMPLE_RATE, "device": lm.device})

    def pieces() -> Iterable[np.ndarray]:
        began, samples = time.perf_counter(), -len(prompt.wav_T)
        for wav_T in stream(lm, prompt.wav_T, asked.seconds, seed):
            samples += len(wav_T)
            yield wav_T
        made.facts |= {"ended": samples < round(asked.seconds * SAMPLE_RATE),
                       **_took(samples, time.perf_counter() - began, lm.spent_s)}

    made.pieces = pieces()
    return made


def _took(samples: int, wall_s: float, spent_s: dict[str, float]) -> dict[str, Any]:
    """Seconds generated, seconds it took (a sample's share of its batch), by stage, and their ratio."""
    seconds = samples / SAMPLE_RATE
    return {"seconds": seconds, "wall_s": round(wall_s, 4), "stages_s": {k: round(v, 4) for k, v in spent_s.items()},
            "rtf": round(wall_s / seconds, 4) if seconds else None}


def _rates(lm: AudioLM, prompt_z_T: np.ndarray, n_z: int, heard: int, samples: int) -> dict[str, float | None]:
    """Semantic tokens a second, as stage 2 reads them: of what was generated and of its prompt."""
    own = len(lm.stage("semantic").targets(prompt_z_T))
    more = samples - heard
    return {"semantic_per_s": round((n_z - own) * SAMPLE_RATE / more, 3) if more else None,
            "prompt_semantic_per_s": round(own * SAMPLE_RATE / heard, 3) if heard else None}


def _publish(folder: str, asked: Asked, sample: Sample, made: Made) -> None:
    """Writes a sample's picture, JSON and, last and whole, its wav."""
    path, shown, room = store.join(folder, f"{sample.file}.wav"), [], round(SHOWN_S * SAMPLE_RATE)
    with appears(path) as aside:
        with soundfile.SoundFile(aside, "w", SAMPLE_RATE, 1, "PCM_16", format="WAV") as f:
            for wav_T in made.pieces:
                if not np.isfinite(wav_T).all():
                    raise ValueError("the codec decoded samples that are not finite: look at the codec step's losses")
                f.write(np.clip(wav_T, -1.0, 1.0))
                if room:
                    shown.append(wav_T[:room])
                    room -= len(shown[-1])
        picture = spectrogram(np.concatenate(shown), f"sample {sample.number}", made.prompt / SAMPLE_RATE)
        store.put(store.join(folder, "page", f"{sample.file}.png"), picture)
        store.remove(path)  # of other settings: it must not stand beside this JSON
        store.put_json(store.join(folder, f"{sample.file}.json"), {
            "settings": settings(asked, sample), "run": asked.run, "index": asked.index, "name": sample.name,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "audiolm": audiolm.__version__,
            **made.facts})
