"""Reads what a model shall go on with: a file of any rate and channels as wav_T, float32 mono at 16 kHz.

A prompt is cut to whole frames of 640 samples as waveform, so that no token of it has heard what follows; what a model
cannot go on with (too short, silent, not finite) is refused in words that name the fix.
"""

from __future__ import annotations

import tempfile

import numpy as np

from audiolm.data.audio import mono, resample, start_of
from audiolm.data.audio_check import audio_errors, check_audio
from audiolm.rng import derive
from audiolm.tokenizers.base import SAMPLE_RATE, SEMANTIC_HOP

PROMPT_S = 3.0  # paper III-D
LEAST_S = 0.5
SILENT = 1e-4  # of full scale


def read_prompt(path: str, prompt_s: float = PROMPT_S) -> np.ndarray:
    """wav_T of a file's first `prompt_s` seconds (0: all of it); a local path or any fsspec URI.

    Raises FileNotFoundError; ValueError for what is empty, truncated or no audio, and as `checked` does.
    """
    check_audio(path)
    with audio_errors(path):
        wav_T = start_of(path, round(prompt_s * SAMPLE_RATE) or None)
    return checked(wav_T)


def from_bytes(data: bytes, prompt_s: float = 0.0) -> np.ndarray:
    """The same of a file's bytes, as a client sends it."""
    with tempfile.NamedTemporaryFile() as f:
        f.write(data)
        f.flush()
        try:
            return read_prompt(f.name, prompt_s)
        except ValueError as e:
            raise ValueError(str(e).replace(f.name, f"the file of {len(data)} bytes")) from e


def of_array(wav: np.ndarray, sample_rate: int, prompt_s: float = PROMPT_S) -> np.ndarray:
    """The same of wav_T, or wav_TC of several channels, at `sample_rate`."""
    wav = np.asarray(wav, np.float32)
    if wav.ndim not in (1, 2):
        raise ValueError(f"the prompt has shape {wav.shape}: give (samples,) or (samples, channels)")
    wav_T = resample(mono(wav) if wav.ndim == 2 else wav, sample_rate, SAMPLE_RATE)
    return checked(wav_T[:round(prompt_s * SAMPLE_RATE) or None])


def checked(wav_T: np.ndarray) -> np.ndarray:
    """wav_T at 16 kHz cut to whole frames. Raises ValueError where it is too short, silent or not finite."""
    if len(wav_T) < LEAST_S * SAMPLE_RATE:
        raise ValueError(f"the prompt lasts {len(wav_T) / SAMPLE_RATE:.2f} s: give at least {LEAST_S:g} s")
    if not np.isfinite(wav_T).all():
        raise ValueError("the prompt has samples that are NaN or infinite: clean the file")
    if (peak := float(np.abs(wav_T).max())) < SILENT:
        raise ValueError(f"the prompt is silent (peak {peak:.1e} of full scale, below {SILENT:g}): give one with sound, or "
                         "more of it")
    return wav_T[:len(wav_T) // SEMANTIC_HOP * SEMANTIC_HOP]


def seed_of(seed: int, path: str, number: int) -> int:
    """The seed of a prompt's sample, from 1 on: of the path as it was given, whatever else is generated with it."""
    return derive(seed, f"generate {path}", number)
