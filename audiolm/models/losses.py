"""The codec's losses, each a pure function of signals or judgements: "dac" (DAC's scales and reductions) and "soundstream"
(PAPER 1.5; 2107.03312 III-E).

wav_BT at 16 kHz; judgements are what `Discriminators` returns: a (logits, features) pair for each discriminator.
"dac": least squares, summed over discriminators, features summed over layers too; "soundstream": hinge, averaged over all.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from audiolm.models.discriminators import DiscriminatorOutput
from audiolm.models.mel import filterbank

WINDOWS = (32, 64, 128, 256, 512, 1024, 2048)
N_MELS = (5, 10, 20, 40, 80, 160, 320)
FLOOR = 10 ** (-70 / 20)  # rms; quieter than speech recordings' noise, where a bare log would take over the gradient


def _floor(size: int) -> float:
    """The magnitude of noise of rms FLOOR in a bin of a window of `size`."""
    return FLOOR * math.sqrt(3 / 8 * size)  # 3/8: a Hann window's power


def _mel(wav_BT: torch.Tensor, size: int, n_mels: int, sample_rate: int) -> torch.Tensor:
    window = torch.hann_window(size, device=wav_BT.device)
    spec_BFT = torch.stft(wav_BT, size, size // 4, size, window=window, return_complex=True).abs()
    return spec_BFT.transpose(1, 2) @ filterbank(sample_rate, size, n_mels, device=wav_BT.device)


def multi_scale_mel(fake_BT: torch.Tensor, real_BT: torch.Tensor, sample_rate: int = 16_000) -> torch.Tensor:
    """Sum over window lengths of the L1 distance of log10 (mel magnitude + that of noise at -70 dBFS), in fp32; hop: a
    quarter window."""
    with torch.autocast(fake_BT.device.type, enabled=False):
        both_BT = torch.cat([fake_BT.float(), real_BT.float()])
        total = both_BT.new_zeros(())
        for size, n_mels in zip(WINDOWS, N_MELS, strict=True):
            fake, real = (_mel(both_BT, size, n_mels, sample_rate) + _floor(size)).log10().chunk(2)
            total = total + F.l1_loss(fake, real)
    return total


def multi_scale_spectral(fake_BT: torch.Tensor, real_BT: torch.Tensor, sample_rate: int = 16_000) -> torch.Tensor:
    """The paper's reconstruction: 64 mels, windows s = 2^6 .. 2^11, hop s / 4; the mean of |mel| distances plus
    sqrt(s / 2) times the root mean square, over mels, of log distances; the mean over frames, summed over scales."""
    with torch.autocast(fake_BT.device.type, enabled=False):
        both_BT = torch.cat([fake_BT.float(), real_BT.float()])
        total = both_BT.new_zeros(())
        for size in (64, 128, 256, 512, 1024, 2048):
            fake, real = _mel(both_BT, size, 64, sample_rate).chunk(2)
            floor = _floor(size)
            log = ((fake + floor).log() - (real + floor).log()).square().mean(-1).add(1e-12).sqrt().mean()
            total = total + F.l1_loss(fake, real) + math.sqrt(size / 2) * log
    return total


def waveform_distance(fake_BT: torch.Tensor, real_BT: torch.Tensor) -> torch.Tensor:
    """Power of the difference, row by row relative to the real one's (at least -40 dBFS). Squares, because the loud low
    harmonics can be matched and what cannot, the weak noise above them, is then left to the spectral losses."""
    return ((fake_BT - real_BT).square().mean(1) / real_BT.square().mean(1).clamp_min(1e-4)).mean()


def discriminator_loss(real: list[DiscriminatorOutput], fake: list[DiscriminatorOutput], kind: str = "dac") -> torch.Tensor:
    """What the discriminators minimise: real towards 1, fake towards 0, or beyond +-1 by hinge."""
    total = 0.0
    for (r, _), (f, _) in zip(real, fake, strict=True):
        r, f = r.float(), f.float()
        if kind == "soundstream":
            total = total + (F.relu(1 - r).mean() + F.relu(1 + f).mean()) / len(real)
        else:
            total = total + (1 - r).square().mean() + f.square().mean()
    return total


def adversarial_loss(fake: list[DiscriminatorOutput], kind: str = "dac") -> torch.Tensor:
    """What the generator minimises so that the fakes pass for real."""
    if kind == "soundstream":
        return sum(F.relu(1 - f.float()).mean() for f, _ in fake) / len(fake)
    return sum((1 - f.float()).square().mean() for f, _ in fake)


def feature_loss(real: list[DiscriminatorOutput], fake: list[DiscriminatorOutput], kind: str = "dac") -> torch.Tensor:
    """Mean L1 between the discriminators' activations, layer by layer. The real side gives no gradient."""
    each = [(f - r.detach()).abs().mean(dtype=torch.float32)  # no fp32 copy of a layer is kept
            for (_, reals), (_, fakes) in zip(real, fake, strict=True) for r, f in zip(reals, fakes, strict=True)]
    return sum(each) / len(each) if kind == "soundstream" else sum(each)
