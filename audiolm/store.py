"""Reads and writes of whole objects, never visible half done, on local disks and object stores alike.

A store path is any fsspec URI.  `put` writes aside and renames (local) or sends one PUT (object stores);
`exclusive=True` makes exactly one of many writers win.  Nothing here deletes a lock.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem


def open_fs(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a path and the path as that filesystem spells it."""
    return fsspec.url_to_fs(path, use_listings_cache=False, **({"auto_mkdir": True} if is_local(path) else {}))


def is_local(path: str) -> bool:
    return "://" not in path or path.startswith(("file://", "local://"))


def join(path: str, *names: str) -> str:
    return "/".join([path.rstrip("/"), *names])


def absolute(path: str) -> str:
    """The path for a process that works in another folder."""
    return open_fs(path)[1] if is_local(path) else path


def put(path: str, data: bytes, *, exclusive: bool = False) -> None:
    """Writes `data` whole; `exclusive` raises FileExistsError where the path exists already.

    An object store's PUT is atomic and mode `xb` sends If-None-Match; a local file is written aside, then linked
    (exclusive) or renamed (overwrite).
    """
    fs, p = open_fs(path)
    if not isinstance(fs, LocalFileSystem):
        try:
            with fs.open(p, "xb" if exclusive else "wb") as f:
                f.write(data)
        except OSError as e:
            if exclusive and _refused(e):
                raise FileExistsError(path) from e
            raise
        return
    os.makedirs(os.path.dirname(p), exist_ok=True)
    aside = f"{p}.{uuid.uuid4().hex}.tmp"
    try:
        with open(aside, "xb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        if not exclusive:
            os.replace(aside, p)
            return
        try:  # a link fails where the path exists, a rename would not
            os.link(aside, p)
        except FileExistsError:
            raise
        except OSError:  # a disk without hard links
            with open(p, "xb") as f:
                f.write(data)
    finally:
        if os.path.exists(aside):
            os.unlink(aside)


def _refused(error: BaseException | None) -> bool:
    """True for a server's 412 (it exists) or 409 (another writer is at it), which servers name differently."""
    while error is not None:
        status = getattr(error, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode")
        if status in (409, 412):
            return True
        error = error.__cause__ or error.__context__
    return False


def put_json(path: str, value: Any, *, exclusive: bool = False) -> None:
    put(path, json.dumps(value, indent=1, sort_keys=True).encode(), exclusive=exclusive)


def get(path: str) -> bytes:
    fs, p = open_fs(path)
    return fs.cat_file(p)


def get_json(path: str) -> Any | None:
    """The JSON at a path, or None where there is none."""
    try:
        return json.loads(get(path))
    except FileNotFoundError:
        return None


def exists(path: str) -> bool:
    fs, p = open_fs(path)
    return fs.exists(p)


def names(path: str) -> list[str]:
    """The names directly below a folder, sorted; none where the folder is missing. Files being written are left out."""
    fs, p = open_fs(path)
    try:
        found = (n.rstrip("/").rsplit("/", 1)[1] for n in fs.ls(p, detail=False))
        return sorted({n for n in found if not n.endswith(".tmp")})
    except FileNotFoundError:
        return []


def remove(path: str) -> None:
    """Removes a file or folder; fine where it is gone already."""
    fs, p = open_fs(path)
    try:
        fs.rm(p, recursive=True)
    except FileNotFoundError:
        pass


def copy(source: str, target: str) -> None:
    """Copies a folder of whole objects within a store: by links on a local disk, by the server on an object store.

    Raises FileNotFoundError where something is gone.
    """
    (fs, a), (_, b) = open_fs(source), open_fs(target)
    found = fs.find(a)
    if not found:
        raise FileNotFoundError(source)
    for p in found:
        q = b + p[len(a):]
        if not isinstance(fs, LocalFileSystem):
            fs.cp_file(p, q)
            continue
        os.makedirs(os.path.dirname(q), exist_ok=True)
        try:
            os.link(p, q)
        except FileNotFoundError:
            raise
        except OSError:  # a disk without hard links
            shutil.copyfile(p, q)


def local_copy(path: str, folder: str) -> str:
    """A path on this machine's disk with the same bytes: the path itself where it is local, else a copy in `folder`."""
    fs, p = open_fs(path)
    if isinstance(fs, LocalFileSystem):
        return p
    target = os.path.join(folder, p.rstrip("/").rsplit("/", 1)[1])
    fs.get(p, target, recursive=True)
    return target


def check_store(path: str) -> None:
    """Probes that of two exclusive writers one loses, as leases need. Raises ValueError naming the store."""
    probe = join(path, ".probe", uuid.uuid4().hex)
    try:
        put(probe, b"1", exclusive=True)
        try:
            put(probe, b"2", exclusive=True)
        except FileExistsError:
            return
        raise ValueError(f"store {path!r} ignores exclusive writes (If-None-Match): two drivers could run one step. "
                         "Use a local or shared disk, or an S3 server that honours conditional writes")
    finally:
        remove(probe)


def pieces(path: str) -> Iterator[bytes]:
    """A file's bytes, a megabyte at a time. Raises FileNotFoundError."""
    fs, p = open_fs(path)
    with fs.open(p, "rb") as f:
        while piece := f.read(1 << 20):
            yield piece


_HIDE = (
    (re.compile(r"(\w://)[^/\s]+@"), r"\1***@"),
    (re.compile(r"([?&][^=&\s]*(?:token|secret|sig|password|credential|key)[^=&\s]*=)[^&\s]+", re.I), r"\1***"),
)


def hide_credentials(text: Any) -> str:
    """Text without the credentials that its URIs may hold."""
    text = str(text)
    for pattern, shown in _HIDE:
        text = pattern.sub(shown, text)
    return text


def hide_credentials_in(value: Any) -> Any:
    """Plain JSON with every text masked."""
    if isinstance(value, dict):
        return {k: hide_credentials_in(v) for k, v in value.items()}
    if isinstance(value, list):
        return [hide_credentials_in(v) for v in value]
    return hide_credentials(value) if isinstance(value, str) else value
