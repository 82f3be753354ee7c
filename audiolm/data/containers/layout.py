"""What libsndfile is given of a file: all of it, or windows without tags, joins and wrong counts; or FFmpeg's demuxer.

A file's first bytes decide, never its name.  This is the one check of containers: the manifest, prompts, codec.py and
readers of clips all open files through it.
"""

from __future__ import annotations

from dataclasses import dataclass

from audiolm.data.containers import chunks, flac, mpeg, ogg
from audiolm.data.containers.raw import Raw, Segment
from audiolm.data.containers.tags import after_tag, sound_range

# Names under which audio is looked for in a folder: libsndfile's formats, then FFmpeg's.
ENDINGS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2", ".aiff", ".aif", ".aifc", ".w64", ".rf64", ".bwf", ".au",
           ".snd", ".caf", ".sph", ".nist", ".m4a", ".m4b", ".mp4", ".aac", ".webm", ".weba", ".mka")


@dataclass(frozen=True)
class Layout:
    """`links`: streams end to end, each as (segments, samples a channel or None); none where the file is one as it is.

    `copied`: they are read in pieces of a few bytes, so from a file of their own.
    `media`: FFmpeg's demuxer for what libsndfile does not decode."""

    links: tuple[tuple[tuple[Segment, ...], int | None], ...] = ()
    copied: bool = False
    media: str = ""


def layout(raw: Raw) -> Layout:
    """Raises Unusable for a file that is shorter than its header promises, or damaged."""
    at, end = sound_range(raw)
    head = raw.read(at, 16)
    rules = {b"FORM": chunks.aiff, b"caff": chunks.caf, b".snd": chunks.au, b"dns.": chunks.au, b"NIST": chunks.nist,
             b"riff": chunks.w64}
    # Chunks tell their own length, so a tag behind them is one more of them.
    if head[:4] in chunks.RIFFS:
        return Layout(tuple((window, None) for window in chunks.riff(raw, at, raw.size)))
    if rule := rules.get(head[:4]):
        window = rule(raw, at, raw.size)
        return Layout(((window, None),) if window else ())
    if head[:4] == b"fLaC":
        window = flac.whole(raw, at, end)
        return Layout(((window, None),) if window else ())
    if head[4:8] == b"ftyp":
        chunks.check_mp4(raw, at, raw.size)
        return Layout(media="mov")
    if head[:4] == b"\x1a\x45\xdf\xa3":
        chunks.check_matroska(raw, at, raw.size)
        return Layout(media="matroska")
    if head[:4] == b"OggS":
        raw.keep()
        links = ogg.links(raw, at, end)
        if ogg.is_flac(raw, at):
            return Layout(media="ogg")
        return Layout() if links == [(0, raw.size)] else Layout(tuple((((a, b),), None) for a, b in links))
    if _is_adts(raw, at, end):
        return Layout(media="aac")
    raw.keep()
    if not mpeg.is_mpeg(raw, at, end):
        return Layout(((((0, raw.size),), None),))  # without its name, as libsndfile takes what is called mp3 for one
    links = mpeg.links(raw, at, end)
    # libsndfile skips one tag by itself, and reads a file natively several times as fast.
    as_it_is = len(links) == 1 and links[0][1] is None and links[0][0][0][0] == at == after_tag(raw, 0)
    return Layout() if as_it_is else Layout(tuple(links), copied=True)


def _is_adts(raw: Raw, at: int, end: int) -> bool:
    """True where two frames of AAC follow each other (ISO 14496-3, 1.A.2.2): sync, layer 0, a length of 13 bits."""
    for _ in range(2):
        head = raw.read(at, 7)
        if len(head) < 7 or head[0] != 0xFF or head[1] & 0xF6 != 0xF0 or at >= end:
            return False
        at += max(7, (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5)
    return True
