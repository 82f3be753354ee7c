"""Clips through codecs and their scores, one task a clip, one file a clip and codec.

A codec (`System`) is ours or imported at some numbers of levels, a shipped one at a bit rate, the original itself (the
ceiling) or noise (the floor).  A part is {folder}/{key}.json: the clip's "samples" and a row for each number of levels,
"levels", "bits", "values" by metric, "why" there is no value, "words" of the reference.  Its key is a hash of all that it
depends on, so that a command that was stopped goes on where it was, and no clip is scored twice.
A clip's scores depend on no other clip: however the tasks are shared out, the parts are the same.
wav_T: mono float32 at 16 kHz.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any, Literal

import numpy as np
import soundfile

from audiolm import rng, store
from audiolm.config.run import ClusterConfig
from audiolm.data.audio import start_of
from audiolm.data.audio_check import error_line, file_hash
from audiolm.data.parallel import parallel_map
from audiolm.eval.codec_quality import bits_per_s, decode, default_levels, encode
from audiolm.eval.codec_wer import NO_WORDS
from audiolm.eval.metrics.audio_quality import Scorers, finite, scorers
from audiolm.eval.metrics.pitch import f0_correlation, f0_hz
from audiolm.eval.models import asr, speaker
from audiolm.eval.models.baseline_codecs import Baseline, lyra_v2, opus
from audiolm.tokenizers.base import SAMPLE_RATE
from audiolm.tokenizers.codec_lookup import codec_folder, open_codec

VERSION = 1  # raised where a metric means another thing, so that no older part is read
METRICS = {"pesq": "PESQ", "visqol": "ViSQOL", "stoi": "STOI", "si_sdr_db": "SI-SDR dB", "mel": "mel distance",
           "f0": "F0 correlation", "wer": "WER %", "speaker": "speaker cosine"}
MOST_DB = 100.0  # of SI-SDR: what is equal to the last bit has no distortion
CODECS = 8  # loaded at a time in one process


@dataclass(frozen=True)
class TableClip:
    """`group` is what intervals resample; `key` changes with the sound; `read` returns wav_T and travels to the tasks."""

    name: str
    group: str
    key: str
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class System:
    """A column of sounds. `place`: of a codec's folder, or of Lyra's models; `key`: changes with the sound."""

    name: str
    kind: Literal["original", "noise", "shipped", "codec"]
    key: str
    place: str | None = None
    levels: tuple[int, ...] = ()
    family: str = ""

    @property
    def role(self) -> str:
        return {"original": "ceiling", "noise": "floor", "shipped": "baseline", "codec": "ours"}[self.kind]


@dataclass(frozen=True)
class Scoring:
    """What is measured (keys of METRICS), by which recogniser (None: Whisper tiny.en) and speaker model (None: Resemblyzer),
    on which device."""

    metrics: tuple[str, ...] = tuple(METRICS)
    asr: str | None = None
    device: str = "cpu"
    voice: str | None = None  # of a speaker model's folder
    visqol: str | None = None  # its version and mapper, set by `available`


def codec_system(place: str | None, levels: Sequence[int] | Literal["all"] | None = None, name: str | None = None) -> System:
    """A codec as `open_codec` takes it; levels None: 1, 2 kb/s, half, all. Raises ValueError for levels that it lacks."""
    codec, path = open_codec(place), codec_folder(place)
    n_q = codec.spec.n_q
    chosen = range(1, n_q + 1) if levels == "all" else default_levels(codec) if levels is None else sorted(set(levels))
    if unknown := [q for q in chosen if not 1 <= q <= n_q]:
        raise ValueError(f"levels {unknown} do not exist: {name or place or 'this codec'} has 1 to {n_q}")
    title = name or (place or path).rstrip("/").rsplit("/", 1)[-1].removesuffix(".json")
    return System(title, "codec", codec.hash, store.absolute(path), tuple(chosen), family=codec.spec.name)


def systems_beside(codecs: Sequence[System], lyra: str | None = None) -> tuple[list[System], dict[str, str]]:
    """(the original, noise, shipped codecs and these codecs, {shipped codec: why it is not measured})."""
    found, lyra = [System("original", "original", "1"), System("noise", "noise", "1")], lyra and store.absolute(lyra)
    shipped = [*opus(), *(lyra_v2(lyra) if lyra else ())]
    found += [System(_title(b), "shipped", _title(b), lyra if b.codec.startswith("Lyra") else None)
              for b in shipped if b.round_trip]
    return [*found, *codecs], {b.codec: b.absent for b in shipped if not b.round_trip}


def _title(b: Baseline) -> str:
    return f"{b.codec} {b.kbps:g} kb/s"


def file_clips(paths: Sequence[str], seconds: float, speaker_of: Literal["none", "parent", "grandparent"]) -> list[TableClip]:
    """The first `seconds` of each file; intervals are over files, or over the speakers that a folder's name tells."""
    paths = [store.absolute(path) for path in paths]
    at, clips = {"none": -1, "parent": -2, "grandparent": -3}[speaker_of], []
    for path, digest in zip(paths, store.at_once(_hash, paths), strict=True):
        group = path if speaker_of == "none" else path.split("/")[at:][0]
        clips.append(TableClip(path, group, f"{digest} {seconds:g} s", partial(start_of, path, round(seconds * SAMPLE_RATE))))
    return clips


