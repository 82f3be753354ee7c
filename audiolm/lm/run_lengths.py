"""Deduplicated semantic ids (2209.03143 III-B, after GSLM), with or without the frames that each lasts.

Shapes: z_T int64 semantic ids at 25 Hz, undeduplicated.
"""

from __future__ import annotations

import numpy as np

from audiolm.data.tokens import run_starts

MAX_RUN = 50  # frames that one id may last, 2 s; a longer run is several ids


def id_starts(z_T: np.ndarray, longest: int | None = None) -> np.ndarray:
    """True where an id of the deduplicated sequence begins; with `longest` a run of more frames is several ids."""
    starts = run_starts(z_T)
    if longest is None or not len(z_T):
        return starts
    at = np.arange(len(z_T))
    return (at - np.maximum.accumulate(np.where(starts, at, 0))) % longest == 0


def run_lengths(z_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ids, frames that each lasts, at most MAX_RUN); np.repeat is the inverse."""
    z_T = np.asarray(z_T, np.int64)
    starts = np.flatnonzero(id_starts(z_T, MAX_RUN))
    return z_T[starts], np.diff(np.append(starts, len(z_T)))


def dedupe(z_T: np.ndarray) -> np.ndarray:
    """Runs of equal ids collapsed to one id (2209.03143 III-B, after GSLM)."""
    z_T = np.asarray(z_T)
    return z_T[run_starts(z_T)]
