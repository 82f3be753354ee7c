"""The contract between tokenizers, token stores, stages and samplers (DESIGN 1.7, 3).

Shapes: wav_BT float32 at spec.sample_rate, zero-padded; lengths_B true samples; codes_TQ int64 of one clip;
codes_BTQ of a batch.  Lengths agree: audio is padded with zeros to a multiple of SEMANTIC_HOP, so that the acoustic
frames are exactly twice the semantic ones.  The true length is kept, decoded audio cut to it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Protocol

SAMPLE_RATE = 16_000
SEMANTIC_HOP = 640  # 25 Hz
ACOUSTIC_HOP = 320  # 50 Hz


@dataclass(frozen=True)
class TokenSpec:
    name: str
    sample_rate: int
    hop: int
    n_q: int
    vocab: int

    @property
    def rate_hz(self) -> float:
        return self.sample_rate / self.hop

    def to_json(self) -> dict:
        return asdict(self)


def padded_samples(n: int) -> int:
    """Samples after padding to whole semantic frames; at least one frame."""
    return max(1, -(-n // SEMANTIC_HOP)) * SEMANTIC_HOP


class Tokenizer(Protocol):
    spec: TokenSpec
    hash: str  # of the artefact's bytes

    def encode(self, wav_BT, lengths_B) -> list:
        """codes_TQ (int64, on the CPU) of each clip, T = padded_samples(length) / spec.hop; padding never leaks in."""


class Codec(Tokenizer, Protocol):
    def decode(self, codes_BTQ):
        """wav_BT, T = frames x hop; any prefix of the levels (Q <= spec.n_q) may be given."""
