"""Answers requests for sound, one row a prompt: what audiolm/tracking/serve.py serves. Knows nothing of MLflow.

A row asks: `audio` (base64 of an audio file; none for mode unconditional), at most `seconds` beyond it (7), `seed` (0),
`samples` (1), `mode` (continuation, unconditional, acoustic, resynthesis).  An answer holds `audio` (base64 of a 16-bit wav
at 16 kHz), `seconds`, `prompt_s`, `ended`, `sample`, `seed`.  Sample i has the seed `seed` + i, so that a row with an
answer's seed gives that answer again.  A value that is missing is None or NaN, as pandas has it.
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
from audiolm.generate.audiolm import AudioLM, Sound
from audiolm.generate.load import load
from audiolm.generate.prompts import from_bytes
from audiolm.tokenizers.base import SAMPLE_RATE

READS = {"continuation": "audio, seconds", "unconditional": "seconds", "acoustic": "audio", "resynthesis": "audio"}
MOST = 32  # samples of a row


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
    lm = copy(lm)  # its samplers stay
    lm.draws = {stage: replace(draw, temperature=params.get(f"temperature_{stage}", draw.temperature))
                for stage, draw in lm.draws.items()}
    answers = []
    for i, row in enumerate(rows):
        try:
            answers += _row(lm, {k: v for k, v in row.items() if v is not None and v == v})  # NaN is not itself
        except ValueError as e:
            raise ValueError(f"row {i}: {e}") from e
    return answers


def _row(lm: AudioLM, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    mode, seconds, seed, samples = (row.get(k, v) for k, v in (("mode", "continuation"), ("seconds", 7.0), ("seed", 0),
                                                               ("samples", 1)))
    if mode not in READS:
        raise ValueError(f"mode: {mode!r} is none; one of {', '.join(READS)}")
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds: {seconds:g} is not a length; give more than 0")
    if not 1 <= samples <= MOST:
        raise ValueError(f"samples: {samples}; give 1 to {MOST}")
    wav_T = None if mode == "unconditional" else _prompt(row.get("audio", ""), mode)
    seeds = [int(seed) + i for i in range(int(samples))]
    try:
        sounds = _generate(lm, mode, wav_T, float(seconds), seeds)
    except ValueError as e:
        raise ValueError(f"{READS[mode]}: {e}") from e
    return [{"audio": base64.b64encode(wav_bytes(sound.wav_T)).decode(), "seconds": len(sound.wav_T) / SAMPLE_RATE,
             "prompt_s": sound.prompt / SAMPLE_RATE, "ended": sound.ended, "sample": i, "seed": seeds[i]}
            for i, sound in enumerate(sounds)]


def _prompt(text: Any, mode: str) -> np.ndarray:
    if text == "":
        raise ValueError(f"audio: missing; mode {mode} needs the base64 of a wav, flac, ogg or mp3 file")
    try:
        data = base64.b64decode("".join(text.split()), validate=True)  # the base64 command breaks lines
    except (AttributeError, ValueError) as e:
        raise ValueError(f"audio: {str(text)[:20]!r} is not base64: send what `base64 < prompt.wav` prints, in one line") from e
    try:
        return from_bytes(data)
    except ValueError as e:
        raise ValueError(f"audio: {e}") from e


def _generate(lm: AudioLM, mode: str, wav_T: np.ndarray | None, seconds: float, seeds: Sequence[int]) -> list[Sound]:
    n = len(seeds)
    if mode == "unconditional":
        return lm.unconditional(seconds, seeds)
    if mode == "continuation":
        return lm.continuation([wav_T] * n, seconds, seeds)
    if mode == "acoustic":
        return lm.acoustic(lm.tokenize([wav_T] * n), seeds, [len(wav_T)] * n)
    return lm.resynthesis([wav_T] * n)
