"""The contract between tokenizers, token stores, stages and samplers (2209.03143, III).

Shapes: wav_BT float32 at spec.sample_rate, zero-padded; lengths_B true samples; codes_TQ int64 of
one clip; codes_BTQ of a batch. Audio is padded with zeros to a multiple of SEMANTIC_HOP, so that
acoustic frames are exactly twice the semantic ones. The true length is kept, and decoded audio is
cut to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

SAMPLE_RATE = 16_000
SEMANTIC_HOP = 640  # 25 Hz: w2v-BERT's rate (2209.03143, IV-B)
ACOUSTIC_HOP = 320  # 50 Hz: strides 2 x 4 x 5 x 8 (2209.03143, IV-B)


@dataclass(frozen=True)
class TokenSpec:
    """The numbers of a tokenizer: rate in Hz, hop in samples, levels, codes a level."""

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
    """Samples after padding to whole semantic frames, at least one: no clip is without tokens.
    """
    return max(1, -(-n // SEMANTIC_HOP)) * SEMANTIC_HOP


def pad_rows(wavs: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """(wav_BT, lengths_B) of some wav_T float32: zeros up to whole semantic frames of the longest.
    """
    import torch

    lengths_B = torch.tensor([len(w) for w in wavs])
    wav_BT = torch.zeros(len(wavs), padded_samples(int(lengths_B.max())))
    for row, wav in zip(wav_BT, wavs, strict=True):
        row[:len(wav)] = torch.from_numpy(wav)
    return wav_BT, lengths_B


def code_vectors(latents: Callable[[torch.Tensor], torch.Tensor], spec: TokenSpec) -> torch.Tensor:
    """codes_QVE float32 on the CPU: what each code of a level adds to the latent. `latents`: codes_BTQ of any prefix of the
    levels to x_BDT."""
    import torch

    vectors = []
    for level in range(spec.n_q):
        codes_BTQ = torch.zeros(1, spec.vocab, level + 1, dtype=torch.int64)
        codes_BTQ[0, :, level] = torch.arange(spec.vocab)
        x_VE = latents(codes_BTQ)[0].T.float().cpu()
        vectors.append(x_VE - latents(codes_BTQ[:, :1, :level])[0].T.float().cpu() if level else x_VE)
    return torch.stack(vectors)


def clip_lengths(wav_BT, lengths_B) -> list[int]:
    """The lengths as numbers.

    Raises ValueError for wav_BT that is not mono rows and for lengths beyond it.
    """
    lengths = lengths_B.tolist()
    if wav_BT.ndim != 2 or len(lengths) != len(wav_BT) or not all(0 <= n <= wav_BT.shape[1] for n in lengths):
        raise ValueError(f"encode takes mono wav_BT and lengths_B of at most T samples, got shape "
                         f"{tuple(wav_BT.shape)} and lengths {lengths[:8]}: mix channels down, give true lengths")
    return lengths


def check_finite(wav) -> None:
    if not wav.isfinite().all():
        raise ValueError("the audio holds samples that are NaN or infinite: decode or clean it again")


def check_codes(codes_BTQ, spec: TokenSpec) -> None:
    """Raises ValueError for codes of another shape, of more levels or outside 0 .. vocab - 1."""
    if codes_BTQ.ndim != 3 or not 1 <= codes_BTQ.shape[2] <= spec.n_q:
        raise ValueError(f"decode takes codes_BTQ with 1 to {spec.n_q} levels, got shape {tuple(codes_BTQ.shape)}")
    if not codes_BTQ.numel():
        return
    low, high = int(codes_BTQ.min()), int(codes_BTQ.max())
    if low < 0 or high >= spec.vocab:
        raise ValueError(f"codes run from {low} to {high}; this codec has codes 0 to {spec.vocab - 1} "
                         "(special ids must be taken off first)")


class Tokenizer(Protocol):
    spec: TokenSpec
    hash: str  # of the export's bytes; token shards, codes files and language models name it

    def encode(self, wav_BT, lengths_B) -> list:
        """codes_TQ (int64, on the CPU) of each clip, T = padded_samples(length) / spec.hop.

        Padding changes no code.
        """


class Codec(Tokenizer, Protocol):
    def decode(self, codes_BTQ):
        """wav_BT, T = frames x hop; any prefix of the levels (Q <= spec.n_q) may be given."""
