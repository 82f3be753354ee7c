"""Length rules of containers made of chunks: RIFF, RIFX, RF64, BW64, WAVE 64, AIFF, CAF, MP4; and AU and NIST SPHERE headers.

Each rule finds where the sound begins and how many bytes its header promises, and seeks over all other chunks.
Programs that write to a pipe never learn the length: they leave 0, or a number near 2**31 or at the top of the field.
Such a length is unknown, and the sound then goes to the end of the file.
Formats: RIFF (IBM and Microsoft 1991), EBU Tech 3306 (RF64), Sony Wave64, AIFF-C (Apple 1991), CAF (Apple), ISO 14496-12.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from audiolm.data.containers.raw import MOST_LINKS, Raw, Segment, Unusable, check_rate

RIFFS = (b"RIFF", b"RIFX", b"RF64", b"BW64")
MOST_CHUNKS = 1_000_000  # a stream in fragments has two a second
LARGE = 32 << 10  # bytes of a chunk before the sound
# W64 names its chunks with four letters, then 12 bytes of their own.
W64_RIFF = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"


@dataclass(frozen=True)
class Form:
    """How a container writes its chunks: bytes of a name, bytes and order of a size, what the size counts, alignment."""

    name: int = 4
    size: int = 4
    order: str = "little"
    counts_head: bool = False
    align: int = 2
    size_first: bool = False


RIFF, BIG = Form(), Form(order="big")
W64 = Form(16, 8, counts_head=True, align=8)
CAF = Form(4, 8, "big", align=1)
MP4 = Form(4, 4, "big", counts_head=True, align=1, size_first=True)


@dataclass(frozen=True)
class Chunk:
    name: bytes
    start: int  # of the content
    size: int  # of the content, as promised


def walk(raw: Raw, at: int, end: int, form: Form) -> Iterator[Chunk]:
    """The chunks of [at, end). Raises Unusable for more than any program writes."""
    head = form.name + form.size
    for _ in range(MOST_CHUNKS):
        data = raw.read(at, head)
        if at + head > end or len(data) < head:
            return
        name, size = data[:form.name], data[form.name:]
        if form.size_first:
            size, name = data[:form.size], data[form.size:]
        start, n = at + head, int.from_bytes(size, form.order)
        if form is MP4 and n < 2:  # 1: a size of 8 bytes follows; 0: to the end
            n, start = (int.from_bytes(raw.read(start, 8), "big"), start + 8) if n else (end - at, start)
        yield Chunk(name, start, n := max(0, n - (start - at) * form.counts_head))
        at = start + n + -n % form.align
        if form.align == 2 and n % 2 and _is_name(raw.read(at - 1, 4)) and not _is_name(raw.read(at, 4)):
            at -= 1  # the writer forgot the padding byte
    raise Unusable("unreadable", f"more than {MOST_CHUNKS} chunks")


def _is_name(name: bytes) -> bool:
    return len(name) == 4 and all(32 <= b < 127 for b in name)


def is_unknown(n: int, bits: int = 32) -> bool:
    """True for what programs leave where they never learnt the length."""
    top = 1 << bits
    return n == 0 or 0x7EFF0000 <= n <= 0x80000000 or n >= top - 0x10000 or (bits == 64 and n >= top // 2 - 0x10000)


def check_held(promised: int, start: int, end: int, what: str = "bytes of samples") -> None:
    """Raises Unusable where a file ends before `promised` bytes from `start`."""
    if start + promised > end:
        raise Unusable("truncated", f"{max(0, end - start)} of {promised} {what}")


def riff(raw: Raw, at: int, end: int) -> list[tuple[Segment, ...]]:
    """WAVs of the sound alone, of several files end to end; none where libsndfile reads all of the file as it is.

    Raises Unusable: truncated, sample rate."""
    found, plain = [], True
    while len(found) < MOST_LINKS:
        window, simple, after = _wav(raw, at, end)
        found.append(window)
        plain &= simple and at == 0
        if raw.read(after, 4) not in RIFFS or raw.read(after + 8, 4) != b"WAVE":
            break
        at, plain = after, False
    return [] if plain else found


def _wav(raw: Raw, at: int, end: int) -> tuple[tuple[Segment, ...], bool, int]:
    """(a WAV of the sound of the one at `at`, whether that is as good, where it ends)."""
    form = raw.read(at, 4)
    order = "big" if form == b"RIFX" else "little"
    kept, long, simple, next_at = {}, None, form != b"BW64", at + 12
    for c in walk(raw, at + 12, end, BIG if order == "big" else RIFF):
        # Chunks without their padding byte, or of more text than libsndfile takes, are left out.
        simple &= c.start - 8 == next_at and (c.size < LARGE or c.name == b"data")
        next_at = c.start + c.size + c.size % 2
        if c.name == b"data":
            n, known = _length(raw, c, long, end, order)
            simple &= c.size > 0 and (known or (long is None and c.size >= n == end - c.start))
            head = b"".join(k + len(v).to_bytes(4, order) + v + bytes(len(v) % 2) for k, v in kept.items())
            return _wav_of(order, head, c.start, n), simple, c.start + n + n % 2
        if c.name == b"ds64" and form != b"RIFF":
            long = int.from_bytes(raw.read(c.start + 8, 8), "little")
        check_held(c.size, c.start, end, f"bytes of chunk {c.name.decode('ascii', 'replace')!r}")
        if c.name in (b"fmt ", b"fact") and c.size < LARGE:
            kept[c.name] = raw.read(c.start, c.size)
        if c.name == b"fmt ":
            check_rate(int.from_bytes(kept[c.name][4:8], order))
    return ((at, end),), True, end  # libsndfile says what is missing


def _length(raw: Raw, data: Chunk, long: int | None, end: int, order: str) -> tuple[int, bool]:
    """(bytes of samples, whether the file tells). Raises Unusable: truncated."""
    n, bits = (long, 64) if long is not None and data.size >= 0xFFFF0000 else (data.size, 32)
    # 32 bits cannot count what lies behind the header: the size went once around, or was never written.
    if is_unknown(n, bits) or (bits == 32 and end - data.start > 1 << 32):
        return _without_trailing_chunks(raw, data.start, end, order) - data.start, False
    check_held(n, data.start, end)
    return n, True


def _wav_of(order: str, head: bytes, start: int, n: int) -> tuple[Segment, ...]:
    """A WAV, or RF64 from 4 GB, of the samples [start, start + n) and other chunks' bytes."""
    form, ds64, size = (b"RIFX" if order == "big" else b"RIFF"), b"", n
    if n >= 0xFFFF0000:
        form, size = b"RF64", 0xFFFFFFFF
        ds64 = b"ds64" + (28).to_bytes(4, "little") + (n + 80).to_bytes(8, "little") + n.to_bytes(8, "little") + bytes(12)
    body = b"WAVE" + ds64 + head + b"data" + size.to_bytes(4, order)
    return form + min(0xFFFFFFFF, len(body) + n).to_bytes(4, order) + body, (start, start + n)


