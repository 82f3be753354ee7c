"""Statistics of notes: how many keys sound at once, and how far apart two sounds' pitch classes are.

Pitches are MIDI numbers: A4 is 69, a pitch class its remainder by 12.  P is 88 keys from LOWEST on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LOWEST = 21  # MIDI number of the first of 88 keys
# basic-pitch's defaults (2203.09893): thresholds of onset and sound, shortest note, frames below that end a note.
ONSET, SOUNDING, HELD_S, GAP = 0.5, 0.3, 0.128, 11


class Note(NamedTuple):
    start_s: float
    end_s: float
    pitch: int


def notes_in(onset_TP: np.ndarray, sounding_TP: np.ndarray, frame_s: float) -> list[Note]:
    """Notes of probabilities by frame T and key P, by start: peaks of the onset whose key then sounds for most of HELD_S.

    A note ends where its key falls silent for GAP frames, at its next onset, or with the sound.
    """
    padded = np.pad(onset_TP, ((1, 1), (0, 0)))
    peaks = (onset_TP >= ONSET) & (onset_TP > padded[:-2]) & (onset_TP >= padded[2:])
    n, notes = round(HELD_S / frame_s), []
    for t, p in np.argwhere(peaks):
        after = sounding_TP[t + 1:, p]
        if len(after) < n or (after[:n] >= SOUNDING).mean() <= 0.5:
            continue
        again = np.flatnonzero(peaks[t + 1:, p])
        held = 1 + _frames_held(after[:again[0]] if len(again) else after)
        notes.append(Note(int(t) * frame_s, (int(t) + held) * frame_s, LOWEST + int(p)))
    return notes


def _frames_held(sounding_T: np.ndarray) -> int:
    """Frames up to the last that sounds before GAP silent ones."""
    heard = np.flatnonzero(sounding_T >= SOUNDING)
    gaps = np.flatnonzero(np.diff(heard, prepend=-1) > GAP)
    heard = heard[:gaps[0]] if len(gaps) else heard
    return int(heard[-1]) + 1 if len(heard) else 0


def keys_at_once(notes: Sequence[Note]) -> float:
    """The mean number of keys that sound, over the time in which any does: 1 for one voice. Raises ValueError without notes."""
    if not notes:
        raise ValueError("no notes sound: count those of sounds that have some")
    held_s = covered_s = until_s = 0.0
    for start_s, end_s, _ in sorted(notes):
        held_s += end_s - start_s
        covered_s += max(0.0, end_s - max(start_s, until_s))
        until_s = max(until_s, end_s)
    return held_s / covered_s


def pitch_class_distance(one: Sequence[Note], other: Sequence[Note]) -> float:
    """Total variation between the pitch classes of two sounds' notes: 0 for equal shares, 1 where no class is in both.

    1 where one of them has no notes.
    """
    if not (one and other):
        return 1.0
    a, b = (np.bincount([n.pitch % 12 for n in notes], minlength=12) / len(notes) for notes in (one, other))
    return float(np.abs(a - b).sum() / 2)
