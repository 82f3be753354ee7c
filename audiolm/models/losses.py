"""The codec's losses, pure functions of signals or of discriminators' outputs, in two sets.

"dac": DAC's scales and reductions (2306.06546); least squares, summed over discriminators, features over layers too.
"soundstream": 2107.03312, III-E; hinge, averaged over discriminators and layers.
wav_BT at 16 kHz; `real` and `fake` are what `Discriminators` returns: a (logits, features) pair for each discriminator.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from audiolm.models.discriminators import DiscriminatorOutput
from audiolm.models.mel import filterbank

# DAC's seven scales; `multi_scale_spectral` has SoundStream's six
WINDOWS = (32, 64, 128, 256, 512, 1024, 2048)
N_MELS = (5, 10, 20, 40, 80, 160, 320)
# rms, -70 dBFS: below the noise of speech recordings.  Without it the logarithms of near-silence dominate the gradient.
FLOOR = 10 ** (-70 / 20)


def _floor(size: int) -> float:
    """The magnitude of noise of rms FLOOR in a bin of a window of `size`."""
    return FLOOR * math.sqrt(3 / 8 * size)  # 3/8: a Hann window's power


def _mel(wav_BT: torch.Tensor, size: int, n_mels: int, sample_rate: int) -> torch.Tensor:
    window = torch.hann_window(size, device=wav_BT.device)
    spec_BFT = torch.stft(wav_BT, size, size // 4, size, window=window, return_complex=True).abs()
    return spec_BFT.transpose(1, 2) @ filterbank(sample_rate, size, n_mels, device=wav_BT.device)


def multi_scale_mel(fake_BT: torch.Tensor, real_BT: torch.Tensor, sample_rate: int = 16_000) -> torch.Tensor:
    """L1 distance of log10 (mel magnitude + noise at -70 dBFS), summed over window lengths, in fp32.

    Hop: a quarter window.
    """
    with torch.autocast(fake_BT.device.type, enabled=False):
        both_BT = torch.cat([fake_BT.float(), real_BT.float()])
        total = both_BT.new_zeros(())
        for size, n_mels in zip(WINDOWS, N_MELS, strict=True):
            fake, real = (_mel(both_BT, size, n_mels, sample_rate) + _floor(size)).log10().chunk(2)
            total = total + F.l1_loss(fake, real)
    return total


def multi_scale_spectral(fake_BT: torch.Tensor, real_BT: torch.Tensor, sample_rate: int = 16_000) -> torch.Tensor:
    """SoundStream's reconstruction loss: 64 mels, windows s = 2^6 .. 2^11, hop s / 4, summed over windows.

    A window adds the mean |mel| distance and sqrt(s / 2) times the root mean square, over mels, of log distances.
    """
    with torch.autocast(fake_BT.device.type, enabled=False):
        both_BT = torch.cat([fake_BT.float(), real_BT.float()])
        total = both_BT.new_zeros(())
        for size in (64, 128, 256, 512, 1024, 2048):
            fake, real = _mel(both_BT, size, 64, sample_rate).chunk(2)
            floor = _floor(size)
            # 1e-12 keeps the root's gradient finite where both are equal
            log = ((fake + floor).log() - (real + floor).log()).square().mean(-1).add(1e-12).sqrt().mean()
            total = total + F.l1_loss(fake, real) + math.sqrt(size / 2) * log
    return total


def waveform_distance(fake_BT: torch.Tensor, real_BT: torch.Tensor) -> torch.Tensor:
    """Power of the difference, row by row relative to the real one's (at least -40 dBFS).

    Squares weigh the loud low harmonics, which can be matched, and leave the weak noise above them to the spectral losses.
    """
    return ((fake_BT - real_BT).square().mean(1) / real_BT.square().mean(1).clamp_min(1e-4)).mean()


def discriminator_loss(real: list[DiscriminatorOutput], fake: list[DiscriminatorOutput], kind: str = "dac") -> torch.Tensor:
    """Discriminators' loss: real towards 1 and fake towards 0, or beyond +-1 by hinge."""
    total = 0.0
    for (r, _), (f, _) in zip(real, fake, strict=True):
        r, f = r.float(), f.float()
        if kind == "soundstream":
            total = total + (F.relu(1 - r).mean() + F.relu(1 + f).mean()) / len(real)
        else:
            total = total + (1 - r).square().mean() + f.square().mean()
    return total


def adversarial_loss(fake: list[DiscriminatorOutput], kind: str = "dac") -> torch.Tensor:
    """Generator's loss: fakes are to be scored as real."""
    if kind == "soundstream":
        return sum(F.relu(1 - f.float()).mean() for f, _ in fake) / len(fake)
    return sum((1 - f.float()).square().mean() for f, _ in fake)


def feature_loss(real: list[DiscriminatorOutput], fake: list[DiscriminatorOutput], kind: str = "dac") -> torch.Tensor:
    """Mean L1 between the discriminators' activations, layer by layer. The real side gives no gradient."""
    each = [(f - r.detach()).abs().mean(dtype=torch.float32)  # no fp32 copy of a layer is kept
            for (_, reals), (_, fakes) in zip(real, fake, strict=True) for r, f in zip(reals, fakes, strict=True)]
    return sum(each) / len(each) if kind == "soundstream" else sum(each)