def _hash(path: str) -> str:
    try:
        return file_hash(path)
    except OSError:
        return "unreadable"  # its task says why


def available(scoring: Scoring) -> tuple[Scoring, dict[str, str]]:
    """(the same with the metrics whose packages are here, {metric: why it is absent})."""
    have = scorers("visqol" in scoring.metrics)
    absent = {name: why for name, why in have.absent.items() if name in scoring.metrics}
    if "wer" in scoring.metrics and (why := asr.missing_dependency(scoring.asr)):
        absent["wer"] = why
    if "speaker" in scoring.metrics and (why := speaker.missing_dependency(scoring.voice)):
        absent["speaker"] = why
    left = tuple(name for name in METRICS if name in scoring.metrics and name not in absent)
    return replace(scoring, metrics=left, visqol=have.visqol), absent


def part_path(folder: str, clip: TableClip, system: System, scoring: Scoring) -> str:
    depends = [VERSION, clip.key, system.kind, system.key, system.levels, asdict(scoring)]
    return store.join(folder, f"{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:32]}.json")


def score_all(clips: Sequence[TableClip], systems: Sequence[System], scoring: Scoring, folder: str, out: Any,
              cluster: ClusterConfig) -> dict[str, str]:
    """Writes every part that `folder` lacks, a task for each clip; returns {clip: why it cannot be read}."""
    have = {store.join(folder, name) for name in store.names(folder)}
    work = []
    for clip in clips:
        missing = [(s, path) for s in systems if (path := part_path(folder, clip, s, scoring)) not in have]
        if missing:
            work.append((clip, missing, scoring))
    errors = parallel_map(score_clip, work, out=out, cluster=cluster, unit="clips", gpu=scoring.device == "cuda")
    return {clip.name: error for (clip, *_), error in zip(work, errors, strict=True) if error}


def score_clip(clip: TableClip, missing: Sequence[tuple[System, str]], scoring: Scoring) -> str | None:
    """One task: a part for each of (system, path), whole as it is finished; returns why the clip cannot be read."""
    try:
        original = _Original(clip.read(), scoring)
    except (OSError, ValueError, soundfile.SoundFileError) as e:
        return error_line(clip.name, e)
    for system, path in missing:
        rows = [{"levels": levels, "bits": bits, **original.score(made_T)}
                for levels, made_T, bits in versions(system, clip, original.wav_T, scoring.device)]
        store.put_json(path, {"clip": clip.name, "samples": len(original.wav_T), "rows": rows})
    return None


