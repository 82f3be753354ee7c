"""All randomness comes from (seed, purpose, index...), never from a global state or a rank (DESIGN 6.8)."""

from __future__ import annotations

import hashlib

import numpy as np


def derive(seed: int, purpose: str, *index: int) -> int:
    """A 63-bit seed for one purpose and index."""
    text = f"{seed}|{purpose}|{'|'.join(map(str, index))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(derive(seed, purpose, *index)))
