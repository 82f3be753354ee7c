"""Fréchet distance (1812.08466) between sets of sounds, by plain embeddings: how far their Gaussians lie apart.

No embedding network comes inside a package.  An embedding is the means and standard deviations over time of a second's
log-mels (64 bands), which reflect loudness, timbre and dynamics, not harmony.  The embedder is fixed, so values compare
between checkpoints and runs, but not with published FAD.  wav_T float32 mono at 16 kHz.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from audiolm.tokenizers.base import SAMPLE_RATE

EMBEDDER = "log-mel statistics"
BANDS, FRAMES = 64, 100  # of a second
SHRINK = 0.05  # of a covariance towards its diagonal: a few minutes of sound do not determine a full one


def embed_logmel(wav_T: np.ndarray) -> np.ndarray:
    """x_SD: an embedding for each whole second, half a second apart. Raises ValueError below one second."""
    from audiolm.models.mel import HOP, clip_mel

    if len(wav_T) < SAMPLE_RATE:
        raise ValueError(f"{len(wav_T) / SAMPLE_RATE:.2f} s cannot be embedded: give sounds of at least 1 s")
    mel_TF = clip_mel(wav_T[:len(wav_T) // HOP * HOP], BANDS).numpy()
    rows = [mel_TF[a:a + FRAMES] for a in range(0, len(mel_TF) - FRAMES + 1, FRAMES // 2)]
    return np.stack([np.concatenate([r.mean(0), r.std(0)]) for r in rows]).astype(np.float64)


def frechet(x_ND: np.ndarray, y_MD: np.ndarray) -> float:
    """|mean difference|^2 + tr(A + B - 2 (A B)^(1/2)) of two sets of rows. Raises ValueError for fewer than two."""
    if min(len(x_ND), len(y_MD)) < 2:
        raise ValueError(f"{min(len(x_ND), len(y_MD))} rows have no covariance: give at least two seconds of sound")
    (m, a), (n, b) = ((x.mean(0), _covariance(x)) for x in (x_ND, y_MD))
    # tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2), which is symmetric: eigenvalues are real and stable
    w, v = np.linalg.eigh(a)
    half = (v * np.sqrt(np.maximum(w, 0))) @ v.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(half @ b @ half), 0)).sum()
    return float(((m - n) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * cross)


def unbiased_frechet(x: Sequence[np.ndarray], y: Sequence[np.ndarray]) -> np.ndarray:
    """values_N whose mean is the distance of two sets of N clips (rows each), extrapolated to endless sets.

    The distance of n clips is too large by about c / n (1911.07023, 2311.01616).  The line through n and n - 1 clips ends
    in the jackknife's estimate, and its pseudo-values are one for each pair of clips left out.  The estimate may fall below 0.
    Raises ValueError for sets of different sizes, or of fewer than two clips.
    """
    n = len(x)
    if n != len(y) or n < 2:
        raise ValueError(f"sets of {n} and {len(y)} clips cannot be compared: give both the same number, at least 2")
    whole = frechet(np.concatenate(x), np.concatenate(y))
    less = [frechet(*(np.concatenate([*clips[:i], *clips[i + 1:]]) for clips in (x, y))) for i in range(n)]
    return n * whole - (n - 1) * np.array(less)


def _covariance(x_ND: np.ndarray) -> np.ndarray:
    c = np.cov(x_ND, rowvar=False)
    return (1 - SHRINK) * c + SHRINK * np.diag(np.diag(c))