def versions(system: System, clip: TableClip, wav_T: np.ndarray,
             device: str) -> Iterator[tuple[int | None, np.ndarray, float | None]]:
    """(number of levels, made_T, bits) of a system's versions of a clip."""
    if system.kind == "original":
        yield None, wav_T, None
    elif system.kind == "noise":
        yield None, shaped_noise(wav_T, clip.key), None
    elif system.kind == "shipped":
        yield None, *_shipped(system.place)[system.name].round_trip(wav_T)
    else:
        codec = _codec(system.place, system.key, device)
        codes_TQ, = encode(codec, [wav_T])  # once: a prefix of the levels is what a smaller codec would give
        for q in system.levels:
            yield q, decode(codec, codes_TQ[:, :q], len(wav_T)), bits_per_s(codec, q) * len(wav_T) / SAMPLE_RATE


def shaped_noise(wav_T: np.ndarray, key: str) -> np.ndarray:
    """Steady noise with the clip's mean spectrum and loudness: its Fourier transform with random phases."""
    spectrum_F = np.fft.rfft(wav_T.astype(np.float64))
    turns_F = np.exp(2j * np.pi * rng.generator(0, "codec table", key).random(len(spectrum_F)))
    return np.fft.irfft(np.abs(spectrum_F) * turns_F, len(wav_T)).astype(np.float32)


# Loaded once a process, which then takes one clip after the other.
@lru_cache(CODECS)
def _codec(place: str, digest: str, device: str) -> Any:
    codec = open_codec(place, device)
    if codec.hash != digest:
        raise ValueError(f"{place} changed while it was measured: run the command again")
    return codec


@lru_cache(2)
def _shipped(lyra: str | None) -> Mapping[str, Baseline]:
    return {_title(b): b for b in (lyra_v2(lyra) if lyra else opus())}


@lru_cache(2)
def _quality(with_visqol: bool) -> Scorers:
    return scorers(with_visqol)


_recogniser, _embedder = lru_cache(2)(asr.recogniser), lru_cache(2)(speaker.embedder)


class _Original:
    """A clip and what its versions are compared with, computed where the first of them needs it."""

    def __init__(self, wav_T: np.ndarray, scoring: Scoring):
        self.wav_T, self._scoring = wav_T, scoring

    def score(self, made_T: np.ndarray) -> dict[str, Any]:
        """"values" {metric: number}, "why" {metric: why there is none}, and "words" of the reference where WER is measured."""
        names = self._scoring.metrics
        quality = _quality("visqol" in names).by_name
        found = {name: finite(quality[name](self.wav_T, made_T)) for name in names if name in quality and name != "si_sdr_db"}
        if "si_sdr_db" in names:  # without any distortion it is infinite
            found["si_sdr_db"] = finite(min(quality["si_sdr_db"](self.wav_T, made_T), MOST_DB))
        if "f0" in names:
            found["f0"] = f0_correlation(self._f0_N, f0_hz(made_T))
        if "speaker" in names:
            found["speaker"] = float(self._voice_D @ self._embed(made_T))
        if "wer" in names:
            found["wer"] = self._wer(made_T)
        return {"values": {k: v for k, v in found.items() if not isinstance(v, str)},
                "why": {k: v for k, v in found.items() if isinstance(v, str)},
                "words": len(self._said.split()) if "wer" in names else 0}

    def _wer(self, made_T: np.ndarray) -> float | str:
        """In percent, against what the recogniser hears in the original: a clip that is cut has no text of its own."""
        if not self._said:
            return NO_WORDS
        said = self._said if made_T is self.wav_T else self._transcript(made_T)
        errors, words, *_ = asr.errors(self._said, said)
        return 100 * errors / words

    def _transcript(self, wav_T: np.ndarray) -> str:
        return asr.normalise(_recogniser(self._scoring.asr, self._scoring.device)(wav_T))

    def _embed(self, wav_T: np.ndarray) -> np.ndarray:
        return _embedder(self._scoring.voice, self._scoring.device)(wav_T)

    @cached_property
    def _said(self) -> str:
        return self._transcript(self.wav_T)

    @cached_property
    def _voice_D(self) -> np.ndarray:
        return self._embed(self.wav_T)

    @cached_property
    def _f0_N(self) -> np.ndarray:
        return f0_hz(self.wav_T)
