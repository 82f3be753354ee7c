"""Reads and writes of whole objects, never visible half done, on local disks and object stores alike.

A store path is any fsspec URI.
Whole: `put` writes aside and renames (local) or sends one object (object stores).
Exclusive: of writers with different bytes exactly one wins.  A repeated or unanswered write finds its own bytes there and has
won, so that a claim needs bytes of its own, such as a nonce.
Patient: every call goes through `persist` (patience.py), which waits while a store does not answer.
Bounded: one try of a call to an object store takes CALL_S at most, and the time of its bytes at SLOWEST.
Nothing here deletes a lock.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from audiolm.local_disk import put_local
from audiolm.places import absolute, is_local, join, open_fs  # noqa: F401  part of this module's interface, as all below
from audiolm.store.credentials import hide_credentials, hide_credentials_in  # noqa: F401
from audiolm.store.patience import NoAnswer, http_status, patience, patience_s, persist, waits_told_to  # noqa: F401

QUIET_S = 900.0  # a writer that did nothing for so long is dead: longer than patience, a try and a lease together
CLEANUP_S = 10.0  # after an error there is nothing left to save by waiting
CALL_S = 60.0
SLOWEST = 2**20  # bytes a second
PIECE = 2**23  # bytes
PART = 2**25  # bytes: an object of two of them or more is sent in parts, of which a fault repeats one alone
READERS = 16  # requests at once

_ASIDE = re.compile(r"\.[0-9a-f]{32}\.tmp$")


def clean_up(error: BaseException | None, *calls: Callable[[], Any]) -> None:
    """Makes calls after an error, or after success (None). What they raise is a note of that error, or a line of the log."""
    with patience(CLEANUP_S):
        for call in calls:
            try:
                call()
            except Exception as e:  # noqa: BLE001  whatever a store or a tracker raises
                text = hide_credentials(f"while cleaning up: {type(e).__name__}: {e}")
                error.add_note(text) if error else logging.getLogger(__name__).warning(text)


def _timeout(fs: fsspec.AbstractFileSystem, size: int = 0) -> dict[str, float]:
    """The deadline of one try of a call that moves `size` bytes, as fsspec's asynchronous filesystems take it."""
    return {"timeout": min(CALL_S, patience_s()) + size / SLOWEST} if fs.async_impl else {}


def put(path: str, data: bytes, *, exclusive: bool = False) -> None:
    """Writes `data` whole; `exclusive` raises FileExistsError where the path exists already and holds other bytes."""
    fs, p = open_fs(path)
    if isinstance(fs, LocalFileSystem):
        persist(path, lambda: put_local(p, data, exclusive))
    else:
        persist(path, lambda: _put_object(fs, p, data, exclusive))


def _put_object(fs: fsspec.AbstractFileSystem, p: str, data: bytes, exclusive: bool) -> None:
    """An object store's PUT is atomic, and mode `create` sends If-None-Match."""
    parts = {"chunksize": PART} if hasattr(fs, "call_s3") else {}
    try:
        fs.pipe_file(p, data, mode="create" if exclusive else "overwrite", **parts, **_timeout(fs, len(data)))
    except OSError as e:
        # 412: it exists; 409: another writer is at it. Either may be this very write, repeated by a client that got no answer.
        if not exclusive or not (isinstance(e, FileExistsError) or http_status(e.__cause__ or e) in (409, 412)):
            raise
        try:
            if fs.cat_file(p, **_timeout(fs)) == data:
                return
        except FileNotFoundError:
            raise e from None
        raise FileExistsError(errno.EEXIST, "it exists", p) from e


def put_json(path: str, value: Any, *, exclusive: bool = False) -> None:
    put(path, json.dumps(value, indent=1, sort_keys=True).encode(), exclusive=exclusive)


def get(path: str, start: int | None = None, end: int | None = None) -> bytes:
    """An object's bytes, or those from `start` to before `end`, which must lie within it. Raises FileNotFoundError."""
    fs, p = open_fs(path)
    size = end - (start or 0) if end is not None else 0
    # Without a range the size is unknown: then the client's time-out of each read bounds the call, not a deadline.
    timeout = _timeout(fs, size) if end is not None else {}
    return persist(path, lambda: fs.cat_file(p, start=start, end=end, **timeout))


def get_json(path: str) -> Any | None:
    """The JSON at a path, or None where there is none or it is only being written. Raises ValueError with the fix."""
    fs, p = open_fs(path)
    one = {"max_concurrency": 1} if hasattr(fs, "call_s3") else {}  # else s3fs asks for the size first
    try:
        data = persist(path, lambda: fs.cat_file(p, **one))
        return json.loads(data) if data else None  # an empty file is a claim on a disk without hard links
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise ValueError(f"{hide_credentials(path)} is no whole JSON ({len(data)} bytes: {e}); a full or failing disk cut it "
                         "off: remove that file and run the same command again") from e


