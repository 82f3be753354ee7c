"""Log-mel features and their MFCCs, one convention for every user (DESIGN 1.7).

Window 400 (25 ms), hop 160 (10 ms), 120 zeros on each side, no centring: n samples, a multiple of 160, give exactly
n / 160 frames, and a frame's window is centred on its hop.  Shapes: wav_BT -> mel_BTF.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

CPU = torch.device("cpu")
WINDOW, HOP, PAD = 400, 160, 120
FLOOR = 1e-5  # of a mel magnitude: -100 dBFS
KNEE = 0.8  # of the band that a warp scales


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept may be wanted by a backward pass later
def mel_filterbank(sample_rate: int, n_fft: int, n_mels: int, device: torch.device = CPU) -> torch.Tensor:
    """Triangles equally spaced on the HTK mel scale: (n_fft // 2 + 1, n_mels), float32, each with peak 1. Kept on its device:
    a copy at each use would stop a GPU's queue."""
    freqs = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    return _triangles(freqs, sample_rate, n_mels).float().to(device)


def _triangles(freqs: torch.Tensor, sample_rate: int, n_mels: int) -> torch.Tensor:
    """(..., n_mels) weights of frequencies (...) in Hz, float64."""
    def to_mel(f):
        return 2595.0 * math.log10(1.0 + f / 700.0)

    mels = torch.linspace(0.0, to_mel(sample_rate / 2), n_mels + 2, dtype=torch.float64, device=freqs.device)
    edges = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
    freqs = freqs[..., None]
    up = (freqs - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - freqs) / (edges[2:] - edges[1:-1])
    return torch.minimum(up, down).clamp_min(0)


def warped_filterbank(ratio_B: torch.Tensor, sample_rate: int, n_fft: int, n_mels: int) -> torch.Tensor:
    """(B, n_fft // 2 + 1, n_mels): what lies at f is heard at ratio x f, up to a knee, above which the rest of the band
    fills the rest: so no band falls empty."""
    half = sample_rate / 2
    freqs = torch.linspace(0, half, n_fft // 2 + 1, dtype=torch.float64, device=ratio_B.device)
    ratio_B1 = ratio_B.double()[:, None]
    knee = KNEE * half / ratio_B1.clamp_min(1.0)
    rest = (half - ratio_B1 * knee) / (half - knee)
    slope = torch.where(freqs <= knee, ratio_B1, rest)
    moved = torch.where(freqs <= knee, ratio_B1 * freqs, half - rest * (half - freqs))
    # times the slope: bins that move apart would each count for less
    return (_triangles(moved, sample_rate, n_mels) * slope[..., None]).float()


def log_mel(wav_BT: torch.Tensor, n_mels: int = 80, sample_rate: int = 16_000,
            ratio_B: torch.Tensor | None = None) -> torch.Tensor:
    """Natural log of the mel magnitudes, mel_BTF with T = samples // 160; samples must be a multiple of 160. ratio_B scales
    each row's frequencies (`warped_filterbank`)."""
    if wav_BT.shape[-1] % HOP:
        raise ValueError(f"log_mel takes a multiple of {HOP} samples, got {wav_BT.shape[-1]}; pad with zeros")
    window = torch.hann_window(WINDOW, device=wav_BT.device, dtype=torch.float32)
    spec_BFT = torch.stft(F.pad(wav_BT.float(), (PAD, PAD)), WINDOW, HOP, WINDOW, window=window, center=False,
                          return_complex=True).abs()
    bank = (mel_filterbank(sample_rate, WINDOW, n_mels, spec_BFT.device) if ratio_B is None
            else warped_filterbank(ratio_B, sample_rate, WINDOW, n_mels))
    return (spec_BFT.transpose(1, 2) @ bank).clamp_min(FLOOR).log()


def mfcc(mel_BTF: torch.Tensor, n: int = 13) -> torch.Tensor:
    """The first n cepstra (orthonormal DCT-II of log-mels) with first and second differences: BT(3n)."""
    f = mel_BTF.shape[-1]
    k = torch.arange(n, device=mel_BTF.device, dtype=torch.float32)[None]
    i = torch.arange(f, device=mel_BTF.device, dtype=torch.float32)[:, None]
    dct = torch.cos(math.pi / f * (i + 0.5) * k) * math.sqrt(2.0 / f)
    c_BTN = mel_BTF @ dct

    def delta(x_BTN):  # regression over +-2 frames, ends repeated
        p = F.pad(x_BTN.transpose(1, 2), (2, 2), mode="replicate").transpose(1, 2)
        return (2 * (p[:, 4:] - p[:, :-4]) + (p[:, 3:-1] - p[:, 1:-3])) / 10.0

    d = delta(c_BTN)
    return torch.cat([c_BTN, d, delta(d)], dim=-1)
