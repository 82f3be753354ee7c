"""SoundStream: causal convolutional encoder and decoder around a residual quantizer (2107.03312, III; paper III-B).

Shapes: wav_BT float32, T a multiple of `hop` (the strides' product); x_BDT latents and codes_BTQ int64, T / hop frames.
Every convolution pads on the left only: frame i depends on the samples before (i + 1) hop, and sample t on the frames up
to t // hop.  `encoder_context` and `decoder_context` are the frames of history that an output depends on: a chunk with
that much history before it gives the same as the whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from audiolm.models.factorised import FactorisedVQ
from audiolm.models.rvq import ResidualVQ

DILATIONS = (1, 3, 9)
KERNEL = 7


def _prepared(layer: nn.Module, norm: bool, gain: float) -> nn.Module:
    """The layer with zero bias and weights that keep the variance; `norm`: weight norm per output channel, as DAC."""
    out = 1 if isinstance(layer, nn.ConvTranspose1d) else 0
    # each output of a transposed convolution (kernel = 2 strides) sums two taps of every input channel
    fan_in = layer.in_channels * (2 if out else layer.kernel_size[0])
    nn.init.normal_(layer.weight, std=gain / math.sqrt(fan_in))
    nn.init.zeros_(layer.bias)
    return parametrizations.weight_norm(layer, dim=out) if norm else layer


class CausalConv(nn.Module):
    """Convolution padded on the left; `gain` scales the initial weights."""

    def __init__(self, c_in: int, c_out: int, kernel: int, norm: bool, stride: int = 1, dilation: int = 1,
                 gain: float = 1.2):
        super().__init__()
        self.left = (kernel - 1) * dilation - (stride - 1)
        self.conv = _prepared(nn.Conv1d(c_in, c_out, kernel, stride, dilation=dilation), norm, gain)

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x_BCT, (self.left, 0)))


class CausalUp(nn.Module):
    """Transposed convolution of two strides' length; the last stride, which lacks a next frame, is cut."""

    def __init__(self, c_in: int, c_out: int, stride: int, norm: bool):
        super().__init__()
        self.stride = stride
        self.conv = _prepared(nn.ConvTranspose1d(c_in, c_out, 2 * stride, stride), norm, 1.2)

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        return self.conv(x_BCT)[..., : x_BCT.shape[-1] * self.stride]


class ResidualUnit(nn.Module):
    """Residual: a dilated convolution, then a pointwise one that starts small, so that the sum keeps its scale."""

    def __init__(self, channels: int, dilation: int, norm: bool):
        super().__init__()
        self.body = nn.Sequential(nn.ELU(), CausalConv(channels, channels, KERNEL, norm, dilation=dilation),
                                  nn.ELU(), CausalConv(channels, channels, 1, norm, gain=0.5))

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        return x_BCT + self.body(x_BCT)


class Stack(nn.Sequential):
    """Layers in a row; a class of its own, because torch.compile takes only such a module as one graph."""

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x_BCT = layer(x_BCT)
        return x_BCT


def encoder(channels: int, dim: int, strides: tuple[int, ...], norm: bool) -> Stack:
    """Waveform to latents: a block a stride, each of three residual units and a strided convolution; widths double."""
    layers: list[nn.Module] = [CausalConv(1, channels, KERNEL, norm)]
    for i, stride in enumerate(strides):
        c = channels * 2**i
        layers += [ResidualUnit(c, d, norm) for d in DILATIONS]
        layers += [nn.ELU(), CausalConv(c, 2 * c, 2 * stride, norm, stride=stride)]
    return Stack(*layers, nn.ELU(), CausalConv(channels * 2 ** len(strides), dim, 3, norm))


def decoder(channels: int, dim: int, strides: tuple[int, ...], norm: bool) -> Stack:
    """Latents to waveform, the encoder mirrored."""
    layers: list[nn.Module] = [CausalConv(dim, channels * 2 ** len(strides), KERNEL, norm)]
    for i in reversed(range(len(strides))):
        c = channels * 2**i
        layers += [nn.ELU(), CausalUp(2 * c, c, strides[i], norm)]
        layers += [ResidualUnit(c, d, norm) for d in DILATIONS]
    last = CausalConv(channels, 1, KERNEL, norm, gain=0.1)  # starts about as loud as speech
    return Stack(*layers, nn.ELU(), last)