def at_once(read: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """`read` of each item, by threads as patient as this one: an object store answers each request late."""
    seconds = patience_s()

    def patient(item: Any) -> Any:
        with patience(seconds):
            return read(item)

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(patient, items))


def size(path: str) -> int:
    """An object's size in bytes. Raises FileNotFoundError."""
    fs, p = open_fs(path)
    return int(persist(path, lambda: fs.info(p, **_timeout(fs)))["size"])


def exists(path: str) -> bool:
    fs, p = open_fs(path)
    return persist(path, lambda: fs.exists(p, **_timeout(fs)))


def names(path: str) -> list[str]:
    """The names directly below a folder, numbers within them in order; none where the folder is missing.

    Files being written are left out.
    """
    fs, p = open_fs(path)
    try:
        found = persist(path, lambda: fs.ls(p, detail=False, **_timeout(fs)))
    except FileNotFoundError:
        return []
    last = {n.rstrip("/").rsplit("/", 1)[1] for n in found}
    return sorted((n for n in last if not n.endswith(".tmp")), key=natural)


def files(folder: str) -> dict[str, int]:
    """Sizes in bytes of all files below a folder, by their paths within it; those being written are left out."""
    return {name: size for name, (size, _) in listing(folder).items() if not name.endswith(".tmp")}


def listing(folder: str) -> dict[str, tuple[int, float]]:
    """(bytes, time of the last write by the store's own clock, epoch seconds) of all files below a folder, by their paths
    within it.  One request lists a thousand of them; the time is inf where a store's listing has none."""
    fs, p = open_fs(folder)
    if isinstance(fs, LocalFileSystem):
        return dict(sorted(_local_files(p)))
    found = persist(folder, lambda: fs.find(p, detail=True))  # each page has the client's own time-out
    return {name[len(p.rstrip("/")) + 1:]: (int(info["size"]), _written(info)) for name, info in sorted(found.items())
            if info["type"] == "file"}  # some S3 servers keep empty folders


def _local_files(top: str) -> Iterator[tuple[str, tuple[int, float]]]:
    for folder, _, found in os.walk(top):
        for path in (f"{folder}/{name}" for name in found):
            with suppress(FileNotFoundError):  # removed since
                info = os.stat(path)
                yield path[len(top) + 1:], (info.st_size, info.st_mtime)


def _written(info: dict[str, Any]) -> float:
    at = info.get("LastModified", info.get("mtime", math.inf))
    return at.timestamp() if hasattr(at, "timestamp") else float(at)


def natural(text: str) -> list:
    """A sort key under which shard-99999 comes before shard-100000."""
    return [(0, int(p), p) if p.isascii() and p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", text)]


def remove(path: str) -> None:
    """Removes a file or folder; fine where it is gone already."""
    fs, p = open_fs(path)
    try:
        persist(path, lambda: fs.rm(p, recursive=True, **_timeout(fs)))
    except FileNotFoundError:
        pass


def modified(path: str) -> float:
    """The time of an object's last write by the store's own clock, epoch seconds. Raises FileNotFoundError."""
    fs, p = open_fs(path)
    return persist(path, lambda: fs.modified(p)).timestamp()


def remove_unfinished(folder: str, before: float) -> None:
    """Removes what dead writers left below a folder: files aside and S3's unfinished uploads, begun before epoch `before`."""
    fs, p = open_fs(folder)
    if isinstance(fs, LocalFileSystem):
        for path, info in fs.find(p, detail=True).items():
            if _ASIDE.search(path) and info["mtime"] < before:
                os.unlink(path)
    elif hasattr(fs, "call_s3"):
        bucket, key, _ = fs.split_path(p)
        found = persist(folder, lambda: fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/"))
        for upload in found.get("Uploads", ()):
            if upload["Initiated"].timestamp() < before:
                fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])


def copy(source: str, target: str) -> None:
    """Copies a folder of whole objects within a store: by links on a local disk, by the server on an object store.

    Raises FileNotFoundError where something is gone.
    """
    (fs, a), (_, b) = open_fs(source), open_fs(target)
    found = persist(source, lambda: fs.find(a, detail=True, **_timeout(fs)))
    found = {p: info for p, info in found.items() if info["type"] == "file"}  # some S3 servers keep empty folders
    if not found:
        raise FileNotFoundError(source)
    for p, info in found.items():
        q = b + p[len(a):]
        if not isinstance(fs, LocalFileSystem):
            persist(source, lambda p=p, q=q, n=info["size"]: fs.cp_file(p, q, **_timeout(fs, n)))
            continue
        os.makedirs(os.path.dirname(q), exist_ok=True)
        if os.path.exists(q):  # of a copy that broke off: a link, which must not be written through
            os.unlink(q)
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
    persist(path, lambda: fs.get(p, target, recursive=True))
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
    """A file's bytes, some megabytes at a time. Raises FileNotFoundError."""
    end = size(path)
    for at in range(0, end, PIECE):
        yield get(path, at, min(end, at + PIECE))
