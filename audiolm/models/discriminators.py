"""Discriminators of the codec's adversarial training, in two sets.

"dac": multi-period and multi-resolution complex STFT, after DAC's recipe (2306.06546).  "soundstream": the waveform at
three scales and one complex STFT (2107.03312, III-D), as AudioLM's codec has them.
`Discriminators.forward(wav_BT)` returns one (logits, features) pair for each discriminator; features are the activations
of its layers, for feature matching.  `channels` scales every width, so that small ones are cheap on a CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

DiscriminatorOutput = tuple[torch.Tensor, list[torch.Tensor]]
Size = tuple[int, int]


def _conv(c_in: int, c_out: int, kernel: Size, stride: Size = (1, 1), dilation: int = 1) -> nn.Module:
    padding = ((kernel[0] - 1) // 2 * dilation, (kernel[1] - 1) // 2)
    return weight_norm(nn.Conv2d(c_in, c_out, kernel, stride, padding, dilation=(dilation, 1)))


def _conv1d(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    return weight_norm(nn.Conv1d(c_in, c_out, kernel, stride, (kernel - 1) // 2, groups=groups))


class Layers(nn.ModuleList):
    """Convolutions with leaky ReLU between them; returns the last one's output and the activations before it."""

    def forward(self, x: torch.Tensor, slope: float = 0.1) -> DiscriminatorOutput:
        *inner, last = self
        features = []
        for layer in inner:
            x = F.leaky_relu(layer(x), slope)
            features.append(x)
        return last(x), features