def _without_trailing_chunks(raw: Raw, start: int, end: int, order: str) -> int:
    """Where sound of unknown length ends: before a chunk, such as LIST, that ends exactly with the file."""
    first = max(start, end - 65536)
    tail = raw.read(first, end - first)
    for m in re.finditer(rb"LIST|id3 |ID3 |bext|iXML|cue |smpl|JUNK|PEAK|_PMX", tail):
        n = int.from_bytes(tail[m.end():m.end() + 4], order)
        if m.end() + 4 + n + n % 2 >= len(tail) >= m.end() + 4 + n:
            return first + m.start()
    return end


def w64(raw: Raw, at: int, end: int) -> tuple[Segment, ...]:
    """The file with its length written in, () where it stands there. Raises Unusable: truncated."""
    for c in walk(raw, at + 40, end, W64):
        if c.name[:4] == b"data":
            field = int.from_bytes(raw.read(c.start - 8, 8), "little")
            return _with_length(at, end, c.start - 8, field, 24, c.start, "little")
    return _shifted(at, end)


def caf(raw: Raw, at: int, end: int) -> tuple[Segment, ...]:
    """As `w64`. A length of -1 is unknown (CAF specification, "Audio Data chunk")."""
    for c in walk(raw, at + 8, end, CAF):
        if c.name == b"data":
            return _with_length(at, end, c.start - 8, c.size, 0, c.start, "big")
    return _shifted(at, end)


