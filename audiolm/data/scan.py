"""Looks into audio files: what of them can be used (stretches in frames at the file's own rate) and why not the rest.

Everything is decoded once, in parallel tasks: only so are lengths of lossy files true and silent, truncated and
non-finite ones found; FLAC decodes several hundred times faster than it plays.  What is longer than `max_s` is cut at
the quietest tenth of a second near equal parts.  `scan_group` is the task: it writes one JSON file, named by what it
looked at, so that a resumed step looks at no file twice.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple, dataclass

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from audiolm import store
from audiolm.config.corpus import CorpusConfig
from audiolm.data.audio import mono, open_sound
from audiolm.data.sources import Found

RATES_HZ = (2_000, 400_000)  # outside lies no audio but a broken header
EDGE = 65_536  # bytes of a file's head and tail that stand for its content
QUIET_S = 2.0  # how far a cut may move to a quiet place
REASONS = ("missing", "empty", "unreadable", "sample rate", "truncated", "non-finite", "silent", "too short",
           "out of range")


class Unusable(Exception):
    """(reason, detail): why a file or stretch cannot be used; reason is one of REASONS."""


@dataclass(frozen=True)
class Measured:
    """A decoded file: frames as decoded, peak of every `block` frames (NaN or inf where a sample is)."""

    rate: int
    frames: int
    block: int
    peaks: np.ndarray


def scan_group(found: list[Found], corpus: CorpusConfig, folder: str) -> str:
    """Looks at the files of some rows; writes and returns `{folder}/{key}.json`:
    {files: [[row, content hash]], units: [[row, rate, start, frames, piece, pieces]],
    rejected: [[row, start, frames, reason, detail]]}, rows counted within `found`."""
    limits = [corpus.min_s, corpus.max_s, corpus.silence_db]
    recipe = json.dumps([limits, [(f.uri, *astuple(f)[:5], f.start, f.duration) for f in found]])
    path = store.join(folder, hashlib.sha256(recipe.encode()).hexdigest()[:16] + ".json")
    if store.exists(path):
        return path
    files, units, rejected, seen = [], [], [], {}
    for row, f in enumerate(found):
        if f.path not in seen:  # rows of a user's Parquet may share a file
            seen = {f.path: _look(f)}
            files.append([row, seen[f.path][0]])
        try:
            looked = seen[f.path][1]
            if isinstance(looked, Unusable):
                raise looked
            start, frames = _stretch(f, looked)
            cuts = _cut(looked, start, frames, corpus)
        except Unusable as e:
            rejected.append([row, 0, 0, *e.args])
            continue
        for piece, (a, b) in enumerate(cuts):
            try:
                _check(looked, a, b, corpus)
                units.append([row, looked.rate, a, b - a, piece, len(cuts)])
            except Unusable as e:
                rejected.append([row, a, b - a, *e.args] if len(cuts) > 1 else [row, 0, 0, *e.args])
    store.put_json(path, {"files": files, "units": units, "rejected": rejected})
    return path


def edges(path: str, size: int) -> tuple[bytes, bytes]:
    """The first and the last 64 KB of a file."""
    fs, p = store.open_fs(path)
    if isinstance(fs, LocalFileSystem):
        with open(p, "rb") as f:
            head = f.read(EDGE)
            f.seek(max(0, size - EDGE))
            return head, f.read(EDGE)
    head = fs.cat_file(p, start=0, end=min(size, EDGE)) if size else b""
    return head, head if size <= EDGE else fs.cat_file(p, start=size - EDGE, end=size)


def content_hash(head: bytes, tail: bytes, size: int) -> str:
    return hashlib.blake2b(head + b"|" + tail + b"|" + str(size).encode(), digest_size=12).hexdigest()


def _look(f: Found) -> tuple[str, Measured | Unusable]:
    """(content hash, what was measured or why not). A network's failure is raised, for the task to be tried again."""
    digest = ""
    try:
        if f.size < 0:
            raise Unusable("missing", "no such file")
        try:
            head, tail = edges(f.path, f.size)
        except FileNotFoundError:
            raise Unusable("missing", "gone since it was listed") from None
        except PermissionError as e:
            raise Unusable("unreadable", f"denied: {e}") from None
        digest = content_hash(head, tail, f.size)
        if f.size == 0:
            raise Unusable("empty", "no bytes")
        check_container(head, tail, f.size)
        counted = counts_frames(head)
        looked = measure(f.path, trust_header=counted)
        if not counted and mp3_samples(store.get(f.path)) > 1.02 * looked.frames + 10 * 1152:
            raise Unusable("unreadable", "a variable-rate MP3 without the Xing header that tells its length would be "
                           "cut short; rewrite it with: ffmpeg -i IN.mp3 -c copy OUT.mp3")
        return digest, looked
    except Unusable as e:
        return digest, e


def measure(path: str, trust_header: bool = True) -> Measured:
    """Decodes a file once. Raises Unusable: unreadable, sample rate, empty, truncated."""
    import soundfile

    frames, promised, peaks = 0, 0, [np.zeros(0, np.float32)]
    try:
        with open_sound(path) as f:
            rate, promised = f.samplerate, f.frames if trust_header and f.frames < 1 << 60 else 0
            _check_rate(rate)
            block = rate // 10
            while len(wav_TC := f.read(600 * block, dtype="float32", always_2d=True)):
                wav_T = np.abs(mono(wav_TC))
                frames += len(wav_T)
                peaks.append(np.maximum.reduceat(wav_T, np.arange(0, len(wav_T), block)))
    except soundfile.SoundFileError as e:
        if promised:
            raise Unusable("truncated", f"decoding stops within {promised} frames: {e}") from None
        raise Unusable("unreadable", f"{e}".replace(path, "").strip()) from None
    if frames < promised - 2304:  # two MP3 frames: encoders count their padding differently
        raise Unusable("truncated", f"{frames} of {promised} frames decode")
    if frames == 0:
        raise Unusable("empty", "no frames")
    return Measured(rate, frames, block, np.concatenate(peaks))


