"""Tags around the sound: ID3v2, also several, before it; ID3v1, APEv2 and Lyrics3 behind it.

Formats: id3.org (ID3v2.4.0 structure, section 3.1), wiki.hydrogenaud.io (APEv2), id3.org (Lyrics3 v2.00).
"""

from __future__ import annotations

from audiolm.data.containers.raw import Raw


def sound_range(raw: Raw) -> tuple[int, int]:
    """[start, end) of a file without the tags before and behind it; empty where there is nothing else."""
    start, end = min(_front(raw), raw.size), raw.size
    while start < end and (shorter := _behind(raw, start, end)) < end:
        end = shorter
    return start, end


def after_tag(raw: Raw, at: int) -> int:
    """Where an ID3v2 tag at `at` ends, or `at`."""
    head = raw.read(at, 10)
    if head[:3] != b"ID3" or len(head) < 10 or max(head[6:]) > 0x7F:
        return at
    # The size has 7 bits a byte, so that no byte looks like a frame's start; flag 16 adds a footer.
    return at + 10 + sum(b << shift for b, shift in zip(head[6:], (21, 14, 7, 0), strict=True)) + 10 * bool(head[5] & 16)


def _front(raw: Raw) -> int:
    at = 0
    while (after := after_tag(raw, at)) > at:
        at = after
    # Writers pad behind the tag beyond the size that it gives.
    padding = raw.read(at, 4096) if at else b""
    return at + len(padding) - len(padding.lstrip(b"\0")) if padding.strip(b"\0") else at


def _behind(raw: Raw, start: int, end: int) -> int:
    """The end without the last tag, or `end`."""
    at = max(start, end - 160)
    tail = raw.read(at, end - at)
    if tail[-128:-125] == b"TAG":
        return end - 128
    if tail[-32:-24] == b"APETAGEX":  # the footer's size counts the items and itself, not the header (flag 31)
        n = int.from_bytes(tail[-20:-16], "little") + 32 * (tail[-9] >> 7)
        return end - n if 32 <= n <= end - start else end
    if tail[-9:] == b"LYRICS200" and tail[-15:-9].isdigit():
        return max(start, end - int(tail[-15:-9]) - 15)
    return end
