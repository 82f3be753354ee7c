"""MPEG audio (MP1, MP2, MP3): frames counted by walking their headers, whatever a Xing, Info or VBRI header says.

libsndfile stops where that header ends, or at a guess from the first frames where there is none.  A stream with a header
that agrees with the count is read as it is.  Any other gets a Xing header of our own in front, with the count.  Files
joined end to end become one stream each, and tags or garbage between frames are left out.
Formats: ISO 11172-3, 2.4.2.3 and ISO 13818-3 (frames); gabriel.mp3-tech.org/mp3infotag (Xing, Info and VBRI).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from audiolm.data.containers.raw import MOST_LINKS, Raw, Segment, Unusable

PIECE = 1 << 18  # bytes read at once
SEEN = 1 << 16  # bytes in which a file without a known beginning must show two frames
SLACK = 2  # frames: encoders count their header, and the last frame, differently
KBPS = {  # index 1 to 14 by (version 1?, layer)
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)}


@dataclass(frozen=True)
class Head:
    """What a frame's first three bytes say."""

    version: int  # bits: 3 = MPEG 1, 2 = MPEG 2 (half the rates), 0 = MPEG 2.5 (a quarter)
    layer: int
    rate: int
    samples: int
    length: int  # bytes
    kind: int  # of version, layer and rate: equal in all frames of a stream


@dataclass
class Stream:
    """Frames of one kind, all mono or none of them, in runs [start, end) without gaps."""

    first: bytes  # four of its first frame
    head: Head
    runs: list[tuple[int, int]]
    frames: int = 0
    info: int | None = None  # where its Xing, Info or VBRI frame begins, which is not counted


