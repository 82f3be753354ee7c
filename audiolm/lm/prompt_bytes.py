"""A prompt from a file's bytes, as any client sends it."""

from __future__ import annotations

import tempfile

import numpy as np

from audiolm.data.audio import SAMPLE_RATE_HZ, stream
from audiolm.lm.generation import whole_frames

SHORTEST_S, SILENT = 0.5, 1e-4


def from_bytes(data: bytes, prompt_s: float | None = None) -> np.ndarray:
    """wav_T float32 mono at 16 kHz of a wav, flac, ogg or mp3 file, or of its first `prompt_s` seconds; whole 40 ms frames.

    Raises ValueError for what is not audio, not finite, silent or below half a second.
    """
    import soundfile

    end = None if prompt_s is None else round(prompt_s * SAMPLE_RATE_HZ)
    parts, have = [], 0
    with tempfile.NamedTemporaryFile() as f:
        f.write(data)
        f.flush()
        try:
            for wav_T in stream(f.name):
                parts.append(wav_T)
                have += len(wav_T)
                if end is not None and have >= end:
                    break
        except soundfile.SoundFileError as e:
            raise ValueError(f"{len(data)} bytes that are no audio file: send a whole wav, flac, ogg or mp3 file") from e
        except ValueError as e:
            raise ValueError(str(e).replace(f.name, "the file")) from e
    wav_T = np.concatenate(parts)[:end]
    if len(wav_T) < SHORTEST_S * SAMPLE_RATE_HZ:
        raise ValueError(f"the prompt lasts {len(wav_T) / SAMPLE_RATE_HZ:.2f} s: give at least {SHORTEST_S:g} s")
    if np.abs(wav_T).max() < SILENT:
        raise ValueError(f"the prompt is silent (no sample above {SILENT:g}): give one that sounds")
    return whole_frames(wav_T)
