"""A wav file as something that a page plays."""

from __future__ import annotations

import io

import numpy as np

from audiolm import store
from audiolm.eval.page import Html, player


def playable(path: str) -> tuple[np.ndarray, Html] | None:
    """(wav_T, player) of a file, or None where it is gone. FLAC halves the page and loses nothing."""
    import soundfile

    try:
        wav_T, rate = soundfile.read(io.BytesIO(store.get(path)), dtype="float32", always_2d=False)
    except (FileNotFoundError, soundfile.LibsndfileError):
        return None
    wav_T = wav_T if wav_T.ndim == 1 else wav_T.mean(axis=1)
    sink = io.BytesIO()
    soundfile.write(sink, wav_T, rate, format="FLAC", subtype="PCM_16")
    return wav_T, player(sink.getvalue(), "flac")
