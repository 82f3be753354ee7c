"""Checks of audio files that commands take by name, and the identity of a file's bytes.

`check_audio` opens a file, which makes the checks of its container (data/containers).  The manifest's scan (data/scan.py)
opens it in the same way and decodes it besides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from fsspec.implementations.local import LocalFileSystem

from audiolm import store
from audiolm.data.containers.sound import open_sound

EDGE = 2**21  # bytes hashed at each end: all of a file of 4 MB, which is minutes of speech; a change of length moves the tail


def check_audio(path: str) -> tuple[str, float]:
    """(content hash, seconds by the header or a count, infinite where only decoding tells) of an audio file.

    Raises FileNotFoundError, and ValueError for a file that is empty, truncated or no audio."""
    fs, p = store.open_fs(path)
    size = int(fs.info(p)["size"])
    if not size:
        raise ValueError(f"{path} is empty: it holds no bytes")
    head, tail = edges(path, size)
    with audio_errors(path), open_sound(path) as f:
        seconds = float("inf") if f.frames is None else f.frames / f.rate
    return content_hash(head, tail, size), seconds


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
        raise ValueError(f"{path} is no audio that can be read, or is cut off ({text}); give wav, flac, ogg, opus, "
                         "mp3 or another audio file") from e


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