def _spectrum(wav_BT: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """Real and imaginary parts of the STFT with a hop of a quarter window, BCTF with C = 2, fp32."""
    n = len(window)
    with torch.autocast(wav_BT.device.type, enabled=False):  # half precision has no FFT
        spec_BFT = torch.stft(wav_BT.float(), n, n // 4, n, window=window.float(), normalized=True, return_complex=True)
    # contiguous, because a convolution of a permuted two-channel input corrupts memory on some CPUs (torch 2.13)
    return torch.view_as_real(spec_BFT).permute(0, 3, 2, 1).contiguous()


class Period(nn.Module):
    """Discriminator of every period-th sample: one set of kernels reads each of the `period` interleaved signals."""

    def __init__(self, period: int, channels: int):
        super().__init__()
        self.period = period
        widths = [1, channels, 4 * channels, 16 * channels, 32 * channels]
        # widths and strides of HiFi-GAN's multi-period discriminator (2010.05646)
        layers = [_conv1d(a, b, 5, 3) for a, b in zip(widths, widths[1:], strict=False)]
        self.layers = Layers([*layers, _conv1d(widths[-1], widths[-1], 5), _conv1d(widths[-1], 1, 3)])

    def forward(self, wav_BT: torch.Tensor) -> DiscriminatorOutput:
        x_BT = F.pad(wav_BT[:, None], (0, -wav_BT.shape[-1] % self.period), mode="reflect")[:, 0]
        # an example's signals stay neighbours, so that the batch's real and fake halves stay halves
        logits, features = self.layers(x_BT.view(len(x_BT), -1, self.period).transpose(1, 2).flatten(0, 1)[:, None])
        b = len(wav_BT)
        return logits.view(b, self.period, -1), [f.view(b, self.period, *f.shape[1:]) for f in features]


class Spectral(nn.Module):
    """Discriminator of an STFT's real and imaginary parts (hop: a quarter window), time by frequency."""

    def __init__(self, window: int, channels: int):
        super().__init__()
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        layers = [_conv(2, channels, (3, 9))]
        layers += [_conv(channels, channels, (3, 9), (1, 2), dilation) for dilation in (1, 2, 4)]
        layers += [_conv(channels, channels, (3, 3)), _conv(channels, 1, (3, 3))]
        self.layers = Layers(layers)

    def forward(self, wav_BT: torch.Tensor) -> DiscriminatorOutput:
        return self.layers(_spectrum(wav_BT, self.window).to(self.layers[-1].bias.dtype))


class WaveScale(nn.Module):
    """Discriminator of the waveform, down-sampled by `scale`: a plain, four grouped and two plain convolutions."""

    def __init__(self, scale: int, channels: int):
        super().__init__()
        self.scale = scale
        widths = [min(channels // 2 * 4**i, 32 * channels) for i in range(5)]
        layers = [_conv1d(1, widths[0], 15)]
        layers += [_conv1d(a, b, 41, 4, groups=max(1, a // 4)) for a, b in zip(widths, widths[1:], strict=False)]
        self.layers = Layers([*layers, _conv1d(widths[-1], widths[-1], 5), _conv1d(widths[-1], 1, 3)])

    def forward(self, wav_BT: torch.Tensor) -> DiscriminatorOutput:
        x_BCT = wav_BT[:, None]
        if self.scale > 1:
            x_BCT = F.avg_pool1d(x_BCT, 2 * self.scale, self.scale, self.scale // 2)
        return self.layers(x_BCT, 0.3)


class _SpectralUnit(nn.Module):
    """Residual unit: a 3 x 3 convolution, then one that strides (time, frequency)."""

    def __init__(self, c_in: int, c_out: int, stride: Size):
        super().__init__()
        self.stay = _conv(c_in, c_in, (3, 3))
        self.move = weight_norm(nn.Conv2d(c_in, c_out, (stride[0] + 2, 4), stride))
        self.skip = weight_norm(nn.Conv2d(c_in, c_out, 1, stride))

    def forward(self, x_BCTF: torch.Tensor) -> torch.Tensor:
        ahead = self.move.stride[0]  # pads the end so that an odd number of frames is rounded up, as the skip does
        return self.skip(x_BCTF) + self.move(F.pad(F.leaky_relu(self.stay(x_BCTF), 0.3), (1, 1, 1, ahead)))


class ComplexSTFT(nn.Module):
    """Discriminator of one complex STFT: 7 x 7, six residual units, 1 x F, down to a sequence of logits."""

    def __init__(self, window: int, channels: int):
        super().__init__()
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        layers: list[nn.Module] = [_conv(2, channels, (7, 7))]
        # frequency halves in every unit, time in every other one; width doubles in every other one
        width, bins = channels, window // 2
        for i in range(6):
            stride, wider = ((1, 2), (2, 2))[i % 2], 2 * width if i % 2 == 0 else width
            layers.append(_SpectralUnit(width, wider, stride))
            width, bins = wider, bins // 2
        self.layers = Layers([*layers, weight_norm(nn.Conv2d(width, 1, (1, bins)))])

    def forward(self, wav_BT: torch.Tensor) -> DiscriminatorOutput:
        x_BCTF = _spectrum(wav_BT, self.window)[..., :-1].contiguous()  # without the last bin, F halves six times evenly
        return self.layers(x_BCTF.to(self.layers[-1].bias.dtype), 0.3)


class Discriminators(nn.Module):
    """kind "dac": a Period for each of `periods`, a Spectral for each of `windows`; "soundstream": WaveScale at 1, 1/2 and
    1/4 of the rate and a ComplexSTFT of `stft_window`."""

    def __init__(self, kind: str, periods: tuple[int, ...], windows: tuple[int, ...], channels: int, stft_window: int = 1024):
        super().__init__()
        if kind == "soundstream":
            each = [*(WaveScale(s, channels) for s in (1, 2, 4)), ComplexSTFT(stft_window, channels)]
        else:
            each = [*(Period(p, channels) for p in periods), *(Spectral(w, channels) for w in windows)]
        self.each = nn.ModuleList(each)

    def forward(self, wav_BT: torch.Tensor) -> list[DiscriminatorOutput]:
        return [d(wav_BT) for d in self.each]
