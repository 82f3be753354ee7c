"""Audio files as float32 mono samples, at their own rate or resampled to 16 kHz.

Files are opened by data/containers, from local disks and from any fsspec place.  soxr resamples a whole clip at once to
exactly ceil(frames * to / from) samples, so a crop never depends on where it is cut.  `stream` yields the same samples
block by block in constant memory.  Shapes: wav_T mono, wav_TC all channels; how they become one, data/channels.py says.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import numpy as np

from audiolm.data.channels import cancelled, check_level, mix, powers
from audiolm.data.containers.sound import UNKNOWN_FRAMES, Sound, open_sound

SAMPLE_RATE_HZ = 16_000  # AudioLM (2209.03143), section III-B
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

    Raises FileNotFoundError, Unusable, soundfile.LibsndfileError."""
    with open_sound(path) as f:
        return read_frames(f, start, frames, _strongest(path, start, frames) if f.channels > 1 else None), f.rate


def read_frames(f: Sound, start: int, frames: int | None, channel: int | None = None) -> np.ndarray:
    """wav_T float32 mono of an open file: `frames` frames, or all that remain, from frame `start`."""
    _go_to(f, start)
    return np.concatenate([*(mix(wav_TC, channel) for wav_TC in blocks(f, frames)), np.zeros(0, np.float32)])


def _go_to(f: Sound, start: int) -> None:
    if start:
        early = 0 if f.exact else min(start, int(PREROLL_S * f.rate))
        f.seek(start - early)
        for _ in blocks(f, early):
            pass


def _strongest(path: str, start: int, frames: int | None) -> int | None:
    """The channel to take of a stretch whose channels cancel each other, else None; decodes it, and says so in the log."""
    with open_sound(path) as f:
        _go_to(f, start)
        total = np.zeros(1 + f.channels)
        for wav_TC in blocks(f, frames):
            total += powers(wav_TC)
    if (channel := cancelled(total[0], total[1:])) is not None:
        logging.getLogger(__name__).warning("%s: its channels cancel each other; channel %d, the strongest, is taken",
                                            path, channel + 1)
    return channel


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


def stream(path: str, to_hz: int = SAMPLE_RATE_HZ, until_s: float | None = None) -> Iterator[np.ndarray]:
    """A whole file as blocks wav_T float32 mono at `to_hz`; joined they equal `decode` and `resample`.

    `until_s`: no more is asked for, so only that decides between the mean of the channels and one of them.
    Raises FileNotFoundError, soundfile.LibsndfileError.  Raises ValueError for NaN or infinite samples, with their
    time, for samples far beyond full scale, and for a file that is empty or ends before its header's count."""
    import soxr

    frames = produced = 0
    with open_sound(path) as f:
        rate, until = f.rate, None if until_s is None else int(until_s * f.rate) + 1
        channel = _strongest(path, 0, until) if f.channels > 1 else None
        resampler = soxr.ResampleStream(rate, to_hz, 1, quality="HQ") if rate != to_hz else None
        for wav_TC in blocks(f):
            wav_T = mix(wav_TC, channel)
            if not np.isfinite(wav_T).all():
                at_s = (frames + int(np.argmin(np.isfinite(wav_T)))) / rate
                raise ValueError(f"{path}: the sample at {at_s:.3f} s is NaN or infinite; clean the file")
            frames += len(wav_T)
            out_T = resampler.resample_chunk(wav_T) if resampler else wav_T
            produced += len(out_T)
            yield out_T
    if not frames:
        raise ValueError(f"{path} is empty: its header counts no samples; get the file again, or rewrite its header")
    if resampler:  # the resampler's delay line still holds the last samples
        rest_T = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        yield _fit(rest_T, samples_at(frames, rate, to_hz) - produced)


def start_of(path: str, samples: int | None = None, to_hz: int = SAMPLE_RATE_HZ) -> np.ndarray:
    """wav_T of a file's first `samples` samples at `to_hz`, or all; decodes no further. Raises as `stream` does."""
    parts, have = [], 0
    for wav_T in stream(path, to_hz, None if samples is None else samples / to_hz):
        parts.append(wav_T)
        have += len(wav_T)
        if samples is not None and have >= samples:
            break
    return np.concatenate(parts)[:samples]


def blocks(f: Sound, frames: int | None = None) -> Iterator[np.ndarray]:
    """wav_TC: the next `frames` frames of an open file, or the rest, until no more frames decode.

    Raises Unusable for samples far beyond full scale."""
    # the rest is read to the end of the data: the header's length may be a guess
    most, left = max(1, min(_BLOCK, BLOCK_SAMPLES // f.channels)), UNKNOWN_FRAMES if frames is None else frames
    while len(wav_TC := f.read(min(most, left))):
        left -= len(wav_TC)
        check_level(max(float(wav_TC.max()), -float(wav_TC.min())))
        yield wav_TC


def wav_bytes(wav_T: np.ndarray, sample_rate: int = SAMPLE_RATE_HZ) -> bytes:
    """A 16-bit PCM wav file; samples beyond full scale are clipped, not wrapped."""
    import soundfile

    sink = io.BytesIO()
    soundfile.write(sink, np.clip(wav_T, -1.0, 1.0), sample_rate, format="WAV", subtype="PCM_16")
    return sink.getvalue()