@dataclass(frozen=True)
class SoundStreamSizes:
    """Architecture of a codec: strides, channels, latent dim, n_q levels of `vocab` codes.

    code_decay, dead_share: as ResidualVQ has them; quantizer: ema or factorised; code_dim: for factorised alone.
    """

    strides: Sequence[int]
    enc_channels: int
    dec_channels: int
    dim: int
    n_q: int
    vocab: int
    code_decay: float = 0.99
    dead_share: float = 0.1
    quantizer: str = "ema"
    code_dim: int = 8


class SoundStream(nn.Module):
    """`norm=False` builds the same model without weight norm, for the folded weights that are exported."""

    kind = "soundstream"  # of its export
    encoder_lookahead = decoder_lookahead = 0  # frames after an output that it depends on: every layer is causal

    def __init__(self, sizes: SoundStreamSizes, norm: bool = True):
        super().__init__()
        s, strides = sizes, tuple(sizes.strides)
        self.hop = math.prod(strides)
        self.encoder = encoder(s.enc_channels, s.dim, strides, norm)
        self.decoder = decoder(s.dec_channels, s.dim, strides, norm)
        self.quantizer: ResidualVQ | FactorisedVQ = (
            FactorisedVQ(s.dim, s.n_q, s.vocab, s.code_dim, s.code_decay, norm) if s.quantizer == "factorised"
            else ResidualVQ(s.dim, s.n_q, s.vocab, s.code_decay, s.dead_share))
        # Samples of history: a residual unit reaches back (kernel - 1) x dilation, a strided layer one stride more, all at
        # the rate of their block.  The first and last layers add their own kernels.
        reach = sum(DILATIONS) * (KERNEL - 1)
        hops = [math.prod(strides[:i]) for i in range(len(strides))]
        down = sum((reach + stride) * hop for stride, hop in zip(strides, hops, strict=True))
        self.encoder_context = math.ceil((KERNEL - 1 + down + 2 * self.hop) / self.hop)
        self.decoder_context = math.ceil(((KERNEL - 1) * self.hop + down + KERNEL - 1) / self.hop)

    def forward(self, wav_BT: torch.Tensor, n_q_B: torch.Tensor | None = None,
                quantize: bool = True) -> dict[str, torch.Tensor]:
        """The training pass: wav_BT (as long as the input), codes_BTQ, the quantizer's commitment and codebook losses,
        and x_BDT, the detached latents. Without `quantize` wav_BT alone, from unquantized latents."""
        x_BDT = self.latents(wav_BT)
        if not quantize:
            return {"wav_BT": self.synthesize(x_BDT)}
        out = self.quantizer(x_BDT, n_q_B)
        return {"wav_BT": self.synthesize(out["quantized_BDT"]), "codes_BTQ": out["codes_BTQ"],
                "commitment": out["commitment"], "codebook": out["codebook"], "x_BDT": x_BDT.detach()}

    def latents(self, wav_BT: torch.Tensor) -> torch.Tensor:
        """x_BDT with T / hop frames. Raises ValueError where T is no multiple of hop."""
        if wav_BT.shape[-1] % self.hop or not wav_BT.shape[-1]:
            raise ValueError(f"the codec takes a positive multiple of {self.hop} samples, got {wav_BT.shape[-1]}: "
                             "pad with zeros")
        return self.encoder(wav_BT[:, None])

    def synthesize(self, x_BDT: torch.Tensor) -> torch.Tensor:
        """wav_BT of latents."""
        return self.decoder(x_BDT)[:, 0]

    def encode(self, wav_BT: torch.Tensor) -> torch.Tensor:
        """codes_BTQ of every level."""
        return self.quantizer.encode(self.latents(wav_BT))

    def decode(self, codes_BTQ: torch.Tensor) -> torch.Tensor:
        """wav_BT of any prefix of the levels, frames x hop samples."""
        return self.synthesize(self.quantizer.decode(codes_BTQ))

    def decode_after(self, codes_BTQ: torch.Tensor, known_BT: torch.Tensor) -> torch.Tensor:
        """As `decode`: a causal decoder makes the known sound of its history again."""
        return self.decode(codes_BTQ)


def fold(model: SoundStream) -> SoundStream:
    """Replaces weight norm by the plain weights, in place; the state then fits `SoundStream(sizes, norm=False)`."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
    return model
