"""Figures of a codec on held-out speech, by number of levels: quality against bit rate.

PESQ (wide band, 1 to 4.64), SI-SDR (dB), mel distance (mean L1 of log-mels, nats) and bit rate; the yardstick of the
mel distance is a clip's own mean spectrum, which any useful codec must beat.  Codes in use and perplexity per level.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from audiolm.models.mel import HOP, log_mel
from audiolm.tokenizers.base import SAMPLE_RATE, Codec

PESQ_MIN_S = 0.25  # shorter clips have no PESQ


def codec_figures(codec: Codec, wavs: list[np.ndarray]) -> dict[str, Any]:
    """wavs: mono float32 at 16 kHz. Returns "levels" (a row per number of levels: n_q, bits_per_s, pesq, pesq_clips,
    pesq_failed = {clip number: reason}, si_sdr_db, mel), "codebooks" (a row per level: level, used, perplexity),
    "mean_spectrum_mel", "clips" and "seconds". A mean over no clip is None. Raises ValueError without wavs.
    """
    if not wavs:
        raise ValueError("codec_figures got no clips: give held-out audio")
    codes = [codec.encode(_tensor(w)[None], torch.tensor([len(w)]))[0] for w in wavs]
    rows = []
    for n_q in range(1, codec.spec.n_q + 1):
        pesqs, failed, si_sdrs, mels = [], {}, [], []
        for i, (wav, codes_TQ) in enumerate(zip(wavs, codes, strict=True)):
            made = codec.decode(codes_TQ[None, :, :n_q])[0, :len(wav)].numpy()
            mels.append(mel_distance(wav, made))
            si_sdrs.append(si_sdr_db(wav, made))
            value = pesq_wb(wav, made)
            if isinstance(value, str):
                failed[str(i)] = value
            else:
                pesqs.append(value)
        rows.append({"n_q": n_q, "bits_per_s": n_q * codec.spec.rate_hz * math.log2(codec.spec.vocab),
                     "pesq": _mean(pesqs), "pesq_clips": len(pesqs), "pesq_failed": failed,
                     "si_sdr_db": _mean([x for x in si_sdrs if math.isfinite(x)]), "mel": _mean(mels)})
    return {"levels": rows, "codebooks": codebook_use(torch.cat(codes), codec.spec.vocab),
            "mean_spectrum_mel": _mean([mean_spectrum_distance(w) for w in wavs]),
            "clips": len(wavs), "seconds": sum(map(len, wavs)) / SAMPLE_RATE}


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _tensor(wav_T: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(wav_T, np.float32))


def _mel(wav_T: np.ndarray) -> torch.Tensor:
    return log_mel(torch.nn.functional.pad(_tensor(wav_T), (0, -len(wav_T) % HOP))[None])[0]


def mel_distance(wav_T: np.ndarray, made_T: np.ndarray) -> float:
    """Mean L1 distance of the log-mels of two signals of one length, in nats."""
    return float((_mel(wav_T) - _mel(made_T)).abs().mean())


def mean_spectrum_distance(wav_T: np.ndarray) -> float:
    """The mel distance of predicting, at every frame, the clip's mean log-mel."""
    mel_TF = _mel(wav_T)
    return float((mel_TF - mel_TF.mean(0)).abs().mean())


def si_sdr_db(wav_T: np.ndarray, made_T: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio in dB; -inf for silence against sound."""
    wav, made = wav_T.astype(np.float64), made_T.astype(np.float64)
    wav, made = wav - wav.mean(), made - made.mean()
    energy = wav @ wav
    if energy == 0:
        return -math.inf
    target = (made @ wav / energy) * wav
    signal, noise = target @ target, ((made - target) ** 2).sum()
    if signal == 0:
        return -math.inf
    return math.inf if noise == 0 else float(10 * math.log10(signal / noise))


def pesq_wb(wav_T: np.ndarray, made_T: np.ndarray) -> float | str:
    """Wide-band PESQ, or why there is none (too short, no speech found)."""
    import pesq

    if len(wav_T) < PESQ_MIN_S * SAMPLE_RATE:
        return f"shorter than {PESQ_MIN_S} s"
    try:
        value = float(pesq.pesq(SAMPLE_RATE, wav_T, made_T, "wb"))
    except (pesq.PesqError, ValueError, ZeroDivisionError) as e:
        return f"{type(e).__name__}: {e}"
    return value if math.isfinite(value) else "not finite"


def codebook_use(codes_TQ: torch.Tensor, vocab: int) -> list[dict[str, float]]:
    """Of each level: the share of its codes that occur, and exp(entropy) of their use."""
    rows = []
    for level in range(codes_TQ.shape[1]):
        p = torch.bincount(codes_TQ[:, level], minlength=vocab).double()
        p = p / p.sum()
        rows.append({"level": level + 1, "used": float((p > 0).double().mean()),
                     "perplexity": float(torch.special.entr(p).sum().exp())})
    return rows
