"""Ogg: pages walked from header to header (RFC 3533, section 6), so that a chain of files is known as one.

libsndfile reads the first link of a chain alone, and an internet radio's recording or `cat a.ogg b.ogg` has many.
"""

from __future__ import annotations

from audiolm.data.containers.raw import MOST_LINKS, Raw, Unusable

PIECE = 1 << 20


def links(raw: Raw, at: int, end: int) -> list[tuple[int, int]]:
    """[start, end) of every link. Raises Unusable for a last page that is cut, or not flagged as the end."""
    starts, begun, last = [at], False, (False, 0)
    while at < end:
        page = raw.read(at, 27 + 255)
        if page[:4] != b"OggS" or len(page) < 27:
            at = _next_page(raw, at + 1, end)
            continue
        # Byte 5: flag 2 begins a stream, flag 4 ends it. Byte 26 counts the lacing values whose sum is the body's size.
        begins, size = page[5] & 2, 27 + page[26] + sum(page[27:27 + page[26]])
        if begins and begun:  # streams side by side, as of sound and video, begin before the first page of any
            starts.append(at)
            if len(starts) > MOST_LINKS:
                raise Unusable("unreadable", f"a chain of more than {MOST_LINKS} Ogg streams")
        begun = not begins
        last = (bool(page[5] & 4) and at + size <= end, at + size)
        # Where no page follows this one is cut, and the next begins within it.
        at = at + size if at + size >= end or raw.read(at + size, 4) == b"OggS" else _next_page(raw, at + 27, end)
    if not last[0]:
        raise Unusable("truncated", "the Ogg stream has no end page")
    return list(zip(starts, [*starts[1:], min(end, last[1])], strict=True))


def is_flac(raw: Raw, at: int) -> bool:
    """True where the first packet is FLAC's (xiph.org/flac/ogg_mapping)."""
    page = raw.read(at, 512)
    return len(page) > 27 and page[27 + page[26]:][:5] == b"\x7fFLAC"


def _next_page(raw: Raw, at: int, end: int) -> int:
    while at < end:
        data = raw.read(at, min(PIECE, end - at))
        if (found := data.find(b"OggS")) >= 0:
            return at + found
        at += max(1, len(data) - 3)
    return end
