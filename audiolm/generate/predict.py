"""Answers to requests for sound, one row a prompt, as audiolm/tracking/serve.py serves them; independent of MLflow.

One request is answered at a time, a bounded number waits, and each has its limits (config/serve.py).  A request whose time is
over is given up, also while its sound is drawn.

A row has `audio` (base64 of an audio file; none for mode unconditional), `seconds` to generate at most beyond it (7),
`seed` (0), `samples` (1), `mode` (continuation, unconditional, acoustic, resynthesis).  None or NaN, as pandas fills in,
is a missing value.  An answer has `audio` (base64 of a 16-bit wav at 16 kHz), `seconds`, `prompt_s`, `ended`, `sample`,
`seed`.  Sample i has the seed `seed` + i, so a row with an answer's seed gives that answer again.
"""

from __future__ import annotations

import base64
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np

from audiolm import store
from audiolm.config.serve import ServeConfig
from audiolm.data.audio import wav_bytes
from audiolm.data.parallel import pick_device
from audiolm.generate.audiolm import AudioLM
from audiolm.generate.load import load, sampling_of
from audiolm.generate.prompts import prompt_from_bytes
from audiolm.tokenizers.base import SAMPLE_RATE, SEMANTIC_HOP

FIELDS = {"continuation": "audio, seconds", "unconditional": "seconds", "acoustic": "audio", "resynthesis": "audio"}
DEFAULTS = {"mode": "continuation", "seconds": 7.0, "seed": 0, "samples": 1}

Row = Mapping[str, Any]


class Busy(RuntimeError):
    """So many requests wait already that this one was not taken."""


class TooLate(RuntimeError):
    """A request's time was over before its answer was ready."""


def load_logged_system(system: Mapping[str, Any]) -> AudioLM:
    """The AudioLM of a system.json, on the GPU if there is one. Raises ValueError where a step's folder is gone."""
    for name, path in system["steps"].items():
        if not store.exists(path):
            raise ValueError(f"step {name} of {system['index']} is not at {path}: serve where that store is seen, or run the "
                             "pipeline again and serve its new version")
    return load(system["steps"], pick_device("auto"), sampling=sampling_of(system["index"]))


class Service:
    """A system that answers one request after another; threads may ask at once."""

    def __init__(self, lm: AudioLM, limits: ServeConfig):
        self.lm, self.limits = lm, limits
        self._turn = threading.Lock()  # torch's number of threads is the process's, and the samplers' buffers are shared
        self._places = threading.BoundedSemaphore(1 + limits.max_waiting)

    def answer(self, rows: Sequence[Row], params: Mapping[str, float], limit_s: float = math.inf) -> list[dict[str, Any]]:
        """The rows' samples in order. params: `temperature_semantic`, `temperature_coarse`, `temperature_fine`.

        Raises ValueError naming the row, the field and the fix; Busy; TooLate after `limit_s` seconds.
        """
        until_s = time.monotonic() + limit_s

        def check() -> None:
            if time.monotonic() > until_s:
                raise TooLate(f"the answer was not ready within {limit_s:.0f} s: ask for fewer or shorter sounds, or start the "
                              "server with a longer --timeout")

        rows = [{k: v for k, v in row.items() if v is not None and v == v} for row in rows]  # NaN is not itself
        check_size(rows, self.limits)
        with self._own_turn(limit_s):
            self.lm.stop_when(check)
            return _answers(self.lm, rows, params, self.limits, check)

    @contextmanager
    def _own_turn(self, limit_s: float) -> Iterator[None]:
        """Waits for the requests before this one."""
        if not self._places.acquire(blocking=False):
            raise Busy(f"one request is answered and {self.limits.max_waiting} wait, at most (max_waiting): ask again later")
        try:
            if not self._turn.acquire(timeout=min(limit_s, threading.TIMEOUT_MAX)):
                raise TooLate(f"{limit_s:.0f} s went by while other requests were answered: ask again later")
            try:
                yield
            finally:
                self._turn.release()
        finally:
            self._places.release()


