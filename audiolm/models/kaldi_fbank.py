"""Log-mel energies by Kaldi's recipe, normalised one clip at a time: the input of w2v-BERT 2.0 (2312.05187).

Window 400 (povey), hop 160, no centring; each frame loses its mean, then a pre-emphasis of 0.97; 512-point FFT; bands of
`mel.filterbank` on the "kaldi" scale; every band is scaled to mean 0 and variance 1 over a row's own frames.
All in float64: in float32 the rounding of a loud bin exceeds a quiet bin of the same frame.
The numbers are those of transformers' SeamlessM4TFeatureExtractor.  Shapes: wav_BT at 16 kHz -> mel_BTF.
"""

from __future__ import annotations

import functools

import torch

from audiolm.models.mel import filterbank

SAMPLE_RATE, WINDOW, HOP, N_FFT = 16_000, 400, 160, 512
SCALE = 2.0 ** 15  # Kaldi reads 16-bit integers
EMPHASIS = 0.97  # Kaldi's default
FLOOR = 2.0 ** -23  # of an energy
EPS = 1e-7  # of a standard deviation, as transformers


def scaled_log_mel(wav_BT: torch.Tensor, frames_B: torch.Tensor, n_mels: int = 80) -> torch.Tensor:
    """mel_BTF float32, T = 1 + (samples - 400) // 160. A row's own frames are the first frames_B (at least 2), zeros follow."""
    mel_BTF = torch.stack([_log_mel(wav_T, n_mels) for wav_T in wav_BT])  # a row at a time: frames in float64 are large
    inside_BT1 = (torch.arange(mel_BTF.shape[1], device=mel_BTF.device) < frames_B[:, None])[..., None]
    frames_B11 = frames_B[:, None, None]
    mel_BTF = (mel_BTF - (mel_BTF * inside_BT1).sum(1, keepdim=True) / frames_B11) * inside_BT1
    return (mel_BTF / (mel_BTF.square().sum(1, keepdim=True) / (frames_B11 - 1) + EPS).sqrt()).float()


def _log_mel(wav_T: torch.Tensor, n_mels: int) -> torch.Tensor:
    bank_NF = filterbank(SAMPLE_RATE, N_FFT, n_mels, "kaldi", wav_T.device, torch.float64)
    x_TW = wav_T.double().unfold(0, WINDOW, HOP) * SCALE
    x_TW -= x_TW.mean(1, keepdim=True)
    before_TW = torch.cat([x_TW[:, :1], x_TW[:, :-1]], 1)
    spectrum_TN = torch.fft.rfft((x_TW - EMPHASIS * before_TW) * _window(wav_T.device), N_FFT)
    power_TN = spectrum_TN.real.square() + spectrum_TN.imag.square()
    return (power_TN @ bank_NF).clamp_min(FLOOR).log()


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _window(device: torch.device) -> torch.Tensor:
    """Kaldi's "povey" window, float64, kept on its device."""
    return (torch.hann_window(WINDOW, periodic=False, dtype=torch.float64) ** 0.85).to(device)
