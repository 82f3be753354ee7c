"""Prompts: an audio file, its bytes or an array of any rate and channels as wav_T, float32 mono at 16 kHz.

A prompt is cut as waveform to whole semantic frames (640 samples, 40 ms).  So none of its tokens depends on the audio behind
the cut.  A prompt that is too short, silent or not finite is refused, and the message names the fix.
"""

from __future__ import annotations

import tempfile

import numpy as np

from audiolm.data.audio import open_sound, resample, start_of
from audiolm.data.audio_check import audio_errors, check_audio
from audiolm.data.channels import cancelled, check_level, mix, powers
from audiolm.rng import derive
from audiolm.tokenizers.base import SAMPLE_RATE, SEMANTIC_HOP

PROMPT_S = 3.0  # 2209.03143 III-D
MIN_PROMPT_S = 0.5  # ours: 12 semantic tokens
SILENT_PEAK = 1e-4  # of full scale: 3 steps of 16-bit PCM


def read_prompt(path: str, prompt_s: float = PROMPT_S) -> np.ndarray:
    """wav_T of a file's first `prompt_s` seconds (0: all of it); a local path or any fsspec URI.

    Raises FileNotFoundError; ValueError for a file that is empty, truncated or no audio, and as `check_prompt` does.
    """
    check_audio(path)
    with audio_errors(path):
        wav_T = start_of(path, round(prompt_s * SAMPLE_RATE) or None)
    return check_prompt(wav_T)


def prompt_from_bytes(data: bytes, prompt_s: float = 0.0, most_channels: int | None = None) -> np.ndarray:
    """`read_prompt` of a file's bytes, as a client sends them. Raises ValueError for more than `most_channels` too."""
    with tempfile.NamedTemporaryFile() as f:
        f.write(data)
        f.flush()
        try:
            with audio_errors(f.name), open_sound(f.name) as sound:
                if most_channels and sound.channels > most_channels:
                    raise ValueError(f"{sound.channels} channels, {most_channels} at most (max_channels): mix them down")
            return read_prompt(f.name, prompt_s)
        except ValueError as e:  # the client does not know the temporary file
            raise ValueError(str(e).replace(f.name, f"the file of {len(data)} bytes")) from e


def prompt_from_array(wav: np.ndarray, sample_rate: int, prompt_s: float = PROMPT_S) -> np.ndarray:
    """`read_prompt` of wav_T, or of wav_TC with several channels, at `sample_rate`."""
    wav = np.asarray(wav, np.float32)
    if wav.ndim not in (1, 2):
        raise ValueError(f"the prompt has shape {wav.shape}: give (samples,) or (samples, channels)")
    if wav.ndim == 2:
        mean_power, *by_channel = powers(wav[:round(prompt_s * sample_rate) or None])
        wav = mix(wav, cancelled(mean_power, np.array(by_channel)))
    wav_T = resample(wav, sample_rate, SAMPLE_RATE)
    return check_prompt(wav_T[:round(prompt_s * SAMPLE_RATE) or None])


def check_prompt(wav_T: np.ndarray) -> np.ndarray:
    """wav_T at 16 kHz cut to whole frames. Raises ValueError where it is too short, silent or not finite."""
    if len(wav_T) < MIN_PROMPT_S * SAMPLE_RATE:
        raise ValueError(f"the prompt lasts {len(wav_T) / SAMPLE_RATE:.2f} s: give at least {MIN_PROMPT_S:g} s")
    check_level(peak := float(np.abs(wav_T).max()))
    if peak < SILENT_PEAK:
        raise ValueError(f"the prompt is silent (peak {peak:.1e} of full scale, below {SILENT_PEAK:g}): give one with "
                         "sound, or more of it")
    return whole_frames(wav_T)


def whole_frames(wav_T: np.ndarray) -> np.ndarray:
    """wav_T float32 cut to whole semantic frames. Raises ValueError below one frame and where it is not finite."""
    wav_T = np.asarray(wav_T, np.float32)
    if wav_T.ndim != 1 or len(wav_T) < SEMANTIC_HOP:
        raise ValueError(f"a prompt must be mono, at least {SEMANTIC_HOP} samples at 16 kHz, got shape {wav_T.shape}")
    if not np.isfinite(wav_T).all():
        raise ValueError("the prompt has samples that are not finite (NaN or infinite): clean the file")
    return wav_T[:len(wav_T) // SEMANTIC_HOP * SEMANTIC_HOP]


def sample_seed(seed: int, path: str, number: int) -> int:
    """Seed of a prompt's sample `number`, from 1: of the path as given, whatever else is generated beside it."""
    return derive(seed, f"generate {path}", number)
