"""Checks of an audio file's bytes: defects that libsndfile reads past without an error.

`check_audio` serves commands that take files by name.  The manifest's scan (data/scan.py) makes the same checks and
decodes each file besides.  Both read only a file's first and last 2 MB, except for MP3s without a frame count.
"""

from __future__ import annotations

import hashlib
import mmap
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from fsspec.implementations.local import LocalFileSystem

from audiolm import store
from audiolm.data.audio import open_sound

RATES_HZ = (2_000, 400_000)  # a rate outside is a broken header: telephones have 8 kHz, converters end at 384 kHz
EDGE = 2**21  # bytes hashed at each end: all of a file of 4 MB, which is minutes of speech; a change of length moves the tail
MP3_BITRATES_KBPS = {  # layer III, index 1 to 14: version 1, and versions 2 and 2.5 (ISO 11172-3 and 13818-3)
    1: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)}
# Of a frame: 11 sync bits, version 1, 2 or 2.5, layer III, and no reserved bit rate or sample rate.
MP3_HEADER = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb][%s]." % re.escape(bytes(
    b for b in range(256) if b >> 4 not in (0, 15) and b >> 2 & 3 != 3)), re.DOTALL)


class Unusable(Exception):
    """(reason, detail): why a file or a stretch of it cannot be used; reason is one of scan.REASONS."""


def check_audio(path: str) -> tuple[str, float]:
    """(content hash, seconds by the header) of an audio file.

    Raises FileNotFoundError, and ValueError for a file that is empty, truncated or no audio."""
    fs, p = store.open_fs(path)
    size = int(fs.info(p)["size"])
    if not size:
        raise ValueError(f"{path} is empty: it holds no bytes")
    head, tail = edges(path, size)
    try:
        check_container(head, tail, size)
        with audio_errors(path), open_sound(path) as f:
            rate, frames = f.samplerate, f.frames
        check_rate(rate)
        check_mp3_length(path, head, frames)
    except Unusable as e:
        reason, detail = e.args
        fix = "; get the file again" if reason == "truncated" else ""
        raise ValueError(f"{path}: {reason}: {detail}{fix}") from e
    return content_hash(head, tail, size), frames / rate


def error_line(path: str, e: Exception) -> str:
    """One line that names the file and its fault."""
    text = "no such file" if isinstance(e, FileNotFoundError) else " ".join(str(e).split()) or type(e).__name__
    return text if path in text else f"{path}: {text}"


@contextmanager
def audio_errors(path: str) -> Iterator[None]:
    """Turns libsndfile's errors into one ValueError that names the file and the fix."""
    import soundfile

    try:
        yield
    except soundfile.SoundFileError as e:
        text = getattr(e, "error_string", str(e)).strip(" .")
        raise ValueError(f"{path} is no audio that can be read, or is cut off ({text}); give wav, flac, ogg, opus or "
                         "mp3") from e


def edges(path: str, size: int) -> tuple[bytes, bytes]:
    """The first and the last 2 MB of a file of `size` bytes; they overlap in a small file."""
    if not size:
        return b"", b""  # unopened: a named pipe would wait for a writer
    fs, p = store.open_fs(path)
    if isinstance(fs, LocalFileSystem):
        with open(p, "rb") as f:
            head = f.read(EDGE)
            if size <= EDGE:
                return head, head
            f.seek(size - EDGE)
            return head, f.read(EDGE)
    # An object store answers each range with one request, so a small file is fetched once.
    head = fs.cat_file(p, start=0, end=min(size, EDGE))
    return head, head if size <= EDGE else fs.cat_file(p, start=size - EDGE, end=size)


def content_hash(head: bytes, tail: bytes, size: int) -> str:
    """A file's identity without reading more of it: a hash of its two edges and its size, all of it up to 4 MB."""
    digest = hashlib.blake2b(head, digest_size=12)
    digest.update(b"" if size <= EDGE else tail)
    digest.update(f"|{size}".encode())
    return digest.hexdigest()