@functools.cache
def heads() -> dict[bytes, Head]:
    """Every valid beginning of a frame, and what it says; without free bit rates, which nobody writes."""
    table = {}
    for b in range(0xE0, 0x100):
        version, layer = b >> 3 & 3, 4 - (b >> 1 & 3)
        if version == 1 or layer == 4:
            continue
        for c in range(256):
            if c >> 4 in (0, 15) or c >> 2 & 3 == 3:
                continue
            rate = (44_100, 48_000, 32_000)[c >> 2 & 3] >> {3: 0, 2: 1, 0: 2}[version]
            samples = 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1152
            slot = 4 if layer == 1 else 1  # bytes that padding adds, and of which layer I's frames are made
            kbps, pad = KBPS[version == 3, layer][(c >> 4) - 1], c >> 1 & 1
            length = (samples // 8 * 1000 * kbps // rate // slot + pad) * slot
            table[bytes((0xFF, b, c))] = Head(version, layer, rate, samples, length, (b & 0x1E) << 8 | c & 0x0C)
    return table


SYNC = re.compile(rb"\xff[\xe2-\xe7\xf2-\xf7\xfa-\xff][\x10-\xef]")
MARKS = (b"Xing", b"Info", b"VBRI")


def is_mpeg(raw: Raw, at: int, end: int) -> bool:
    """True where two frames of one kind follow each other near the beginning."""
    return next(_pairs(raw, at, end, at + SEEN), None) is not None


def links(raw: Raw, at: int, end: int) -> list[tuple[tuple[Segment, ...], int | None]]:
    """(segments for libsndfile, samples or None where libsndfile's count is right) of every stream in [at, end).

    Raises Unusable: truncated, unreadable."""
    found = streams(raw, at, end)
    most = max((s.frames for s in found), default=0)
    # A few bytes of a picture may look like two frames; nobody joins a tenth of a second.
    return [_link(raw, s) for s in found if s.frames >= min(5, most)]


def streams(raw: Raw, at: int, end: int) -> list[Stream]:
    """The streams of [at, end). Raises Unusable for more gaps than a file that is worth reading has."""
    infos, found, known, gaps = sorted(set(_info_frames(raw, at, end))), [], None, 0
    while (at := next(_pairs(raw, at, end), end)) < end:
        first = raw.read(at, 4)
        head = heads()[first[:3]]
        kind, info = (head.kind, first[3] >= 0xC0), at if at in infos else None  # the mode 3 is one channel
        after, frames = _run(raw, at, next((i for i in infos if i > at), end), *kind)
        if not frames:  # it would go into the next file
            at += 1
            continue
        if kind != known or info is not None:
            known, s = kind, Stream(first, head, [], info=info)
            found.append(s)
        s.runs.append((at, after))
        s.frames += frames - (info is not None)
        at, gaps = after, gaps + 1
        if gaps > MOST_LINKS:
            raise Unusable("unreadable", f"more than {MOST_LINKS} gaps between its MP3 frames; convert the file anew")
    return found


def _run(raw: Raw, at: int, end: int, kind: int, alone: bool) -> tuple[int, int]:
    """(end, number) of the whole frames of one kind from `at` on. An hour has 140,000, so the loop is short."""
    lengths, count = _lengths(kind), 0
    while True:
        data = raw.read(at, min(PIECE, end - at))
        i, last = 0, len(data) - 4
        while i <= last and (n := lengths.get(data[i:i + 3])) and (data[i + 3] >= 0xC0) == alone:
            i, count = i + n, count + 1
        at += i
        if at > end:
            return at - n, count - 1
        if i <= last or at + 4 > end:
            return at, count


@functools.cache
def _lengths(kind: int) -> dict[bytes, int]:
    return {first: head.length for first, head in heads().items() if head.kind == kind}


def _pairs(raw: Raw, at: int, end: int, until: int = 1 << 62) -> Iterator[int]:
    """Places below `until` at which a frame begins that another of its kind follows, or the end of the range."""
    while at < min(end, until):
        data = raw.read(at, min(PIECE, end - at, until - at))
        for m in SYNC.finditer(data):
            head = heads().get(m.group())
            if head and _continues(raw, at + m.start() + head.length, end, head):
                yield at + m.start()
        at += max(1, len(data) - 2)


def _continues(raw: Raw, at: int, end: int, head: Head) -> bool:
    after = heads().get(raw.read(at, 3)) if at + 3 <= end else None
    return at == end or (after is not None and after.kind == head.kind)


def _info_frames(raw: Raw, at: int, end: int) -> Iterator[int]:
    """Where frames begin that hold a Xing, Info or VBRI header instead of sound."""
    while at < end:
        data = raw.read(at, min(PIECE, end - at))
        for word, here in ((w, at + i) for w in MARKS for i in _places(data, w)):
            for back in (36,) if word == b"VBRI" else (13, 21, 36):
                first = raw.read(here - back, 4) if here >= back else b""
                head = heads().get(first[:3])
                if head and back == _mark_at(first, word) and _continues(raw, here - back + head.length, end, head):
                    yield here - back
        at += max(1, len(data) - 3)


def _places(data: bytes, word: bytes) -> Iterator[int]:
    at = data.find(word)
    while at >= 0:
        yield at
        at = data.find(word, at + 1)


def _mark_at(first: bytes, word: bytes = b"Xing") -> int:
    """Bytes from a frame's beginning to its Xing or VBRI header: behind the side information, or 32 bytes."""
    alone, version_1 = first[3] >= 0xC0, first[1] >> 3 & 3 == 3
    return 36 if word == b"VBRI" else 4 + {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}[
        version_1, alone]


def _link(raw: Raw, s: Stream) -> tuple[tuple[Segment, ...], int | None]:
    """As in `links`. Raises Unusable: truncated."""
    runs: tuple[Segment, ...] = tuple(s.runs)
    frames, size = _promised(raw, s)
    held = s.runs[-1][1] - s.runs[0][0]
    # A header that counts the bytes that are there, yet more frames, is wrong.
    if frames is not None and frames > s.frames + SLACK and not 0 < (size or 0) <= held + SLACK * s.head.length:
        raise Unusable("truncated", f"{s.frames} of {frames} MP3 frames")
    if frames is not None and abs(frames - s.frames) <= SLACK and len(runs) == 1:
        return runs, None  # libsndfile takes off the encoder's padding, which the header tells as well
    if s.head.layer != 3:
        return runs, s.frames * s.head.samples
    if s.info is not None:  # as the first of its stream
        runs = ((s.runs[0][0] + s.head.length, s.runs[0][1]), *runs[1:])
    # The largest bit rate leaves room for the header, in a frame without a checksum.
    first = bytes((0xFF, s.first[1] | 1, s.first[2] & 0x0C | 0xE0, s.first[3]))
    mark = first + bytes(_mark_at(first) - 4) + b"Xing" + (1).to_bytes(4, "big") + s.frames.to_bytes(4, "big")
    return (mark.ljust(heads()[first[:3]].length, b"\0"), *runs), s.frames * s.head.samples


def _promised(raw: Raw, s: Stream) -> tuple[int | None, int | None]:
    """(frames, bytes) that the stream's header counts, None where it does not."""
    if s.info is None:
        return None, None
    data = raw.read(s.info, 36 + 18)
    if data[36:40] == b"VBRI":
        return int.from_bytes(data[50:54], "big"), int.from_bytes(data[46:50], "big")
    data = data[_mark_at(s.first) + 4:]
    flags, fields = data[3], [int.from_bytes(data[i:i + 4], "big") for i in (4, 8)]
    return fields[0] if flags & 1 else None, fields[flags & 1] if flags & 2 else None
