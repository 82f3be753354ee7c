"""Random numbers as a function of (seed, purpose, index...), never of a global state or a rank.

So a resumed run, and one on another number of workers, draws the same numbers.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive(seed: int, purpose: str, *index: int) -> int:
    """A 63-bit seed for one purpose and index."""
    text = f"{seed}|{purpose}|{'|'.join(map(str, index))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """A generator for one purpose and index; Philox gives the same stream on every machine."""
    return np.random.Generator(np.random.Philox(derive(seed, purpose, *index)))
