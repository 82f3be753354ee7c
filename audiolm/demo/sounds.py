"""What the demo page makes: a recording and the page's fields in, sounds with titles out; independent of gradio.

A page has one limit, `longest_s`: seconds of its longest sound, a prompt included.  wav_T: float32 mono at 16 kHz.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace

import numpy as np

from audiolm import rng
from audiolm.data.audio_check import error_line
from audiolm.eval.ladder import prompt_samples, rungs
from audiolm.generate.audiolm import AudioLM
from audiolm.generate.prompts import MIN_PROMPT_S, read_prompt
from audiolm.tokenizers.base import SAMPLE_RATE, SEMANTIC_HOP

LABELS = {"continuation": "Continuation", "acoustic": "New voice", "resynthesis": "Resynthesis", "unconditional": "Sound"}
OPEN_ENDED = ("continuation", "unconditional")  # the others last as long as their recording
MAX_SAMPLES = 4


@dataclass(frozen=True)
class Request:
    """The page's fields. `recording`: an audio file, not read by mode unconditional; `temperatures` by stage."""

    recording: str | None
    mode: str
    prompt_s: float
    seconds: float
    samples: int
    seed: int
    temperatures: Mapping[str, float]


@dataclass(frozen=True)
class TitledSound:
    """A sound as the page shows it. `prompt_s`: seconds of the prompt that it begins with."""

    title: str
    wav_T: np.ndarray
    prompt_s: float | None = None


def answer(lm: AudioLM, request: Request, longest_s: float) -> list[TitledSound]:
    """The prompt as the model gets it, if there is one, and the sounds; sample i has the seed `seed` + i.

    Raises ValueError that names the fix, also for a recording that is missing, silent, too short, too long or no audio.
    """
    prompted = request.mode != "unconditional"
    check(request, longest_s, request.prompt_s if request.mode == "continuation" else 0.0)
    wav_T, shown = None, []
    if prompted:
        wav_T = (read_recording(request.recording, request.prompt_s) if request.mode == "continuation" else
                 read_whole(request.recording, longest_s))
        shown = [TitledSound(f"Recording as the model gets it, {len(wav_T) / SAMPLE_RATE:.1f} s", wav_T)]
    seeds = [request.seed + i for i in range(1 if request.mode == "resynthesis" else request.samples)]
    sounds = at_temperatures(lm, request).generate(request.mode, [wav_T] * len(seeds), request.seconds, seeds)
    for seed, sound in zip(seeds, sounds, strict=True):
        drawn = "" if request.mode == "resynthesis" else f", seed {seed}"
        end = ", ended by the model" if sound.ended else ""
        title = f"{LABELS[request.mode]}{drawn}, {len(sound.wav_T) / SAMPLE_RATE:.1f} s{end}"
        shown.append(TitledSound(title, sound.wav_T, sound.prompt / SAMPLE_RATE or None))
    return shown


def ladder(lm: AudioLM, request: Request, longest_s: float) -> list[TitledSound]:
    """The start of the recording, `prompt_s` and `seconds` together, on every rung of the stage ladder. Raises as `answer`."""
    check(replace(request, mode="continuation"), longest_s, request.prompt_s)
    wav_T = read_recording(request.recording, request.prompt_s + request.seconds)
    table = rungs(at_temperatures(lm, request), [wav_T], request.prompt_s, [rng.derive(request.seed, "ladder", 0)])
    prompt_s = prompt_samples(wav_T, request.prompt_s) / SAMPLE_RATE
    return [TitledSound(f"{number}. {name}" + (f", mel distance {mel:.2f}" if number else ""), rebuilt[0],
                        prompt_s if name == "continuation" else None) for number, (name, mel, rebuilt) in enumerate(table)]


def check(request: Request, longest_s: float, prompt_s: float) -> None:
    """Raises ValueError for a request beyond the page's limits; `prompt_s`: seconds of its prompt."""
    asked_s = prompt_s + request.seconds if request.mode in OPEN_ENDED else prompt_s
    for good, text in (
            (request.mode in LABELS, f"mode: {request.mode!r} is none; one of {', '.join(LABELS)}"),
            (not prompt_s or prompt_s >= MIN_PROMPT_S, f"seconds of the prompt: {prompt_s:g}; give at least {MIN_PROMPT_S:g}"),
            (request.mode not in OPEN_ENDED or request.seconds > 0, f"seconds: {request.seconds:g}; give more than 0"),
            (round(asked_s, 3) <= longest_s,
             f"prompt and new seconds are {asked_s:g} s together, {longest_s:g} s at most: ask for less"),
            (1 <= request.samples <= MAX_SAMPLES, f"sounds: {request.samples}; give 1 to {MAX_SAMPLES}")):
        if not good:
            raise ValueError(text)


def at_temperatures(lm: AudioLM, request: Request) -> AudioLM:
    """The same system with the request's temperatures."""
    lm = copy(lm)  # the samplers and their buffers are shared, the sampling parameters are not
    lm.sampling = {stage: replace(own, temperature=request.temperatures.get(stage, own.temperature))
                   for stage, own in lm.sampling.items()}
    return lm


def read_recording(path: str | None, seconds: float) -> np.ndarray:
    """wav_T of the recording's first `seconds`; decodes no further. Errors name the file as the user knows it."""
    if path is None:
        raise ValueError("there is no recording: record or upload one, or choose the mode that needs none")
    try:
        return read_prompt(path, seconds)
    except (ValueError, FileNotFoundError) as e:
        raise ValueError(error_line(path, e).replace(path, os.path.basename(path))) from e


def read_whole(path: str | None, longest_s: float) -> np.ndarray:
    """wav_T of a recording that is used from its beginning to its end. Raises ValueError above `longest_s` seconds."""
    wav_T = read_recording(path, longest_s + SEMANTIC_HOP / SAMPLE_RATE)  # a frame more shows that it is longer
    if len(wav_T) > longest_s * SAMPLE_RATE:
        raise ValueError(f"{os.path.basename(path)} lasts longer than {longest_s:g} s, and this mode takes the whole: cut it, "
                         "or choose continuation, which takes its beginning")
    return wav_T
