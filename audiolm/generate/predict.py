"""Answers to requests for sound, one row a prompt, as audiolm/tracking/serve.py serves them; independent of MLflow.

A row has `audio` (base64 of an audio file; none for mode unconditional), `seconds` to generate at most beyond it (7),
`seed` (0), `samples` (1), `mode` (continuation, unconditional, acoustic, resynthesis).  None or NaN, as pandas fills in,
is a missing value.  An answer has `audio` (base64 of a 16-bit wav at 16 kHz), `seconds`, `prompt_s`, `ended`, `sample`,
`seed`.  Sample i has the seed `seed` + i, so a row with an answer's seed gives that answer again.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np

from audiolm import store
from audiolm.data.audio import wav_bytes
from audiolm.data.parallel import pick_device
from audiolm.generate.audiolm import AudioLM
from audiolm.generate.load import load
from audiolm.generate.prompts import prompt_from_bytes
from audiolm.tokenizers.base import SAMPLE_RATE

FIELDS = {"continuation": "audio, seconds", "unconditional": "seconds", "acoustic": "audio", "resynthesis": "audio"}
DEFAULTS = {"mode": "continuation", "seconds": 7.0, "seed": 0, "samples": 1}
MAX_SAMPLES = 32  # of a row: bounds the time and the memory of one request


def load_logged_system(system: Mapping[str, Any]) -> AudioLM:
    """The AudioLM of a system.json, on the GPU if there is one. Raises ValueError where a step's folder is gone."""
    for name, path in system["steps"].items():
        if not store.exists(path):
            raise ValueError(f"step {name} of {system['index']} is not at {path}: serve where that store is seen, or run the "
                             "pipeline again and serve its new version")
    return load(system["steps"], pick_device("auto"))


def predict(lm: AudioLM, rows: Sequence[Mapping[str, Any]], params: Mapping[str, float]) -> list[dict[str, Any]]:
    """The rows' samples in order. params: `temperature_semantic`, `temperature_coarse`, `temperature_fine`.

    Raises ValueError naming the row, the field and the fix.
    """
    if not rows:
        raise ValueError('no rows: send {"dataframe_records": [{"audio": ..., "seconds": 7}]}, a row for each prompt')
    lm = copy(lm)  # requests share the samplers and their buffers, not the sampling parameters
    lm.sampling = {stage: replace(own, temperature=params.get(f"temperature_{stage}", own.temperature))
                   for stage, own in lm.sampling.items()}
    answers = []
    for i, row in enumerate(rows):
        try:
            answers += _answer(lm, {k: v for k, v in row.items() if v is not None and v == v})  # NaN is not itself
        except ValueError as e:
            raise ValueError(f"row {i}: {e}") from e
    return answers


def _answer(lm: AudioLM, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    mode, seconds, seed, samples = (row.get(name, default) for name, default in DEFAULTS.items())
    if mode not in FIELDS:
        raise ValueError(f"mode: {mode!r} is none; one of {', '.join(FIELDS)}")
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds: {seconds:g} is not a length; give more than 0")
    if not 1 <= samples <= MAX_SAMPLES:
        raise ValueError(f"samples: {samples}; give 1 to {MAX_SAMPLES}")
    wav_T = None if mode == "unconditional" else _prompt(row.get("audio", ""), mode)
    seeds = [int(seed) + i for i in range(int(samples))]
    try:
        sounds = lm.generate(mode, [wav_T] * len(seeds), float(seconds), seeds)
    except ValueError as e:
        raise ValueError(f"{FIELDS[mode]}: {e}") from e
    return [{"audio": base64.b64encode(wav_bytes(sound.wav_T)).decode(), "seconds": len(sound.wav_T) / SAMPLE_RATE,
             "prompt_s": sound.prompt / SAMPLE_RATE, "ended": sound.ended, "sample": i, "seed": seeds[i]}
            for i, sound in enumerate(sounds)]


def _prompt(text: Any, mode: str) -> np.ndarray:
    """wav_T of a row's `audio`. Raises ValueError that begins with the field's name."""
    if text == "":
        raise ValueError(f"audio: missing; mode {mode} needs the base64 of a wav, flac, ogg or mp3 file")
    try:
        data = base64.b64decode("".join(text.split()), validate=True)  # the base64 command breaks lines
    except (AttributeError, ValueError) as e:
        raise ValueError(f"audio: {str(text)[:20]!r} is not base64: send what `base64 < prompt.wav` prints, in one line") from e
    try:
        return prompt_from_bytes(data)
    except ValueError as e:
        raise ValueError(f"audio: {e}") from e
