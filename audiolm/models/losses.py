"""The codec's losses, each a pure function of signals or judgements (PAPER 1.5; weights and scales after DAC).

wav_BT at 16 kHz; judgements are what `Discriminators` returns: a (logits, features) pair for each discriminator.
Adversarial losses sum over discriminators and average over everything else; `kind` is "lsgan" (DAC) or "hinge" (paper).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from audiolm.models.discriminators import Judgement
from audiolm.models.mel import mel_filterbank

WINDOWS = (32, 64, 128, 256, 512, 1024, 2048)
N_MELS = (5, 10, 20, 40, 80, 160, 320)
FLOOR = 10 ** (-70 / 20)  # rms; quieter than speech recordings' noise, where a bare log would take over the gradient


def multi_scale_mel(fake_BT: torch.Tensor, real_BT: torch.Tensor, sample_rate: int = 16_000) -> torch.Tensor:
    """Sum over window lengths of the L1 distance of log10 (mel magnitude + that of noise at -70 dBFS), in fp32; hop: a
    quarter window."""
    with torch.autocast(fake_BT.device.type, enabled=False):
        both_BT = torch.cat([fake_BT.float(), real_BT.float()])
        total = both_BT.new_zeros(())
        for size, n_mels in zip(WINDOWS, N_MELS, strict=True):
            window = torch.hann_window(size, device=both_BT.device)
            spec_BFT = torch.stft(both_BT, size, size // 4, size, window=window, return_complex=True).abs()
            mel_BTF = spec_BFT.transpose(1, 2) @ mel_filterbank(sample_rate, size, n_mels).to(both_BT.device)
            fake, real = (mel_BTF + FLOOR * math.sqrt(3 / 8 * size)).log10().chunk(2)  # 3/8: a Hann window's power
            total = total + F.l1_loss(fake, real)
    return total


def discriminator_loss(real: list[Judgement], fake: list[Judgement], kind: str = "lsgan") -> torch.Tensor:
    """What the discriminators minimise: real towards 1, fake towards 0 (lsgan), or beyond +-1 (hinge)."""
    total = 0.0
    for (r, _), (f, _) in zip(real, fake, strict=True):
        r, f = r.float(), f.float()
        if kind == "hinge":
            total = total + F.relu(1 - r).mean() + F.relu(1 + f).mean()
        else:
            total = total + (1 - r).square().mean() + f.square().mean()
    return total


def adversarial_loss(fake: list[Judgement], kind: str = "lsgan") -> torch.Tensor:
    """What the generator minimises so that the fakes pass for real."""
    if kind == "hinge":
        return sum(F.relu(1 - f.float()).mean() for f, _ in fake)
    return sum((1 - f.float()).square().mean() for f, _ in fake)


def feature_loss(real: list[Judgement], fake: list[Judgement]) -> torch.Tensor:
    """L1 between the discriminators' activations, relative to the real ones' mean magnitude, so that no layer's scale
    counts; summed over layers, averaged over discriminators. The real side gives no gradient."""
    total = 0.0
    for (_, reals), (_, fakes) in zip(real, fake, strict=True):
        for r, f in zip(reals, fakes, strict=True):
            r = r.detach().float()
            total = total + F.l1_loss(f.float(), r) / r.abs().mean().clamp_min(1e-4)
    return total / len(real)