def _with_length(at: int, end: int, field_at: int, n: int, head: int, start: int, order: str) -> tuple[Segment, ...]:
    if not is_unknown(n, 64) and n != head:
        check_held(n - head, start, end)
        return _shifted(at, end)
    return (at, field_at), (end - start + head).to_bytes(8, order), (start, end)


def aiff(raw: Raw, at: int, end: int) -> tuple[Segment, ...]:
    """The file without large texts, () where it has none; an unknown length goes to the end. Raises Unusable: truncated."""
    kept: list[Segment] = [(at, at + 12)]
    large = False
    for c in walk(raw, at + 12, end, BIG):
        if c.name == b"SSND":
            if not is_unknown(c.size):
                check_held(c.size, c.start, end)
            return (*kept, (c.start - 8, end)) if large else _shifted(at, end)
        check_held(c.size, c.start, end, f"bytes of chunk {c.name.decode('ascii', 'replace')!r}")
        large |= c.size >= LARGE
        if c.size < LARGE:
            kept.append((c.start - 8, c.start + c.size + c.size % 2))
    return _shifted(at, end)


def au(raw: Raw, at: int, end: int) -> tuple[Segment, ...]:
    """The file with its length written in, () where it stands there. Raises Unusable: truncated."""
    order = "big" if raw.read(at, 4) == b".snd" else "little"
    head = raw.read(at + 4, 8)
    start, n = at + int.from_bytes(head[:4], order), int.from_bytes(head[4:], order)
    if not is_unknown(n):
        check_held(n, start, end)
        return _shifted(at, end)
    return (at, at + 8), min(max(0, end - start), 0xFFFFFFFF).to_bytes(4, order), (at + 12, end)


def nist(raw: Raw, at: int, end: int) -> tuple[Segment, ...]:
    """The file to its promised end, () where that is its own. Raises Unusable: truncated, unreadable."""
    head = raw.read(at, 1024)
    fields = dict(re.findall(rb"(\w+) -\w+ ([^\n]*)", head.split(b"end_head")[0]))
    if b"shorten" in fields.get(b"sample_coding", b""):
        raise Unusable("unreadable", "a NIST file packed with shorten; unpack it with: sph2pipe -f wav IN.sph OUT.wav")
    counts = [fields.get(k, b"").strip() for k in (b"sample_count", b"sample_n_bytes", b"channel_count")]
    size = head[8:16].strip()
    if not all(c.isdigit() for c in (*counts, size)):
        return _shifted(at, end)
    n = int(counts[0]) * int(counts[1]) * int(counts[2])
    if not n:
        return _shifted(at, end)
    check_held(n, at + int(size), end)
    return () if not at and at + int(size) + n == end else ((at, at + int(size) + n),)


def check_mp4(raw: Raw, at: int, end: int) -> None:
    """Raises Unusable for an MP4 whose last box goes beyond the file's end."""
    for c in walk(raw, at, end, MP4):
        check_held(c.size, c.start, end, f"bytes of box {c.name.decode('ascii', 'replace')!r}")


def check_matroska(raw: Raw, at: int, end: int) -> None:
    """Raises Unusable for a Matroska or WebM file whose segment goes beyond the file's end (RFC 8794, section 6)."""
    for _ in range(2):  # the EBML header, then the segment
        head = raw.read(at, 16)
        lengths = [9 - b.bit_length() for b in head[:1]]  # of the element's id, by its leading zeros
        if not lengths or lengths[0] > 4 or len(head) < 16:
            return
        first = head[lengths[0]]
        width = 9 - first.bit_length()
        n = int.from_bytes(head[lengths[0]:lengths[0] + width], "big") & (1 << 7 * width) - 1
        at += lengths[0] + width
        if n == (1 << 7 * width) - 1:  # unknown, as a browser writes it
            return
        check_held(n, at, end, "bytes of a WebM segment")
        at += n


def _shifted(at: int, end: int) -> tuple[Segment, ...]:
    return ((at, end),) if at else ()
