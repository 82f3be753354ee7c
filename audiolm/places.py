"""Places: paths and URIs taken apart in one way, their filesystems, and what lies below what.

A place is a local path or a URI `protocol://...`.  Only archives and caches chain, as fsspec writes it:
`zip://MEMBER::ARCHIVE` and `simplecache::PLACE`.  Everywhere else `::` is part of a name, as in `talks/12::30.wav`.
`member://OFFSET+SIZE/NAME::PLACE` is a stretch of bytes of a file, such as a sound within a tar, and
`row://COLUMN/GROUP+ROW+SIZE/NAME::PLACE` the bytes in a row of a Parquet file; NAME is for the reader.
"""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
import re
import threading
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import fsspec
from fsspec.implementations.local import LocalFileSystem

ARCHIVES = ("zip", "tar", "libarchive")
HELD = ("member", "row")
CACHES = ("simplecache", "filecache", "blockcache")
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BARE = re.compile(rf"({'|'.join(ARCHIVES + CACHES)})::(?=/|{_URI.pattern})")  # a chain whose first part is empty
_CHAIN = re.compile(rf"::(?=/|{_URI.pattern}|{_BARE.pattern})")
_FOREIGN = re.compile(rf"::(?={_URI.pattern})")
_OPEN = threading.local()  # the archive that this thread read last: a tar's one file handle must not be shared


class Place(NamedTuple):
    """A place's protocol ("local" for paths), the rest of it, and the place that it chains to."""

    protocol: str
    name: str
    inner: str | None


def split(path: str) -> Place:
    """Takes a path or URI apart; `::` within a name stays."""
    if bare := _BARE.match(path):
        return Place(bare[1], "", path[bare.end():])
    scheme = _URI.match(path)
    protocol = scheme[1].lower() if scheme else "local"
    rest = path[scheme.end():] if scheme else path
    if protocol in HELD:  # whose names hold no colon
        name, _, inner = rest.partition("::")
        return Place(protocol, name, inner)
    if protocol in (*ARCHIVES, *CACHES):
        chain = _CHAIN.search(rest)
        at = chain.start() if chain else rest.rfind("::")
        return Place(protocol, rest[:at], rest[at + 2:]) if at >= 0 else Place(protocol, rest, None)
    if chain := _FOREIGN.search(rest):  # what fsspec would read as a chain, and no name on a disk
        return Place(protocol, rest[:chain.start()], rest[chain.end():])
    return Place("local" if protocol == "file" else protocol, rest, None)


def protocols(path: str) -> set[str]:
    """The protocols that a place is read by; several where it is chained."""
    place = split(path)
    return {"local" if place.protocol == "file" else place.protocol} | (protocols(place.inner) if place.inner else set())


def is_local(path: str) -> bool:
    return protocols(path) == {"local"}


def is_whole(path: str) -> bool:
    """True for a place that needs no root: a URI or an absolute path."""
    return path.startswith("/") or bool(_URI.match(path) or _BARE.match(path))


def join(path: str, *names: str) -> str:
    """The place of names below another; within an archive they are its members."""
    place = split(path)
    if place.protocol in ARCHIVES and place.inner:
        return f"{place.protocol}://{'/'.join(filter(None, [place.name.rstrip('/'), *names]))}::{place.inner}"
    return "/".join([path.rstrip("/"), *names])


def absolute(path: str) -> str:
    """The path for a process that works in another folder."""
    if (place := split(path)).inner:
        return f"{place.protocol}://{place.name}::{absolute(place.inner)}"
    return _local(place.name) if place.protocol == "local" else path


def member(name: str, offset: int, size: int, place: str) -> str:
    """The place of `size` bytes at `offset` of a file."""
    return f"member://{offset}+{size}/{name.replace(':', '%3A')}::{place}"


def row(column: str, group: int, i: int, size: int, name: str, place: str) -> str:
    """The place of the `size` bytes in row `i` of a row group of a Parquet file."""
    return f"row://{quote(column, safe='')}/{group}+{i}+{size}/{name.replace(':', '%3A')}::{place}"


def within(path: str) -> str | None:
    """The file that a `member://` or `row://` place lies in; None for any other."""
    place = split(path)
    return place.inner if place.protocol in HELD else None


def open_fs(path: str) -> tuple[Any, str]:
    """The filesystem of a place and the path as that filesystem spells it. Raises ValueError for an unknown protocol.

    S3's own client times out and repeats a few times within one try: 5 s to connect, 15 s without a byte.
    """
    place = split(path)
    if place.protocol == "local" and not place.inner:
        return LocalFileSystem(auto_mkdir=True, use_listings_cache=False), _local(place.name)
    if place.protocol in HELD and place.inner:
        return _held(place), path
    if place.protocol in ARCHIVES and place.inner:
        return _archive(place.protocol, place.inner), place.name.strip("/")
    if place.protocol in CACHES and place.inner:
        fs, p = open_fs(place.inner)
        return fsspec.filesystem(place.protocol, fs=fs), p
    if place.inner:
        raise ValueError(f"{path!r} chains {place.protocol}, which holds no other place; {', '.join(ARCHIVES + CACHES)} do")
    kind = fsspec.get_filesystem_class(place.protocol)
    # By its class: fsspec's own reading of a path takes `::` within a name for a chain.
    return (fsspec.filesystem(place.protocol, **kind._get_kwargs_from_urls(path), use_listings_cache=False),
            kind._strip_protocol(path))


