"""Reads audio files of any rate and channel count as float32 mono; a clip of the manifest as 16 kHz samples.

wav, flac, ogg, opus and mp3 by libsndfile, local or any fsspec place.  A clip's parts are decoded whole at their own
rate, joined, and resampled once (soxr) to exactly ceil(frames * 16000 / rate) samples, so that a crop never depends
on where it is cut.  `stream` gives a long file the same by blocks.  Shapes: wav_T; several channels become their mean.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from audiolm import store

if TYPE_CHECKING:
    import soundfile

SAMPLE_RATE_HZ = 16_000  # paper III-B
LOSSLESS = ("WAV", "WAVEX", "RF64", "FLAC")  # libsndfile's names
PREROLL_S = 1.0
_BLOCK = 1 << 18  # frames decoded at once where only figures are wanted


def samples_at(frames: int, from_hz: int, to_hz: int = SAMPLE_RATE_HZ) -> int:
    """ceil(frames * to / from), the length of resampled audio."""
    return -(-frames * to_hz // from_hz)


def probe(path: str) -> tuple[int, int, int]:
    """(sample_rate in Hz, frames, channels); from the header for wav and flac, counted by decoding for the others,
    whose headers only estimate. Raises FileNotFoundError, soundfile.LibsndfileError."""
    with open_sound(path) as f:
        if f.format in LOSSLESS and 0 < f.frames < 1 << 60:
            return f.samplerate, f.frames, f.channels
        return f.samplerate, sum(len(b) for b in blocks(f)), f.channels


def decode(path: str, start: int = 0, frames: int | None = None) -> tuple[np.ndarray, int]:
    """(wav_T float32 mono at the file's own rate, rate in Hz), from frame `start`, `frames` of them or all.

    Raises FileNotFoundError, soundfile.LibsndfileError."""
    with open_sound(path) as f:
        return _read(f, start, frames), f.samplerate


def _read(f: soundfile.SoundFile, start: int, frames: int | None) -> np.ndarray:
    if start:  # a lossy decoder is right again only some frames after a jump (MP3 borrows bits from earlier ones)
        early = 0 if f.format in LOSSLESS else min(start, int(PREROLL_S * f.samplerate))
        f.seek(start - early)
        if early:
            f.read(early, dtype="float32")
    if frames is None:  # a header's length is not to be trusted, so read until nothing comes
        return np.concatenate([*blocks(f), np.zeros(0, np.float32)])
    return mono(f.read(frames, dtype="float32", always_2d=True))


def resample(wav_T: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """wav_T at another rate, exactly ceil(T * to / from) samples long (soxr, high quality)."""
    if from_hz == to_hz:
        return wav_T
    import soxr

    out_T = soxr.resample(wav_T, from_hz, to_hz, quality="HQ")
    n = samples_at(len(wav_T), from_hz, to_hz)
    return np.pad(out_T[:n], (0, max(0, n - len(out_T)))).astype(np.float32, copy=False)


def stream(path: str, to_hz: int = SAMPLE_RATE_HZ) -> Iterator[np.ndarray]:
    """A whole file as blocks wav_T float32 mono at `to_hz`, in constant memory; joined they are what `decode` and
    `resample` give.

    Raises FileNotFoundError, soundfile.LibsndfileError; ValueError for no frames at all, for fewer than a lossless file's
    header counts, and for NaN or infinite samples, with their time."""
    import soxr

    frames = made = 0
    with open_sound(path) as f:
        rate, counted = f.samplerate, f.frames if f.format in LOSSLESS and f.frames < 1 << 60 else 0
        resampler = soxr.ResampleStream(rate, to_hz, 1, quality="HQ") if rate != to_hz else None
        for wav_T in blocks(f):
            if not np.isfinite(wav_T).all():
                at_s = (frames + int(np.argmin(np.isfinite(wav_T)))) / rate
                raise ValueError(f"{path}: the sample at {at_s:.3f} s is NaN or infinite; clean the file")
            frames += len(wav_T)
            out_T = resampler.resample_chunk(wav_T) if resampler else wav_T
            made += len(out_T)
            yield out_T
    if frames < counted:
        raise ValueError(f"{path} is truncated: {frames} of {counted} frames decode; get the file again")
    if not frames:
        raise ValueError(f"{path} is empty: its header counts no samples; get the file again, or rewrite it if there are some")
    if resampler:
        rest_T, n = resampler.resample_chunk(np.zeros(0, np.float32), last=True), samples_at(frames, rate, to_hz) - made
        yield np.pad(rest_T[:n], (0, max(0, n - len(rest_T))))


def start_of(path: str, samples: int | None = None, to_hz: int = SAMPLE_RATE_HZ) -> np.ndarray:
    """A file's first `samples` at `to_hz`, or all; no more of it is decoded. Raises as `stream` does."""
    parts, have = [], 0
    for wav_T in stream(path, to_hz):
        parts.append(wav_T)
        have += len(wav_T)
        if samples is not None and have >= samples:
            break
    return np.concatenate(parts)[:samples]


def mono(wav_TC: np.ndarray) -> np.ndarray:
    return wav_TC[:, 0] if wav_TC.shape[1] == 1 else wav_TC.mean(axis=1, dtype=np.float32)


def blocks(f: soundfile.SoundFile) -> Iterator[np.ndarray]:
    """The rest of an open file as mono blocks, until nothing more comes."""
    while len(wav_TC := f.read(_BLOCK, dtype="float32", always_2d=True)):
        yield mono(wav_TC)


@contextmanager
def open_sound(path: str) -> Iterator[soundfile.SoundFile]:
    """An open soundfile.SoundFile, local or remote. A failing network raises its own error, never a format error."""
    import soundfile

    fs, p = store.open_fs(path)
    if isinstance(fs, LocalFileSystem):
        if not os.path.isfile(p):
            raise FileNotFoundError(f"no audio file {path}")
        with soundfile.SoundFile(p) as f:
            yield _onward(f)
        return
    with fs.open(p, "rb", block_size=4 << 20, cache_type="readahead") as raw:
        watched = _Watched(raw)
        try:
            with soundfile.SoundFile(watched) as f:
                yield _onward(f)
        except Exception:
            if watched.error:
                raise watched.error from None
            raise
        if watched.error:
            raise watched.error


def _onward(f: soundfile.SoundFile) -> soundfile.SoundFile:
    """Makes reads simply go on. soundfile seeks to where it is after every read of a file that can seek, which leaves
    a gap in MP3 and a scar in Opus, and believes the header's length, which MP3 only estimates."""
    f.seekable = lambda: False
    return f


class _Watched:
    """A file that remembers what it raised: libsndfile's callbacks cannot, and would call it the end of the file."""

    def __init__(self, raw):
        self.raw, self.error = raw, None

    def read(self, n: int = -1) -> bytes:
        try:
            return self.raw.read(n)
        except Exception as e:
            self.error = e
            return b""

    def seek(self, to: int, whence: int = 0) -> int:
        return self.raw.seek(to, whence)

    def tell(self) -> int:
        return self.raw.tell()


def wav_bytes(wav_T: np.ndarray, sample_rate: int = 16_000) -> bytes:
    """A 16-bit PCM wav file; what lies beyond full scale is clipped, never wrapped."""
    import soundfile

    sink = io.BytesIO()
    soundfile.write(sink, np.clip(wav_T, -1.0, 1.0), sample_rate, format="WAV", subtype="PCM_16")
    return sink.getvalue()
