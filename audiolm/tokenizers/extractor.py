"""Feature extractors: one vector per 40 ms from any layer of a masked audio model.

Long audio goes in overlapping windows, so that no frame depends on more than one window: window k
starts at frame k (window - 2 overlap) and gives its frames except `overlap` at either side; the
first and the last keep their ends.
Legend: wav_BT float32 at 16 kHz, lengths_B true samples (on the CPU, else each call waits for a GPU), features_BTD
float32, frames_B at 25 Hz.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from audiolm.models.conformer import LAYER_CONVENTION, SPECTRA, Encoder, EncoderSizes
from audiolm.models.precision import no_tf32
from audiolm.models.transfer import send
from audiolm.tokenizers.base import SAMPLE_RATE, SEMANTIC_HOP, padded_samples

FAMILY = "masked-conformer"
GROUP = 16  # windows in one forward pass: 256 s of audio by default, so memory is bounded for any length


class Extractor(Protocol):
    """A frozen masked audio model. Layers are counted from 1, as blocks of the model."""

    family: str
    layers: int
    dim: int

    def features(self, wav_BT: torch.Tensor, lengths_B: torch.Tensor,
                 layers: Sequence[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """features_BTD (float32, on the extractor's device) of each of `layers`, counted from 1,
        and frames_B = padded_samples(length) / 640. Audio past a row's length counts as silence and
        changes nothing (1e-4).
        """

    def to(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> Extractor:
        """Itself, moved."""

    def truncated(self, layer: int) -> Extractor:
        """A copy, in float32 on the CPU, without the blocks above `layer`, which tokens do not
        need.
        """

    def state(self) -> dict[str, torch.Tensor]:
        """Weights by name, without a prefix."""

    def to_json(self) -> dict:
        """The config that rebuilds it from the weights: {"family", "layer_convention", ...}."""


class ConformerExtractor:
    """A masked model trained here."""

    family = FAMILY

    def __init__(self, encoder: Encoder):
        self.encoder = encoder.eval().requires_grad_(False)
        self.layers, self.dim = encoder.sizes.layers, encoder.sizes.dim

    @torch.no_grad()
    def features(self, wav_BT, lengths_B, layers):
        mel_BTF, frames_B = extractor_mel(send(wav_BT, self.encoder.mask_embedding.device), lengths_B,
                                          self.encoder.sizes.spectrum)
        same = len(set(frames_of(lengths_B))) == 1
        outputs = self.encoder.outputs(mel_BTF, None if same else frames_B, None, layers)
        return [x_BTD.float() for x_BTD in outputs], frames_B

    def to(self, device, dtype=torch.float32):
        self.encoder.to(device=device, dtype=dtype)
        return self

    def truncated(self, layer):
        kept = Encoder(EncoderSizes(**{**self.encoder.sizes.to_json(), "layers": layer, "dropout": 0.0}))
        state = self.encoder.state_dict()
        kept.load_state_dict({name: state[name].detach().float().cpu() for name in kept.state_dict()})
        return ConformerExtractor(kept)

    def state(self):
        return self.encoder.state_dict()

    def to_json(self):
        return {"family": FAMILY, "layer_convention": LAYER_CONVENTION, "encoder": self.encoder.sizes.to_json()}


def extractor_mel(wav_BT: torch.Tensor, lengths_B: torch.Tensor, spectrum: str = "mel") -> tuple[torch.Tensor, torch.Tensor]:
    """mel_BTF (100 Hz), or another of SPECTRA, and frames_B (25 Hz).

    Audio past a row's length counts as silence, and rows end on whole frames.
    """
    wav_BT, frames_B = mask_padding(wav_BT, lengths_B)
    return SPECTRA[spectrum](wav_BT), frames_B


def mask_padding(wav_BT: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """wav_BT of whole frames of the longest row, zeros past each length, and frames_B."""
    # Before the lengths move to the device: reading them back would make the CPU wait for the GPU.
    target = padded_samples(int(lengths_B.max()))
    lengths_B = send(lengths_B, wav_BT.device)
    wav_BT = F.pad(wav_BT[:, :target].float(), (0, max(0, target - wav_BT.shape[1])))
    inside_BT = torch.arange(target, device=wav_BT.device)[None] < lengths_B[:, None]
    return wav_BT.masked_fill(~inside_BT, 0.0), ((lengths_B + SEMANTIC_HOP - 1) // SEMANTIC_HOP).clamp_min(1)


def frames_of(lengths_B: torch.Tensor) -> list[int]:
    """`mask_padding`'s frames_B as numbers."""
    return [padded_samples(n) // SEMANTIC_HOP for n in lengths_B.tolist()]


@dataclass(frozen=True)
class Window:
    """Window and overlap, in semantic frames.

    Raises ValueError where an inner window would keep no frame.
    """

    frames: int
    overlap: int

    def __post_init__(self):
        if self.overlap < 0 or self.frames <= 2 * self.overlap:
            raise ValueError(f"window_s ({self.frames * SEMANTIC_HOP / SAMPLE_RATE:g}) must exceed twice overlap_s "
                             f"({self.overlap * SEMANTIC_HOP / SAMPLE_RATE:g})")

    def spans(self, frames: int) -> list[tuple[int, int, int, int]]:
        """(start, end, first kept, end kept) of each window over `frames` frames.

        Frames near a window's edge lack context on one side; the neighbour keeps them. Ends of the
        clip have no neighbour, so the first and the last window keep theirs.
        """
        step, spans, at = self.frames - 2 * self.overlap, [], 0
        while True:
            last = at + self.frames >= frames
            end = frames if last else at + self.frames
            spans.append((at, end, at + self.overlap if at else 0, end if last else end - self.overlap))
            if last:
                return spans
            at += step


def window_of(window_s: float, overlap_s: float) -> Window:
    return Window(round(window_s * SAMPLE_RATE / SEMANTIC_HOP), round(overlap_s * SAMPLE_RATE / SEMANTIC_HOP))


@torch.no_grad()
@no_tf32()
def windowed(extractor: Extractor, wav_BT: torch.Tensor, lengths_B: torch.Tensor, layers: Sequence[int],
             window: Window) -> tuple[list[torch.Tensor], torch.Tensor]:
    """As `Extractor.features`, in windows: the windows of all rows form batches of GROUP."""
    frames = frames_of(lengths_B)
    if max(frames) <= window.frames:
        return extractor.features(wav_BT, lengths_B, layers)
    wav_BT, frames_B = mask_padding(wav_BT, lengths_B)
    # Cut the windows; each has its own true length, so the padding of a clip's last window changes
    # nothing.
    spans = [(row, *span) for row, n in enumerate(frames) for span in window.spans(n)]
    pieces = wav_BT.new_zeros(len(spans), window.frames * SEMANTIC_HOP)
    lengths = torch.zeros(len(spans), dtype=torch.int64)
    for i, (row, at, end, _, _) in enumerate(spans):
        lengths[i] = min(int(lengths_B[row]), end * SEMANTIC_HOP) - at * SEMANTIC_HOP
        pieces[i, :lengths[i]] = wav_BT[row, at * SEMANTIC_HOP:at * SEMANTIC_HOP + lengths[i]]
    # Encode them in groups and copy each window's kept frames into its row.
    whole: list[torch.Tensor] = []
    for n in range(0, len(spans), GROUP):
        windows, _ = extractor.features(pieces[n:n + GROUP], lengths[n:n + GROUP], layers)
        whole = whole or [x.new_zeros(len(wav_BT), max(frames), x.shape[-1]) for x in windows]
        for i, (row, at, _, first, end) in enumerate(spans[n:n + GROUP]):
            for x, target in zip(windows, whole, strict=True):
                target[row, first:end] = x[i, first - at:end - at]
    return whole, frames_B
