"""Quality metrics of one reconstructed clip, for training and evaluation alike.

PESQ (wide band, 1 to 4.64), ViSQOL (speech mode, 1 to 5), STOI (to 1), SI-SDR (dB), mel distance (mean L1 of log-mels).
A metric gives a number, or a text that says why there is none (too short, no speech found).
wav_T (the original) and made_T: mono float at 16 kHz, of one length.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from audiolm.models.mel import clip_mel
from audiolm.tokenizers.base import SAMPLE_RATE

PESQ_MIN_S = 0.25  # shorter clips have none


def si_sdr_db(wav_T: np.ndarray, made_T: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio in dB; -inf for silence against sound."""
    wav, made = wav_T.astype(np.float64), made_T.astype(np.float64)
    wav, made = wav - wav.mean(), made - made.mean()
    energy = wav @ wav
    if energy == 0:
        return -math.inf
    target = (made @ wav / energy) * wav  # the projection of `made` on the original: scale does not count
    signal, noise = target @ target, ((made - target) ** 2).sum()
    if signal == 0:
        return -math.inf
    return math.inf if noise == 0 else float(10 * math.log10(signal / noise))


def pesq_wb(wav_T: np.ndarray, made_T: np.ndarray) -> float | str:
    """Wide-band PESQ (ITU-T P.862.2)."""
    import pesq

    if len(wav_T) < PESQ_MIN_S * SAMPLE_RATE:
        return f"shorter than {PESQ_MIN_S} s"
    try:
        return float(pesq.pesq(SAMPLE_RATE, wav_T, made_T, "wb"))
    except (pesq.PesqError, ValueError, ZeroDivisionError) as e:
        return f"{type(e).__name__}: {e}"


METRICS = ("pesq", "visqol", "stoi", "si_sdr_db", "mel")
VISQOL_MIN_S, STOI_MIN_S = 1.0, 0.5  # shorter clips have none
INSTALL = "is not installed (pip install 'audiolm[eval]')"

Score = Callable[[np.ndarray, np.ndarray], float | str]  # (wav_T, made_T) -> value, or why there is none


@dataclass(frozen=True)
class Scorers:
    """Installed metrics, the reason for each absent one, and ViSQOL's version and mapper."""

    by_name: Mapping[str, Score]
    absent: Mapping[str, str]
    visqol: str | None


def scorers(with_visqol: bool = True) -> Scorers:
    """Every metric whose library is installed; ViSQOL, which is slow, only on demand.

    ViSQOL's lattice mapper, its reference's default, needs ai-edge-litert.  Without it the exponential mapper is used,
    whose scores are 1 to 2 higher and cannot be compared with the lattice's.
    """
    by_name: dict[str, Score] = {"si_sdr_db": si_sdr_db, "mel": mel_distance}
    absent, visqol = {}, None
    for name, package, score in (("pesq", "pesq", pesq_wb), ("stoi", "pystoi", stoi)):
        if importlib.util.find_spec(package):
            by_name[name] = score
        else:
            absent[name] = f"{package} {INSTALL}"
    try:
        if with_visqol:
            by_name["visqol"], visqol = _visqol()
        else:
            absent["visqol"] = "switched off (evaluate.visqol)"
    except ImportError:
        absent["visqol"] = f"visqol-python {INSTALL}"
    return Scorers(by_name, absent, visqol)


def measure(wavs: Sequence[np.ndarray], mades: Iterable[np.ndarray], by_name: Mapping[str, Score]) -> dict[str, Any]:
    """Mean of each metric over the clips (None where no clip has a value), with the clips that have one.

    "scored": {metric: clips with a value}; "failed": {metric: {clip number: reason}}.
    """
    values: dict[str, list[float]] = {name: [] for name in by_name}
    failed: dict[str, dict[str, str]] = {}
    # A generator of `mades` decodes one clip at a time, so that a set of clips need not fit memory twice.
    for i, (wav, made) in enumerate(zip(wavs, mades, strict=True)):
        for name, score in by_name.items():
            value = finite(score(wav, made))
            if isinstance(value, str):
                failed.setdefault(name, {})[str(i)] = value
            else:
                values[name].append(value)
    means = {name: mean_or_none(values.get(name, [])) for name in METRICS}
    return {**means, "scored": {name: len(v) for name, v in values.items()}, "failed": failed}


def finite(value: float | str) -> float | str:
    """A score as it is; a text for one that is no number."""
    return value if isinstance(value, str) or math.isfinite(value) else "not finite"


def mean_or_none(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def mel_distance(wav_T: np.ndarray, made_T: np.ndarray) -> float:
    """Mean L1 distance of the log-mels of two signals of one length, in nats."""
    return float((clip_mel(wav_T) - clip_mel(made_T)).abs().mean())


def mean_spectrum_distance(wav_T: np.ndarray) -> float:
    """Mel distance of the clip's mean log-mel, predicted at every frame: a floor that any useful codec must beat."""
    mel_TF = clip_mel(wav_T)
    return float((mel_TF - mel_TF.mean(0)).abs().mean())


def stoi(wav_T: np.ndarray, made_T: np.ndarray) -> float | str:
    """Short-time objective intelligibility."""
    import pystoi

    if len(wav_T) < STOI_MIN_S * SAMPLE_RATE:
        return f"shorter than {STOI_MIN_S} s"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it warns and returns 1e-5 where it finds too little speech
        value = float(pystoi.stoi(wav_T, made_T, SAMPLE_RATE))
    return value if wav_T.any() and value != 1e-5 else "too little speech"


def _visqol() -> tuple[Score, str]:
    """ViSQOL in speech mode and its name. Raises ImportError."""
    from importlib.metadata import version

    from visqol import VisqolApi

    api = VisqolApi()
    try:
        api.create(mode="speech", use_lattice_model=True)
        mapper = "lattice"
    except ImportError:
        api.create(mode="speech", use_lattice_model=False)
        mapper = "exponential"

    def score(wav_T: np.ndarray, made_T: np.ndarray) -> float | str:
        if len(wav_T) < VISQOL_MIN_S * SAMPLE_RATE:
            return f"shorter than {VISQOL_MIN_S:g} s"
        if not wav_T.any():
            return "silent"
        try:
            return float(api.measure_from_arrays(wav_T.astype(np.float64), made_T.astype(np.float64), SAMPLE_RATE).moslqo)
        except (IndexError, ValueError, ZeroDivisionError) as e:  # no patch with any sound
            return f"{type(e).__name__}: {e}"

    return score, f"visqol-python {version('visqol-python')}, speech mode, {mapper} mapper"
