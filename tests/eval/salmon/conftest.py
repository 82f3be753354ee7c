"""Recordings that pairs are made of."""

from __future__ import annotations

import pytest

from audiolm import store
from audiolm.data.audio import wav_bytes
from tests.worlds import sounds


@pytest.fixture(scope="session")
def speech(tmp_path_factory):
    """A folder with four recordings of each of three planted voices: one low, two high."""
    folder = str(tmp_path_factory.mktemp("speech"))
    for speaker, pitch_hz in (("low", 90), ("high", 210), ("higher", 240)):
        for i in range(4):
            path = store.join(folder, speaker, "book", f"{i}.wav")
            store.put(path, wav_bytes(sounds.talk(pitch_hz, 3.1 + 0.2 * i, int(pitch_hz) + i)))
    return folder