def short_name(name: str, most: int) -> str:
    """A file name of at most `most` bytes: a longer one is cut, and a hash of the whole is added."""
    if len(name.encode("utf-8", "surrogateescape")) <= most:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return name.encode("utf-8", "surrogateescape")[:most - 9].decode("utf-8", "ignore") + f"-{digest}"


def is_within(folder: str, path: str, follow_links: bool = True) -> bool:
    """True where `path` is `folder` or lies below it, `..` resolved; on a local disk symlinks too, with `follow_links`."""
    (kind, base), (other, place) = _plain(folder, follow_links), _plain(path, follow_links)
    return kind == other and f"{place}/".startswith(base if base in ("/", "./") else f"{base}/")


def _plain(path: str, follow_links: bool) -> tuple[str, str]:
    """(protocol and archive, path without `..`)."""
    place = split(path)
    if is_local(path):
        resolve = os.path.realpath if follow_links else os.path.normpath
        return "local", resolve(_local(place.name))
    if place.protocol in CACHES and place.inner:
        kind, plain = _plain(place.inner, follow_links)
        return f"{place.protocol}::{kind}", plain
    plain = posixpath.normpath(unquote(place.name))  # a web server reads %2e as a dot
    return f"{place.protocol}::{place.inner or ''}", f"./{plain}".removesuffix("/.") if place.inner else plain


def _local(path: str) -> str:
    """A local path as an absolute one; `..` stays, as it may follow a link."""
    path = os.path.expanduser(path)
    if not path.startswith("/"):
        path = os.path.join(os.getcwd(), "" if path == "." else path.removeprefix("./"))
    return path.rstrip("/") or "/"


def _archive(protocol: str, place: str) -> Any:
    """The filesystem within an archive, open in this thread until another archive is read."""
    if getattr(_OPEN, "key", None) != (protocol, place):
        fs, p = open_fs(place)
        _OPEN.fs = fsspec.filesystem(protocol, fo=fs.open(p, "rb"), skip_instance_cache=True)
        _OPEN.key = protocol, place
    return _OPEN.fs


class _Held:
    """`size` bytes within a file, as the filesystem of them alone; `read` takes the range from `start` to before `end`."""

    async_impl = False

    def __init__(self, size: int, read: Callable[[int, int], bytes]):
        self.size, self.read = size, read

    def info(self, _: str) -> dict[str, Any]:
        return {"size": self.size, "type": "file"}

    def isdir(self, _: str) -> bool:
        return False

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes `start` to `end`. Raises FileNotFoundError where the file ends before."""
        start, end = start or 0, self.size if end is None else min(end, self.size)
        data = self.read(start, end)
        if len(data) != end - start:
            raise FileNotFoundError(f"{path} is not there any more: the file has changed")
        return data

    def open(self, path: str, mode: str = "rb", **_: Any) -> io.BytesIO:
        """All of it, by one request: what containers of speech hold is an utterance."""
        return io.BytesIO(self.cat_file(path))

    def get(self, path: str, target: str, recursive: bool = False) -> None:
        with open(target, "wb") as f:
            f.write(self.cat_file(path))


def _held(place: Place) -> _Held:
    """What a `member://` or `row://` place names."""
    fs, p = open_fs(place.inner)
    if place.protocol == "member":
        offset, size = (int(n) for n in place.name.partition("/")[0].split("+"))
        return _Held(size, lambda start, end: fs.cat_file(p, start=offset + start, end=offset + end))
    column, numbers, _ = place.name.split("/", 2)
    group, i, size = (int(n) for n in numbers.split("+"))
    return _Held(size, lambda start, end: _row_group(fs, p, unquote(column), group)[i].as_py()[start:end])


def _row_group(fs: Any, p: str, column: str, group: int) -> Any:
    """The bytes of a row group, which this thread keeps until it reads another: rows cannot be read one by one."""
    import pyarrow.parquet as pq

    if getattr(_OPEN, "group", None) != (p, column, group):
        with fs.open(p, "rb") as f:
            table = pq.ParquetFile(f, page_checksum_verification=True).read_row_group(group, [f"{column}.bytes"])
        _OPEN.rows, _OPEN.group = table[column].combine_chunks().field("bytes"), (p, column, group)
    return _OPEN.rows
