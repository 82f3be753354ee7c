"""FLAC: the header's count of samples is compared with the number that the last frame carries (RFC 9639, section 9.1).

A header written to a pipe counts 0; a file cut off counts more than it has, and one joined to another less.
"""

from __future__ import annotations

import functools
import re

from audiolm.data.containers.raw import Raw, Segment, Unusable

TAIL = 256 << 10  # bytes searched for the last frame
PIECE = 4 << 20
FRAME = re.compile(rb"\xff[\xf8\xf9]")
# Samples of a frame by code; 6 and 7 say that they are written out.
BLOCKS = {1: 192, **{n: 144 << n for n in range(2, 6)}, **{n: 1 << n for n in range(8, 16)}}


def whole(raw: Raw, at: int, end: int) -> tuple[Segment, ...]:
    """The file without tags and with its true count, () where it is so. Raises Unusable: truncated, unreadable."""
    info = raw.read(at + 8, 18)
    if len(info) < 18 or raw.read(at + 4, 1)[0] & 0x7F:  # STREAMINFO, of type 0, comes first (RFC 9639, section 8.2)
        return ((at, end),)
    _check_single(raw, at, end)
    promised = int.from_bytes(info[13:18], "big") & (1 << 36) - 1
    ends = _last_ends(raw, at, end, int.from_bytes(info[2:4], "big"))
    if promised in ends or not ends:
        return () if (at, end) == (0, raw.size) else ((at, end),)
    if promised > (held := ends[0]):
        raise Unusable("truncated", f"{held} of {promised} samples")
    # The count is the last 36 of these 40 bits.
    count = (info[13] & 0xF0) << 32 | held
    return (at, at + 21), count.to_bytes(5, "big"), (at + 26, end)


def _check_single(raw: Raw, at: int, end: int) -> None:
    """Raises Unusable for files end to end: decoders stop at the first one's count, or lose their way."""
    at += 4
    while raw.near and at < end:
        data = raw.read(at, min(PIECE, end - at))
        if b"fLaC\0\0\0\x22" in data or b"fLaC\x80\0\0\x22" in data:
            raise Unusable("unreadable", "several FLAC files end to end; join them as sound: sox A.flac B.flac OUT.flac")
        at += max(1, len(data) - 7)


def _last_ends(raw: Raw, at: int, end: int, block: int) -> list[int]:
    """The sample at which each of the last frames ends, the last first; a few bytes of sound may look like a frame."""
    first = max(at, end - TAIL)
    tail = raw.read(first, end - first)
    found = []
    for m in reversed(list(FRAME.finditer(tail))):
        if (sample := _end_of(tail[m.start():m.start() + 16].ljust(16), block)) is not None:
            found.append(sample)
            if len(found) == 4:
                break
    return found


def _end_of(data: bytes, block: int) -> int | None:
    """The sample behind the frame whose header `data` begins with; None for what is no header."""
    if data[2] >> 4 == 0 or data[2] & 15 == 15 or data[3] >> 4 > 10 or data[3] & 1:
        return None
    # The number is coded as in UTF-8, with up to 36 bits (RFC 9639, section 9.1.5).
    ones = 8 - (data[4] ^ 0xFF).bit_length()
    if ones == 1 or ones > 7:
        return None
    number, at = data[4] & (0x7F >> ones), 5
    for b in data[5:4 + max(1, ones)]:
        if b >> 6 != 2:
            return None
        number, at = number << 6 | b & 0x3F, at + 1
    code, rate = data[2] >> 4, data[2] & 15
    samples = BLOCKS.get(code, 0)
    if code in (6, 7):
        samples, at = int.from_bytes(data[at:at + code - 5], "big") + 1, at + code - 5
    at += {12: 1, 13: 2, 14: 2}.get(rate, 0)
    if functools.reduce(lambda crc, b: _crc8()[crc ^ b], data[:at], 0) != data[at]:
        return None
    return (number if data[1] & 1 else number * block) + samples


@functools.cache
def _crc8() -> tuple[int, ...]:
    """The table of the checksum x**8 + x**2 + x + 1."""
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc << 1 ^ (0x107 if crc & 0x80 else 0)
        table.append(crc & 0xFF)
    return tuple(table)