def check_size(rows: Sequence[Row], limits: ServeConfig) -> None:
    """Raises ValueError for a request that asks for too much, or for nothing; decodes nothing."""
    if not rows:
        raise ValueError('no rows: send {"dataframe_records": [{"audio": ..., "seconds": 7}]}, a row for each prompt')
    for i, row in enumerate(rows):
        if not 1 <= row.get("samples", 1) <= limits.max_sounds:
            raise ValueError(f"row {i}: samples: {row['samples']}; give 1 to {limits.max_sounds}")
    if (sounds := sum(int(row.get("samples", 1)) for row in rows)) > limits.max_sounds:
        raise ValueError(f"{len(rows)} rows ask for {sounds} sounds, {limits.max_sounds} at most (max_sounds): send several "
                         "requests")
    size_mb = sum(len(str(row.get("audio", ""))) for row in rows) * 3 / 4 / 1e6  # base64 has 4 characters for 3 bytes
    if size_mb > limits.max_mb:
        raise ValueError(f"audio: {size_mb:.1f} MB, {limits.max_mb:g} at most (max_mb): send less sound, or send it as FLAC")


def _answers(lm: AudioLM, rows: Sequence[Row], params: Mapping[str, float], limits: ServeConfig,
             check: Callable[[], None]) -> list[dict[str, Any]]:
    lm = copy(lm)  # requests share the samplers and their buffers, not the sampling parameters
    lm.sampling = {stage: replace(own, temperature=params.get(f"temperature_{stage}", own.temperature))
                   for stage, own in lm.sampling.items()}
    answers = []
    for i, row in enumerate(rows):
        check()
        try:
            answers += _answer(lm, row, limits)
        except ValueError as e:
            raise ValueError(f"row {i}: {e}") from e
    return answers


def _answer(lm: AudioLM, row: Row, limits: ServeConfig) -> list[dict[str, Any]]:
    mode, seconds, seed, samples = (row.get(name, default) for name, default in DEFAULTS.items())
    if mode not in FIELDS:
        raise ValueError(f"mode: {mode!r} is none; one of {', '.join(FIELDS)}")
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds: {seconds:g} is not a length; give more than 0")
    wav_T = None if mode == "unconditional" else _prompt(row.get("audio", ""), mode, limits)
    seeds = [int(seed) + i for i in range(int(samples))]
    try:
        sounds = lm.generate(mode, [wav_T] * len(seeds), float(seconds), seeds)
    except ValueError as e:
        raise ValueError(f"{FIELDS[mode]}: {e}") from e
    return [{"audio": base64.b64encode(wav_bytes(sound.wav_T)).decode(), "seconds": len(sound.wav_T) / SAMPLE_RATE,
             "prompt_s": sound.prompt / SAMPLE_RATE, "ended": sound.ended, "sample": i, "seed": seeds[i]}
            for i, sound in enumerate(sounds)]


def _prompt(text: Any, mode: str, limits: ServeConfig) -> np.ndarray:
    """wav_T of a row's `audio`. Raises ValueError that begins with the field's name."""
    if text == "":
        raise ValueError(f"audio: missing; mode {mode} needs the base64 of a wav, flac, ogg or mp3 file")
    try:
        data = base64.b64decode("".join(text.split()), validate=True)  # the base64 command breaks lines
    except (AttributeError, ValueError) as e:
        raise ValueError(f"audio: {str(text)[:20]!r} is not base64: send what `base64 < prompt.wav` prints, in one line") from e
    try:
        # a frame more shows that it is longer
        wav_T = prompt_from_bytes(data, limits.max_prompt_s + SEMANTIC_HOP / SAMPLE_RATE, limits.max_channels)
    except ValueError as e:
        raise ValueError(f"audio: {e}") from e
    if len(wav_T) > limits.max_prompt_s * SAMPLE_RATE:
        raise ValueError(f"audio: it lasts longer than {limits.max_prompt_s:g} s (max_prompt_s): send its beginning")
    return wav_T
