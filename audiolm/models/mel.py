"""Log-mel features, their MFCCs and every mel filterbank of the package.

Log-mels: window 400 (25 ms), hop 160 (10 ms), 120 zeros on each side, no centring.  n samples, a multiple of 160, give
exactly n / 160 frames, and a frame's window is centred on its hop.
Shapes: wav_BT at 16 kHz -> mel_BTF, F bands.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F

CPU = torch.device("cpu")
WINDOW, HOP = 400, 160
FLOOR = 1e-5  # of a mel magnitude: -100 dBFS
KNEE = 0.8  # of the band that a warp scales; the last fifth takes up the difference
KALDI_LOW_HZ = 20.0  # where Kaldi's lowest band begins
CLIP_FLOOR = 0.03  # of a row's level: 30 dB below it; lower bands are codecs' holes and noise, which say nothing
SLANEY_KNEE_HZ, SLANEY_KNEE_MEL = 1000.0, 15  # linear below, logarithmic above
SLANEY_HZ_PER_MEL, SLANEY_LOG_STEP = 200 / 3, math.log(6.4) / 27


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # a cached bank may take part in a backward pass later
def filterbank(sample_rate: int, n_fft: int, n_mels: int, scale: str = "htk", device: torch.device = CPU,
               dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(n_fft // 2 + 1, n_mels): triangular bands equally spaced on a mel scale, each by its own library's convention.

    "htk": triangles over Hz, each with peak 1; "slaney" (librosa): over Hz, each of area 1; "kaldi": over mels, from
    20 Hz, each with peak 1.  Computed in float64, rounded to `dtype` once.  Kept on its device, because a copy at each
    use would stop a GPU's queue.
    """
    bins = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    edges = _edges(scale, sample_rate / 2, n_mels)
    bank = _triangles(_kaldi_mel(bins) if scale == "kaldi" else bins, edges)
    if scale == "slaney":
        bank = bank * 2 / (edges[2:] - edges[:-2])
    return bank.to(dtype).to(device)


def _edges(scale: str, half_hz: float, n_mels: int, device: torch.device = CPU) -> torch.Tensor:
    """(n_mels + 2,) float64: band i rises from entry i, peaks at i + 1 and ends at i + 2. In Hz; in mels for "kaldi"."""
    def spaced(low: float, high: float) -> torch.Tensor:
        return torch.linspace(low, high, n_mels + 2, dtype=torch.float64, device=device)

    if scale == "htk":
        return 700.0 * (10.0 ** (spaced(0.0, 2595.0 * math.log10(1.0 + half_hz / 700.0)) / 2595.0) - 1.0)
    if scale == "kaldi":
        return spaced(float(_kaldi_mel(KALDI_LOW_HZ)), float(_kaldi_mel(half_hz)))
    mels = spaced(0, SLANEY_KNEE_HZ / SLANEY_HZ_PER_MEL + math.log(half_hz / SLANEY_KNEE_HZ) / SLANEY_LOG_STEP)
    above = SLANEY_KNEE_HZ * torch.exp(SLANEY_LOG_STEP * (mels - SLANEY_KNEE_MEL))
    return torch.where(mels < SLANEY_KNEE_MEL, mels * 200 / 3, above)


def _kaldi_mel(hz: torch.Tensor | float) -> torch.Tensor:
    return 1127.0 * torch.log1p(torch.as_tensor(hz, dtype=torch.float64) / 700.0)


