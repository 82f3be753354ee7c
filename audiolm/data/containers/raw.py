"""The bytes of an audio file, local or remote, and windows of them that decoders read as files.

Nothing here reads more than it is asked for, so the length rules of containers cost a few small reads.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fsspec.implementations.local import LocalFileSystem

from audiolm import store

BLOCK = 4 << 20  # bytes of a remote file fetched at once
EDGE = 256 << 10  # bytes of each end of a remote file that are kept
WHOLE = 32 << 20  # a remote file up to this size is fetched once and kept, where all of it is needed
MOST_LINKS = 1000  # streams, chunks before the sound or runs of frames in one file: more is damage, or an attack
RATES_HZ = (2_000, 400_000)  # a rate outside is a broken header: telephones have 8 kHz, converters end at 384 kHz

Segment = bytes | tuple[int, int]  # bytes that stand for those of the file, or a range [start, end) of it


class Unusable(ValueError):
    """(reason, detail): why a file or a stretch of it cannot be used; reason is one of scan.REASONS."""

    path = ""  # of the file, where it is known

    def __str__(self) -> str:
        reason, detail = self.args
        fix = "; get the file again" if reason == "truncated" else ""
        return ": ".join(filter(None, [self.path, reason, detail])) + fix


def check_rate(rate: int) -> None:
    if not RATES_HZ[0] <= rate <= RATES_HZ[1]:
        raise Unusable("sample rate", f"{rate} Hz, expected {RATES_HZ[0]} to {RATES_HZ[1]}")


class Raw:
    """An open file's bytes. `error` is the last error of a read by a decoder, whose callbacks cannot raise."""

    def __init__(self, path: str, handle, size: int, on_disk: bool, fetch: Callable[[int, int], bytes] | None = None):
        self.path, self.handle, self.size, self.on_disk = path, handle, size, on_disk
        self.near = on_disk  # reads cost little
        self.fetch = fetch  # a range of a remote file, past the handle, whose cache holds one place
        self.edges: dict[int, bytes] = {}  # of a remote file, as {place: bytes}
        self.error: Exception | None = None

    def read(self, at: int, n: int) -> bytes:
        """The n bytes from `at`, fewer at the end of the file."""
        for edge in () if self.near else (0, max(0, self.size - EDGE)):
            if edge <= at and at + n <= edge + EDGE:  # a rule looks at both edges, more than once
                if edge not in self.edges:
                    aside = self.fetch if edge and self.size > BLOCK else None
                    self.edges[edge] = aside(edge, self.size) if aside else self._read(edge, EDGE)
                return self.edges[edge][at - edge:at - edge + n]
        return self._read(at, n)

    def _read(self, at: int, n: int) -> bytes:
        self.handle.seek(at)
        return self.handle.read(n)

    def keep(self) -> None:
        """Fetches a remote file of up to 32 MB whole, for a walk through all of it before the decoder's own."""
        if not self.near and self.size <= WHOLE:
            self.handle, self.near = io.BytesIO(self._read(0, self.size)), True


@contextmanager
def open_raw(path: str) -> Iterator[Raw]:
    """The bytes of a local or remote file. Raises FileNotFoundError, also for what is no regular file."""
    fs, p = store.open_fs(path)
    if isinstance(fs, LocalFileSystem):
        if not os.path.isfile(p):
            raise FileNotFoundError(f"no audio file {path}")
        with open(p, "rb") as f:
            yield Raw(p, f, os.fstat(f.fileno()).st_size, True)
        return
    with fs.open(p, "rb", block_size=BLOCK, cache_type="readahead") as f:
        size = f.size if hasattr(f, "size") else f.seek(0, io.SEEK_END)
        raw = Raw(path, f, size, False, lambda start, end: fs.cat_file(p, start=start, end=end))
        if not hasattr(f, "size"):  # of an archive, whose every step back unpacks from the beginning
            raw.keep()
        yield raw


class Window:
    """Segments of a file, end to end, as a file of their own. Reads never raise: see Raw.error."""

    def __init__(self, raw: Raw, segments: tuple[Segment, ...]):
        self.raw, self.at, self.parts, end = raw, 0, [], 0
        for s in segments:
            n = len(s) if isinstance(s, bytes) else s[1] - s[0]
            self.parts.append((end, end + n, s))
            end += n
        self.size = end

    def read(self, n: int = -1) -> bytes:
        left = self.size - self.at if n < 0 else max(0, min(n, self.size - self.at))
        pieces = []
        try:
            for first, last, s in self.parts:
                if left and first <= self.at < last:
                    take, skip = min(left, last - self.at), self.at - first
                    data = s[skip:skip + take] if isinstance(s, bytes) else self.raw.read(s[0] + skip, take)
                    pieces.append(data)
                    self.at, left = self.at + len(data), left - len(data)
                    if len(data) < take:  # the file was cut since it was measured
                        break
        except Exception as e:  # noqa: BLE001  whatever the network raises
            self.raw.error = e
            return b""
        return b"".join(pieces)

    def seek(self, to: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(0, to + (0, self.at, self.size)[whence])
        return self.at

    def tell(self) -> int:
        return self.at