def file_hash(path: str) -> str:
    """`content_hash` of a file as it is now. Raises FileNotFoundError."""
    size = store.size(path)
    return store.persist(path, lambda: content_hash(*edges(path, size), size))


def check_rate(rate: int) -> None:
    if not RATES_HZ[0] <= rate <= RATES_HZ[1]:
        raise Unusable("sample rate", f"{rate} Hz, expected {RATES_HZ[0]} to {RATES_HZ[1]}")


def check_container(head: bytes, tail: bytes, size: int) -> None:
    """Raises Unusable for a WAV shorter than its header counts or of rate 0, and for an Ogg stream without its end."""
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        at = 12
        while at + 8 <= len(head):  # chunks: a name of 4 bytes, a size of 4 bytes, then the content
            name, n = head[at:at + 4], int.from_bytes(head[at + 4:at + 8], "little")
            if name == b"fmt ":
                check_rate(int.from_bytes(head[at + 12:at + 16], "little"))
            if name == b"data":
                # Programs that write to a pipe never learn the length; they leave 0, or about 2**31 or 2**32.
                if 0 < n < 0x7FFFF000 and at + 8 + n > size:
                    raise Unusable("truncated", f"{size - at - 8} of {n} bytes of samples")
                break
            at += 8 + n + n % 2  # chunks start at even bytes
    if head[:4] == b"OggS" and (at := tail.rfind(b"OggS")) >= 0:
        # The last page must be complete and flagged as the end (RFC 3533, section 6: flag 4 of byte 5; byte 26
        # counts the lacing values that follow, whose sum is the size of the page's body).
        page = tail[at:]
        complete = len(page) >= 27 and len(page) >= 27 + page[26] + sum(page[27:27 + page[26]])
        if not (complete and page[5] & 4):
            raise Unusable("truncated", "the Ogg stream has no end page")


def counts_frames(head: bytes) -> bool:
    """True where the header counts the frames. An MP3 does so only in a Xing or Info tag; else its length is a guess."""
    is_mp3 = head[:3] == b"ID3" or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0)
    return not is_mp3 or b"Xing" in head or b"Info" in head


def check_mp3_length(path: str, head: bytes, frames: int) -> None:
    """Raises Unusable for an MP3 without a frame count that holds more than the `frames` that libsndfile reads.

    libsndfile guesses the length from the first frame's bit rate and stops there.  That is right at a constant rate."""
    if counts_frames(head):
        return
    with tempfile.TemporaryDirectory() as folder, open(store.local_copy(path, folder), "rb") as raw:
        with mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data:  # hours of audio need no memory
            held = mp3_samples(data)
    # Padding bytes and tags make the guess a little short at a constant rate too: 2 % and ten frames are allowed.
    if held > 1.02 * frames + 10 * 1152:
        raise Unusable("unreadable", "a variable-rate MP3 without the Xing header that counts its frames would be cut "
                       "short; rewrite it with: ffmpeg -i IN.mp3 -c copy OUT.mp3")


def mp3_samples(data: bytes | mmap.mmap) -> int:
    """Samples a channel that an MP3's bytes hold, counted by walking its frame headers (ISO 11172-3, 2.4.2.3)."""
    at, total = 0, 0
    if data[:3] == b"ID3":  # the tag's size has 7 bits a byte, so that no byte looks like a frame's start
        at = 10 + sum(b << shift for b, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
    while found := MP3_HEADER.search(data, at):  # skips a tag or garbage between frames
        at = found.start()
        h = int.from_bytes(data[at:at + 4], "big")
        version, kbps, hz, pad = h >> 19 & 3, h >> 12 & 15, h >> 10 & 3, h >> 9 & 1
        # Version bits: 3 = MPEG 1, 2 = MPEG 2 (half the rates, half the samples), 0 = MPEG 2.5 (a quarter the rates).
        rate = (44_100, 48_000, 32_000)[hz] >> {3: 0, 2: 1, 0: 2}[version]
        samples = 1152 if version == 3 else 576
        at += samples * MP3_BITRATES_KBPS[1 if version == 3 else 2][kbps - 1] * 125 // rate + pad
        total += samples
    return total
