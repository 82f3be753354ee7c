"""Augmentation of a masked model's input in training: reverberation, noise and pitch; its targets come from clean audio.

Pitch shifts warp the mel filterbank's frequencies (as vocal tract length perturbation, Jaitly and Hinton 2013), so that
durations stay.  Reverberation keeps the direct path without delay.  So nothing moves a frame.
Every row has its own draws.  Shapes: wav_BT float32 at 16 kHz with zeros past lengths_B samples; mel_BTF at 100 Hz.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from audiolm.models.mel import log_mel
from audiolm.models.transfer import send


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of one row; `seed` is that of its noises."""

    cents: float = 0.0
    snr_db: float | None = None
    colour: float = 0.0  # power falls with frequency to this power: 0 white, 1 pink
    reverb_s: float | None = None
    wet: float = 0.0  # energy of the reverberation over that of the direct path
    seed: int = 0


def draw_augmentation(chances: tuple[float, float, float], cents: float, snr_db: tuple[float, float],
                      reverb_s: tuple[float, float], generator: np.random.Generator) -> Augmentation:
    """One row's augmentation; `chances` are those of pitch, noise and reverb, the pairs are ranges."""
    # All numbers are drawn whatever applies, so that a chance does not change the draws after it.
    pitch, noise, reverb = generator.random(3) < chances
    shift, snr, colour, room, wet = generator.random(5)
    seed = int(generator.integers(2**62))
    return Augmentation(
        cents=float(cents * (2 * shift - 1)) if pitch else 0.0,
        snr_db=float(snr_db[0] + snr * (snr_db[1] - snr_db[0])) if noise else None, colour=float(colour),
        reverb_s=float(reverb_s[0] + room * (reverb_s[1] - reverb_s[0])) if reverb else None,
        wet=float(0.1 + 0.9 * wet), seed=seed)


def augment(wav_BT: torch.Tensor, lengths_B: torch.Tensor, draws: list[Augmentation], sample_rate: int = 16_000,
            spectrum: Callable[[torch.Tensor], torch.Tensor] = log_mel) -> torch.Tensor:
    """mel_BTF of the augmented rows; audio past a row's length stays silent. Only log-mels can shift the pitch."""
    rows = []
    for wav_T, n, d in zip(wav_BT, lengths_B.tolist(), draws, strict=True):
        if (d.reverb_s is None and d.snr_db is None) or not n:
            rows.append(wav_T)
            continue
        generator, clean = torch.Generator(wav_T.device).manual_seed(d.seed), wav_T[:n]
        if d.reverb_s is not None:
            clean = reverberated(clean, d.reverb_s, d.wet, sample_rate, generator)
        if d.snr_db is not None:
            clean = with_noise(clean, d.snr_db, d.colour, sample_rate, generator)
        rows.append(torch.nn.functional.pad(clean, (0, len(wav_T) - n)))
    if not any(d.cents for d in draws):
        return spectrum(torch.stack(rows))
    ratio_B = send(torch.tensor([2.0 ** (d.cents / 1200) for d in draws]), wav_BT.device)
    return log_mel(torch.stack(rows), sample_rate=sample_rate, ratio_B=ratio_B)


def reverberated(wav_T: torch.Tensor, reverb_s: float, wet: float, sample_rate: int,
                 generator: torch.Generator) -> torch.Tensor:
    """Sound convolved with a direct path and a noise tail that decays by 60 dB in reverb_s; as loud as before."""
    n = max(2, round(reverb_s * sample_rate))
    decay = 10.0 ** (-3.0 * torch.arange(n, device=wav_T.device) / n)  # of amplitudes: 10^-3 is -60 dB
    room = decay * torch.randn(n, device=wav_T.device, generator=generator)
    room[0] = 0
    room *= (wet / room.square().sum().clamp_min(1e-12)).sqrt()
    room[0] = 1
    size = 1 << (len(wav_T) + n - 2).bit_length()  # powers of two: a GPU plans each FFT size anew
    wet_T = torch.fft.irfft(torch.fft.rfft(wav_T, size) * torch.fft.rfft(room, size), size)[:len(wav_T)]
    return wet_T * (wav_T.square().sum() / wet_T.square().sum().clamp_min(1e-12)).sqrt()


def with_noise(wav_T: torch.Tensor, snr_db: float, colour: float, sample_rate: int,
               generator: torch.Generator) -> torch.Tensor:
    """Sound with noise at snr_db below it, whose power falls with frequency to the power `colour`."""
    size = math.ceil(len(wav_T) / sample_rate) * sample_rate  # whole seconds, as a GPU plans each FFT size anew
    noise = torch.randn(size, device=wav_T.device, generator=generator)
    spectrum = torch.fft.rfft(noise)
    at = torch.arange(len(spectrum), device=wav_T.device).clamp_min(1) / len(spectrum)
    # below 1 % of the band the spectrum is flat, else pink noise would be all rumble
    noise = torch.fft.irfft(spectrum * at.clamp_min(0.01) ** (-colour / 2), size)[:len(wav_T)]
    power = wav_T.square().mean() * 10.0 ** (-snr_db / 10)
    return wav_T + noise * (power / noise.square().mean().clamp_min(1e-12)).sqrt()
