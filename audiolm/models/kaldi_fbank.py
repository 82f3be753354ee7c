"""Log-mel energies as Kaldi makes them, scaled for one clip at a time: what w2v-BERT 2.0 hears (2312.05187).

Window 400 (povey), hop 160, no centring; each frame's mean is taken out before a pre-emphasis of 0.97; 512-point FFT; the
bands are triangles on the scale 1127 ln(1 + f / 700), 20 to 8000 Hz; every band to mean 0 and variance 1 over a row's own
frames.  In float64: what float32 leaves of a loud bin is more than a quiet one of the same frame holds.
The numbers are those of transformers' SeamlessM4TFeatureExtractor.  Shapes: wav_BT at 16 kHz -> mel_BTF.
"""

from __future__ import annotations

import functools

import torch

SAMPLE_RATE, WINDOW, HOP, N_FFT = 16_000, 400, 160, 512
LOW_HZ = 20.0
SCALE = 2.0 ** 15  # Kaldi reads 16-bit integers
EMPHASIS = 0.97
FLOOR = 2.0 ** -23  # of an energy
EPS = 1e-7


def scaled_log_mel(wav_BT: torch.Tensor, frames_B: torch.Tensor, n_mels: int = 80) -> torch.Tensor:
    """mel_BTF float32, T = 1 + (samples - 400) // 160. frames_B (at least 2 each) are a row's own; zeros past them."""
    mel_BTF = torch.stack([_log_mel(wav_T, n_mels) for wav_T in wav_BT])  # a row at a time: frames in float64 are large
    inside_BT1 = (torch.arange(mel_BTF.shape[1], device=mel_BTF.device) < frames_B[:, None])[..., None]
    frames_B11 = frames_B[:, None, None]
    mel_BTF = (mel_BTF - (mel_BTF * inside_BT1).sum(1, keepdim=True) / frames_B11) * inside_BT1
    return (mel_BTF / (mel_BTF.square().sum(1, keepdim=True) / (frames_B11 - 1) + EPS).sqrt()).float()


def _log_mel(wav_T: torch.Tensor, n_mels: int) -> torch.Tensor:
    window_W, bank_NF = _tables(n_mels, wav_T.device)
    x_TW = wav_T.double().unfold(0, WINDOW, HOP) * SCALE
    x_TW -= x_TW.mean(1, keepdim=True)
    before_TW = torch.cat([x_TW[:, :1], x_TW[:, :-1]], 1)
    spectrum_TN = torch.fft.rfft((x_TW - EMPHASIS * before_TW) * window_W, N_FFT)
    power_TN = spectrum_TN.real.square() + spectrum_TN.imag.square()
    return (power_TN @ bank_NF).clamp_min(FLOOR).log()


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _tables(n_mels: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """window_W and bank_NF, float64, kept on their device."""
    def to_mel(hz):
        return 1127.0 * torch.log1p(torch.as_tensor(hz, dtype=torch.float64) / 700.0)

    edges = torch.linspace(float(to_mel(LOW_HZ)), float(to_mel(SAMPLE_RATE / 2)), n_mels + 2, dtype=torch.float64)
    bins_N1 = to_mel(torch.arange(N_FFT // 2 + 1) * (SAMPLE_RATE / N_FFT))[:, None]
    up, down = (bins_N1 - edges[:-2]) / edges.diff()[:-1], (edges[2:] - bins_N1) / edges.diff()[1:]
    povey_W = torch.hann_window(WINDOW, periodic=False, dtype=torch.float64) ** 0.85
    return povey_W.to(device), torch.minimum(up, down).clamp_min(0).to(device)