def _check_rate(rate: int) -> None:
    if not RATES_HZ[0] <= rate <= RATES_HZ[1]:
        raise Unusable("sample rate", f"{rate} Hz, expected {RATES_HZ[0]} to {RATES_HZ[1]}")


def check_container(head: bytes, tail: bytes, size: int) -> None:
    """What libsndfile forgives: a WAV shorter than its header says or with rate 0, an Ogg stream without its end."""
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        at = 12
        while at + 8 <= len(head):
            name, n = head[at:at + 4], int.from_bytes(head[at + 4:at + 8], "little")
            if name == b"fmt ":
                _check_rate(int.from_bytes(head[at + 12:at + 16], "little"))
            if name == b"data":  # programs that write to a pipe leave 0 or about 2**31 or 2**32 there
                if 0 < n < 0x7FFFF000 and at + 8 + n > size:
                    raise Unusable("truncated", f"{size - at - 8} of {n} bytes of samples")
                break
            at += 8 + n + n % 2
    if head[:4] == b"OggS" and (at := tail.rfind(b"OggS")) >= 0:
        page = tail[at:]
        whole = len(page) >= 27 and len(page) >= 27 + page[26] + sum(page[27:27 + page[26]])
        if not (whole and page[5] & 4):
            raise Unusable("truncated", "the Ogg stream has no end page")


def counts_frames(head: bytes) -> bool:
    """Whether the header counts the frames; an MP3 does so only in a Xing or Info tag, else its length is a guess."""
    is_mp3 = head[:3] == b"ID3" or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0)
    return not is_mp3 or b"Xing" in head or b"Info" in head


def mp3_samples(data: bytes) -> int:
    """Frames that an MP3's bytes hold, by walking its headers (ISO 11172-3 2.4.2.3; versions 2 and 2.5 halve)."""
    at, total = 0, 0
    if data[:3] == b"ID3":
        at = 10 + sum(b << shift for b, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
    while 0 <= at <= len(data) - 4:
        h = int.from_bytes(data[at:at + 4], "big")
        version, layer, kbps, hz, pad = h >> 19 & 3, h >> 17 & 3, h >> 12 & 15, h >> 10 & 3, h >> 9 & 1
        if h >> 21 != 0x7FF or version == 1 or layer != 1 or kbps in (0, 15) or hz == 3:
            at = data.find(b"\xff", at + 1)  # a tag or garbage between frames
            continue
        kbps = ((32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320) if version == 3 else
                (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160))[kbps - 1]
        rate = (44_100, 48_000, 32_000)[hz] >> {3: 0, 2: 1, 0: 2}[version]
        samples = 1152 if version == 3 else 576
        at += samples * kbps * 125 // rate + pad
        total += samples
    return total


def _stretch(f: Found, m: Measured) -> tuple[int, int]:
    """(start, frames) that a row names, within its file."""
    start = round((f.start or 0.0) * m.rate)
    end = m.frames if f.duration is None else start + round(f.duration * m.rate)
    if start >= m.frames or end > m.frames + m.rate // 10:  # durations in tables are rounded: allow 0.1 s
        raise Unusable("out of range", f"{f.start or 0} s + {f.duration} s of {m.frames / m.rate:.2f} s")
    return start, min(end, m.frames) - start


def _cut(m: Measured, start: int, frames: int, corpus: CorpusConfig) -> list[tuple[int, int]]:
    """Stretches [a, b) of at most max_s that cover [start, start + frames)."""
    longest = int(corpus.max_s * m.rate)
    if frames <= longest:
        return [(start, start + frames)]
    n = -(-frames // int(0.95 * longest))  # room to move every cut to a quiet place
    even = frames / n
    room = int(max(0, min(QUIET_S * m.rate, (longest - even) / 2, (even - corpus.min_s * m.rate) / 2)))
    cuts = [start]
    for i in range(1, n):
        at = start + round(i * even)
        a, b = -(-(at - room) // m.block), (at + room) // m.block  # whole blocks inside the room
        cuts.append((a + int(np.argmin(m.peaks[a:b]))) * m.block + m.block // 2 if a < b else at)
    return list(zip(cuts, [*cuts[1:], start + frames], strict=True))


def _check(m: Measured, a: int, b: int, corpus: CorpusConfig) -> None:
    if b - a < corpus.min_s * m.rate:
        raise Unusable("too short", f"{(b - a) / m.rate:.3f} s, corpus.min_s is {corpus.min_s}")
    peaks = m.peaks[a // m.block:-(-b // m.block)]
    if not np.isfinite(peaks).all():
        raise Unusable("non-finite", "NaN or infinite samples")
    db = 20 * np.log10(max(float(peaks.max()), 1e-12))
    if db < corpus.silence_db:
        raise Unusable("silent", f"peak {db:.0f} dBFS, corpus.silence_db is {corpus.silence_db}")
