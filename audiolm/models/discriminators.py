"""The codec's adversary: multi-period and multi-resolution complex-STFT discriminators (after DAC's recipe).

`Discriminators.forward(wav_BT)` returns one (logits, features) pair for each discriminator; the features are the
activations of its layers, for feature matching.  `channels` scales every width, so that small ones are cheap on a CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

Judgement = tuple[torch.Tensor, list[torch.Tensor]]
Size = tuple[int, int]


def _conv(c_in: int, c_out: int, kernel: Size, stride: Size = (1, 1), dilation: int = 1) -> nn.Module:
    padding = ((kernel[0] - 1) // 2 * dilation, (kernel[1] - 1) // 2)
    return weight_norm(nn.Conv2d(c_in, c_out, kernel, stride, padding, dilation=(dilation, 1)))


def _judge(layers: nn.ModuleList, x_BCHW: torch.Tensor) -> Judgement:
    features = []
    for layer in layers[:-1]:
        x_BCHW = F.leaky_relu(layer(x_BCHW), 0.1)
        features.append(x_BCHW)
    return layers[-1](x_BCHW), features


class Period(nn.Module):
    """Looks at every period-th sample: the signal folded to (T / period, period), kernels along time only."""

    def __init__(self, period: int, channels: int):
        super().__init__()
        self.period = period
        widths = [1, channels, 4 * channels, 16 * channels, 32 * channels]
        layers = [_conv(a, b, (5, 1), (3, 1)) for a, b in zip(widths, widths[1:], strict=False)]
        layers += [_conv(widths[-1], widths[-1], (5, 1)), _conv(widths[-1], 1, (3, 1))]
        self.layers = nn.ModuleList(layers)

    def forward(self, wav_BT: torch.Tensor) -> Judgement:
        x_BT = F.pad(wav_BT[:, None], (0, -wav_BT.shape[-1] % self.period), mode="reflect")[:, 0]
        return _judge(self.layers, x_BT.view(len(x_BT), 1, -1, self.period))


class Spectral(nn.Module):
    """Looks at the real and imaginary parts of an STFT (hop: a quarter window), time by frequency."""

    def __init__(self, window: int, channels: int):
        super().__init__()
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        layers = [_conv(2, channels, (3, 9))]
        layers += [_conv(channels, channels, (3, 9), (1, 2), dilation) for dilation in (1, 2, 4)]
        layers += [_conv(channels, channels, (3, 3)), _conv(channels, 1, (3, 3))]
        self.layers = nn.ModuleList(layers)

    def forward(self, wav_BT: torch.Tensor) -> Judgement:
        n = len(self.window)
        with torch.autocast(wav_BT.device.type, enabled=False):  # half precision has no FFT
            spec_BFT = torch.stft(wav_BT.float(), n, n // 4, n, window=self.window.float(), normalized=True,
                                  return_complex=True)
        x_BCTF = torch.view_as_real(spec_BFT).permute(0, 3, 2, 1)
        return _judge(self.layers, x_BCTF.to(self.layers[-1].bias.dtype))


class Discriminators(nn.Module):
    def __init__(self, periods: tuple[int, ...], windows: tuple[int, ...], channels: int):
        super().__init__()
        self.each = nn.ModuleList([*(Period(p, channels) for p in periods), *(Spectral(w, channels) for w in windows)])

    def forward(self, wav_BT: torch.Tensor) -> list[Judgement]:
        return [d(wav_BT) for d in self.each]