def _triangles(points: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """(..., n_mels) float64 weights of points (...) on the axis of the edges."""
    points = points[..., None]
    up = (points - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - points) / (edges[2:] - edges[1:-1])
    return torch.minimum(up, down).clamp_min(0)


def warped_filterbank(ratio_B: torch.Tensor, sample_rate: int, n_fft: int, n_mels: int) -> torch.Tensor:
    """(B, n_fft // 2 + 1, n_mels) HTK bands in which energy at f counts as energy at ratio x f.

    Above a knee the rest of the spectrum is mapped linearly onto the rest of the band, so that no band falls empty.
    """
    half = sample_rate / 2
    bins = torch.linspace(0, half, n_fft // 2 + 1, dtype=torch.float64, device=ratio_B.device)
    ratio_B1 = ratio_B.double()[:, None]
    knee = KNEE * half / ratio_B1.clamp_min(1.0)
    rest = (half - ratio_B1 * knee) / (half - knee)
    slope = torch.where(bins <= knee, ratio_B1, rest)
    warped = torch.where(bins <= knee, ratio_B1 * bins, half - rest * (half - bins))
    # times the slope, because bins that move apart would each count for less
    return (_triangles(warped, _edges("htk", half, n_mels, bins.device)) * slope[..., None]).float()


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def warp_matrix(ratio: float, n_mels: int = 80, sample_rate: int = 16_000, device: torch.device = CPU) -> torch.Tensor:
    """(n_mels, n_mels): log-mels times it are those of the spectrum under `warped_filterbank`'s warp, interpolated by band."""
    half = sample_rate / 2
    centres = _edges("htk", half, n_mels)[1:-1]
    knee = KNEE * half / max(ratio, 1.0)
    rest = (half - ratio * knee) / (half - knee)
    # A band takes the value of the frequency that the warp moves to its centre.
    source = torch.where(centres <= ratio * knee, centres / ratio, half - (half - centres) / rest)
    mels, at = (torch.log1p(f / 700.0) for f in (centres, source))
    place = ((at - mels[0]) / (mels[1] - mels[0])).clamp(0, n_mels - 1)
    return (1 - (torch.arange(n_mels)[:, None] - place).abs()).clamp_min(0).float().to(device)


def mel_magnitudes(wav_BT: torch.Tensor, n_mels: int = 80, sample_rate: int = 16_000, ratio_B: torch.Tensor | None = None,
                   size: int = WINDOW) -> torch.Tensor:
    """mel_BTF: mel magnitudes by windows of `size` samples, T = samples // 160, with zeros around the sound.

    ratio_B scales each row's frequencies, see `warped_filterbank`. Raises ValueError where the samples are no multiple of
    160.
    """
    if wav_BT.shape[-1] % HOP:
        raise ValueError(f"log-mels take a multiple of {HOP} samples, got {wav_BT.shape[-1]}; pad with zeros")
    window, pad = torch.hann_window(size, device=wav_BT.device, dtype=torch.float32), (size - HOP) // 2
    spec_BFT = torch.stft(F.pad(wav_BT.float(), (pad, pad)), size, HOP, size, window=window, center=False,
                          return_complex=True).abs()
    bank = (filterbank(sample_rate, size, n_mels, device=spec_BFT.device) if ratio_B is None
            else warped_filterbank(ratio_B, sample_rate, size, n_mels))
    return spec_BFT.transpose(1, 2) @ bank


def log_mel(wav_BT: torch.Tensor, n_mels: int = 80, sample_rate: int = 16_000,
            ratio_B: torch.Tensor | None = None) -> torch.Tensor:
    """mel_BTF: natural logarithms of `mel_magnitudes` with windows of 25 ms. Raises ValueError as it does."""
    return mel_magnitudes(wav_BT, n_mels, sample_rate, ratio_B).clamp_min(FLOOR).log()


def floored(mel_BTF: torch.Tensor, valid_BT: torch.Tensor) -> torch.Tensor:
    """mel_BTF with a soft floor CLIP_FLOOR below each row's own level, the root mean square over its valid frames.

    Log-mels of quiet bands vary by tens of dB where nothing is heard, above all after a lossy codec, and would outweigh speech.
    """
    size_BTF = mel_BTF.float().exp()
    mean_BT = size_BTF.square().mean(-1) * valid_BT
    level_B = (mean_BT.sum(1) / valid_BT.sum(1).clamp_min(1)).sqrt()
    return (size_BTF + CLIP_FLOOR * level_B[:, None, None]).log()


def standardised(x_BTC: torch.Tensor, valid_BT: torch.Tensor, min_std: float) -> torch.Tensor:
    """x_BTC with zero mean and unit variance over each row's valid frames; a deviation below min_std counts as min_std."""
    keep_BT1, count_B11 = valid_BT[..., None], valid_BT.sum(1)[:, None, None]
    x_BTC = x_BTC - (x_BTC * keep_BT1).sum(1, keepdim=True) / count_B11
    std_B1C = ((x_BTC * keep_BT1).square().sum(1, keepdim=True) / count_B11).sqrt()
    return x_BTC / std_B1C.clamp_min(min_std)


def clip_mel(wav_T: np.ndarray, n_mels: int = 80) -> torch.Tensor:
    """mel_TF of one clip; its last 10 ms frame is padded with zeros."""
    wav_1T = torch.from_numpy(np.ascontiguousarray(wav_T, np.float32))[None]
    return log_mel(F.pad(wav_1T, (0, -wav_1T.shape[1] % HOP)), n_mels)[0]


def mfcc(mel_BTF: torch.Tensor, n: int = 13) -> torch.Tensor:
    """(B, T, 3n): the first n cepstra (orthonormal DCT-II of log-mels) with their first and second differences."""
    f = mel_BTF.shape[-1]
    k = torch.arange(n, device=mel_BTF.device, dtype=torch.float32)[None]
    i = torch.arange(f, device=mel_BTF.device, dtype=torch.float32)[:, None]
    dct = torch.cos(math.pi / f * (i + 0.5) * k) * math.sqrt(2.0 / f)
    c_BTN = mel_BTF @ dct

    def delta(x_BTN):  # the slope of a regression over +-2 frames; 10 = 2 x (1 + 4); the ends are repeated
        p = F.pad(x_BTN.transpose(1, 2), (2, 2), mode="replicate").transpose(1, 2)
        return (2 * (p[:, 4:] - p[:, :-4]) + (p[:, 3:-1] - p[:, 1:-3])) / 10.0

    d = delta(c_BTN)
    return torch.cat([c_BTN, d, delta(d)], dim=-1)
