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
class Made:
    """A sound as it comes; `facts` is whole once all pieces came."""

    pieces: Iterable[np.ndarray]
    prompt: int  # samples of the prompt that it begins with
    facts: dict[str, Any] = field(default_factory=dict)


def make(asked: Asked, samples: Sequence[Sample], folder: str, device: str) -> list[str]:
    """Makes the samples; returns a line for each prompt that failed."""
    lm = load_system(asked.models, device, asked.draws)
    prompts, wrong = {}, {}
    for sample in samples:
        if not sample.prompt or sample.prompt in prompts or sample.prompt in wrong:
            continue
        try:
            wav_T = read_prompt(sample.place, asked.prompt_s)
        except Exception as e:  # noqa: BLE001  whatever a file or a place raises, the others have their turn
            wrong[sample.prompt] = told(sample.prompt, e)
            continue
        prompts[sample.prompt] = wav_T
        name = store.join(folder, "page", f"{sample.name}-prompt")
        store.put(f"{name}.wav", wav_bytes(wav_T))
        store.put(f"{name}.png", spectrogram(wav_T[:round(SHOWN_S * SAMPLE_RATE)], "prompt"))
    return [*wrong.values(), *_make(lm, asked, [s for s in samples if s.prompt not in wrong], prompts, folder)]


def _make(lm: AudioLM, asked: Asked, samples: Sequence[Sample], prompts: dict[str, np.ndarray], folder: str) -> list[str]:
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


def _generate(lm: AudioLM, asked: Asked, samples: Sequence[Sample], prompts: dict[str, np.ndarray]) -> list[Made]:
    seeds = [seed_of(asked.seed, s.prompt, s.number) for s in samples]
    wavs, may_end = [prompts.get(s.prompt) for s in samples], not asked.whole
    lm.spent_s.clear()
    if asked.long:
        return [_long(lm, asked, wavs[0], seeds[0])]
    began = time.perf_counter()
    if asked.mode == "unconditional":
        sounds = lm.unconditional(asked.seconds, seeds, may_end)
    elif asked.mode == "continuation":
        sounds = lm.continuation(wavs, asked.seconds, seeds, may_end)
    elif asked.mode == "acoustic":
        sounds = lm.acoustic(lm.tokenize(wavs), seeds, [*map(len, wavs)])
    else:
        sounds = lm.resynthesis(wavs)
    n, wall_s = len(samples), time.perf_counter() - began
    spent_s = {stage: seconds / n for stage, seconds in lm.spent_s.items()}
    made = []
    for sound, wav_T in zip(sounds, wavs, strict=True):
        more_s = (len(sound.wav_T) - sound.prompt) / SAMPLE_RATE
        facts = {**_took(more_s, wall_s / n, spent_s), **_about(lm, wav_T, sound.ended)}
        if asked.mode in ("continuation", "unconditional"):  # tokens a second as stage 2 reads them
            facts["semantic_per_s"] = round((len(sound.z) - sound.z_prompt) / more_s, 3) if more_s else None
            facts["prompt_semantic_per_s"] = round(sound.z_prompt * SAMPLE_RATE / sound.prompt, 3) if sound.prompt else None
        made.append(Made([sound.wav_T], sound.prompt, facts))
    return made


def _long(lm: AudioLM, asked: Asked, prompt_T: np.ndarray | None, seed: int) -> Made:
    """A sound that is generated while it is written."""
    from audiolm.lm.long_form import stream

    made = Made((), 0 if prompt_T is None else len(prompt_T))

    def pieces() -> Iterable[np.ndarray]:
        began, samples = time.perf_counter(), 0
        for wav_T in stream(lm, prompt_T, asked.seconds, seed, not asked.whole):
            samples += len(wav_T)
            yield wav_T
        more = samples - made.prompt
        made.facts |= {**_took(more / SAMPLE_RATE, time.perf_counter() - began, lm.spent_s),
                       **_about(lm, prompt_T, more < round(asked.seconds * SAMPLE_RATE))}

    made.pieces = pieces()
    return made


def _took(seconds: float, wall_s: float, spent_s: dict[str, float]) -> dict[str, Any]:
    """Seconds generated, seconds it took (a sample's share of its batch), by stage, and their ratio."""
    return {"seconds": seconds, "wall_s": round(wall_s, 4), "stages_s": {k: round(v, 4) for k, v in spent_s.items()},
            "rtf": round(wall_s / seconds, 4) if seconds else None}


def _about(lm: AudioLM, prompt_T: np.ndarray | None, ended: bool) -> dict[str, Any]:
    return {"prompt_s": None if prompt_T is None else len(prompt_T) / SAMPLE_RATE, "ended": ended, "device": lm.device}


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
