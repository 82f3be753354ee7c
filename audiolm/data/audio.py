"""Audio files as float32 mono samples, at their own rate or resampled to 16 kHz.

libsndfile reads wav, flac, ogg, opus and mp3 from local disks and from any fsspec place.  soxr resamples a whole clip
at once to exactly ceil(frames * to / from) samples, so a crop never depends on where it is cut.  `stream` yields the
same samples block by block in constant memory.  Shapes: wav_T mono, wav_TC all channels; channels are averaged.
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

SAMPLE_RATE_HZ = 16_000  # AudioLM (2209.03143), section III-B
LOSSLESS = ("WAV", "WAVEX", "RF64", "FLAC")  # libsndfile's names; these seek to the exact frame
UNKNOWN_FRAMES = 1 << 60  # libsndfile reports 2**63 - 1 frames for a length that it does not know
# Decoded and dropped before a piece of lossy audio: MP3 frames reuse up to 511 bytes of earlier ones (ISO 11172-3,
# main_data_begin), and Opus decoders need 80 ms to converge (RFC 7845, section 4.6).
PREROLL_S = 1.0
_BLOCK = 1 << 18  # frames decoded at once: 1 MB of float32 a channel
BLOCK_SAMPLES = 1 << 22  # of all channels in a block, at most: 16 MB, as a file may have a thousand channels


def samples_at(frames: int, from_hz: int, to_hz: int = SAMPLE_RATE_HZ) -> int:
    """ceil(frames * to / from), the length of resampled audio; takes arrays too."""
    return -(-frames * to_hz // from_hz)


def decode(path: str, start: int = 0, frames: int | None = None) -> tuple[np.ndarray, int]:
    """(wav_T float32 mono at the file's own rate, rate in Hz): `frames` frames, or all, from frame `start`.

    Raises FileNotFoundError, soundfile.LibsndfileError."""
    with open_sound(path) as f:
        return read_frames(f, start, frames), f.samplerate


def read_frames(f: soundfile.SoundFile, start: int, frames: int | None) -> np.ndarray:
    """wav_T float32 mono of an open file: `frames` frames, or all that remain, from frame `start`."""
    if start:
        early = 0 if f.format in LOSSLESS else min(start, int(PREROLL_S * f.samplerate))
        f.seek(start - early)
        for _ in blocks(f, early):
            pass
    return np.concatenate([*blocks(f, frames), np.zeros(0, np.float32)])


def resample(wav_T: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """wav_T at another rate, exactly ceil(T * to / from) samples long (soxr, high quality)."""
    if from_hz == to_hz:
        return wav_T
    import soxr

    out_T = soxr.resample(wav_T, from_hz, to_hz, quality="HQ")
    return _fit(out_T, samples_at(len(wav_T), from_hz, to_hz)).astype(np.float32, copy=False)


def _fit(wav_T: np.ndarray, n: int) -> np.ndarray:
    """wav_T cut or zero-padded to n samples: soxr may end a sample early or late."""
    return np.pad(wav_T[:n], (0, max(0, n - len(wav_T))))


def stream(path: str, to_hz: int = SAMPLE_RATE_HZ) -> Iterator[np.ndarray]:
    """A whole file as blocks wav_T float32 mono at `to_hz`; joined they equal `decode` and `resample`.

    Raises FileNotFoundError, soundfile.LibsndfileError.  Raises ValueError for NaN or infinite samples, with their
    time, and for an empty file.  Raises it too for a lossless file that ends before its header's count."""
    import soxr

    frames = produced = 0
    with open_sound(path) as f:
        # Only lossless headers are trusted to count frames; MP3 and Ogg estimate.
        rate, promised = f.samplerate, f.frames if f.format in LOSSLESS and f.frames < UNKNOWN_FRAMES else 0
        resampler = soxr.ResampleStream(rate, to_hz, 1, quality="HQ") if rate != to_hz else None
        for wav_T in blocks(f):
            if not np.isfinite(wav_T).all():
                at_s = (frames + int(np.argmin(np.isfinite(wav_T)))) / rate
                raise ValueError(f"{path}: the sample at {at_s:.3f} s is NaN or infinite; clean the file")
            frames += len(wav_T)
            out_T = resampler.resample_chunk(wav_T) if resampler else wav_T
            produced += len(out_T)
            yield out_T
    if frames < promised:
        raise ValueError(f"{path} is truncated: {frames} of {promised} frames decode; get the file again")
    if not frames:
        raise ValueError(f"{path} is empty: its header counts no samples; get the file again, or rewrite its header")
    if resampler:  # the resampler's delay line still holds the last samples
        rest_T = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        yield _fit(rest_T, samples_at(frames, rate, to_hz) - produced)


def start_of(path: str, samples: int | None = None, to_hz: int = SAMPLE_RATE_HZ) -> np.ndarray:
    """wav_T of a file's first `samples` samples at `to_hz`, or all; decodes no further. Raises as `stream` does."""
    parts, have = [], 0
    for wav_T in stream(path, to_hz):
        parts.append(wav_T)
        have += len(wav_T)
        if samples is not None and have >= samples:
            break
    return np.concatenate(parts)[:samples]


def mono(wav_TC: np.ndarray) -> np.ndarray:
    """wav_T, the mean of the channels."""
    return wav_TC[:, 0] if wav_TC.shape[1] == 1 else wav_TC.mean(axis=1, dtype=np.float32)


def blocks(f: soundfile.SoundFile, frames: int | None = None) -> Iterator[np.ndarray]:
    """The next `frames` frames of an open file, or the rest, as mono blocks, until no more frames decode."""
    # the rest is read to the end of the data: the header's length may be a guess
    most, left = max(1, min(_BLOCK, BLOCK_SAMPLES // f.channels)), UNKNOWN_FRAMES if frames is None else frames
    while len(wav_TC := f.read(min(most, left), dtype="float32", always_2d=True)):
        left -= len(wav_TC)
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
            yield _without_seeks(f)
        return
    with fs.open(p, "rb", block_size=4 << 20, cache_type="readahead") as raw:
        remote = _RemoteFile(raw)
        try:
            with soundfile.SoundFile(remote) as f:
                yield _without_seeks(f)
        finally:
            if remote.error:
                raise remote.error from None


def _without_seeks(f: soundfile.SoundFile) -> soundfile.SoundFile:
    """The same file, read straight on.

    After each read of a seekable file soundfile seeks to the current position.  That leaves a gap in MP3 and a click
    in Opus, and it trusts the header's length, which MP3 only estimates."""
    f.seekable = lambda: False
    return f


class _RemoteFile:
    """A file that keeps the error of its last read: libsndfile's callbacks cannot raise and would report the end."""

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


def wav_bytes(wav_T: np.ndarray, sample_rate: int = SAMPLE_RATE_HZ) -> bytes:
    """A 16-bit PCM wav file; samples beyond full scale are clipped, not wrapped."""
    import soundfile

    sink = io.BytesIO()
    soundfile.write(sink, np.clip(wav_T, -1.0, 1.0), sample_rate, format="WAV", subtype="PCM_16")
    return sink.getvalue()
