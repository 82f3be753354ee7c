"""Reads and writes of whole objects, never visible half done, on local disks and object stores alike.

A store path is any fsspec URI.
Whole: `put` writes aside and renames (local) or sends one object (object stores).
Exclusive: of writers with different bytes exactly one wins.  A repeated or unanswered write finds its own bytes there and has
won, so that a claim needs bytes of its own, such as a nonce.
Patient: while a store does not answer (time-out, broken connection, HTTP 408, 409, 429, 5xx) a call is tried again, with
growing pauses, for `patience` seconds.  Then NoAnswer names the path and the cause.  An answer is never asked for again.
Bounded: one try of a call to an object store takes CALL_S at most, and the time of its bytes at SLOWEST.
Nothing here deletes a lock.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from audiolm.local_disk import put_local
from audiolm.places import absolute, is_local, join, open_fs  # noqa: F401  part of this module's interface

PATIENCE_S = 300.0  # a restart of a server or a network's fault takes minutes, and a training is worth the wait
QUIET_S = 900.0  # a writer that did nothing for so long is dead: longer than patience, a try and a lease together
CLEANUP_S = 10.0  # after an error there is nothing left to save by waiting
CALL_S = 60.0
SLOWEST = 2**20  # bytes a second
PIECE = 2**23  # bytes

_ASIDE = re.compile(r"\.[0-9a-f]{32}\.tmp$")
_patience_s: ContextVar[float] = ContextVar("patience_s")  # of this thread, PATIENCE_S by default


class NoAnswer(OSError):
    """A store that did not answer for as long as a call was patient; names the path, and the last error as its cause."""


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Bounds how long this thread's calls wait for a store that does not answer."""
    token = _patience_s.set(seconds)
    try:
        yield
    finally:
        _patience_s.reset(token)


def persist(path: str, call: Callable[[], Any]) -> Any:
    """`call()`, tried again while the store does not answer; it must be safe to repeat. Raises NoAnswer."""
    began, pause_s = time.monotonic(), 0.5
    while True:
        try:
            return call()
        except Exception as e:
            if isinstance(e, NoAnswer) or not _no_answer(e):
                _name(e, path)
                raise
            left_s = _patience_s.get(PATIENCE_S) - (time.monotonic() - began)
            shown = hide_credentials(f"{path}: {type(e).__name__}: {e}")
            if left_s < pause_s:
                raise NoAnswer(f"the store did not answer for {time.monotonic() - began:.0f} s: {shown}") from e
            if pause_s == 0.5:
                logging.getLogger(__name__).warning("the store does not answer, trying for %.0f s: %s", left_s, shown)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 10.0)


def _name(error: Exception, path: str) -> None:
    """Adds the path to an error of a disk or a store that has none."""
    if isinstance(error, NoAnswer) or not isinstance(error, OSError) or error.filename is not None:
        return
    if error.errno is not None:
        error.filename = path
    elif len(error.args) == 1 and str(error) not in path:
        error.args = (f"{path}: {error}",)


def _no_answer(error: BaseException | None) -> bool:
    """True for an error after which the same call may succeed: the store was out of reach or busy."""
    if isinstance(error, (FileNotFoundError, FileExistsError, PermissionError)):
        return False  # an answer, and a common one: without imports that take longer than the call
    from aiohttp import ClientError
    from botocore.exceptions import ConnectionError as NoConnection
    from botocore.exceptions import HTTPClientError, IncompleteReadError

    while error is not None:
        if (status := _status(error)) is not None:
            return status in (408, 409, 429) or status >= 500
        if isinstance(error, (TimeoutError, ConnectionError, NoConnection, HTTPClientError, IncompleteReadError, ClientError)):
            return True
        if any(kind.__name__ == "TransportError" for kind in type(error).__mro__):  # httpx's, which the Hub's client raises
            return True
        if getattr(error, "errno", None) == errno.ESTALE:  # NFS: the server was started anew
            return True
        error = error.__cause__ or error.__context__
    return False


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error of botocore or of the Hub's client."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(response, "status_code", None)


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
    return {"timeout": min(CALL_S, _patience_s.get(PATIENCE_S)) + size / SLOWEST} if fs.async_impl else {}


def put(path: str, data: bytes, *, exclusive: bool = False) -> None:
    """Writes `data` whole; `exclusive` raises FileExistsError where the path exists already and holds other bytes."""
    fs, p = open_fs(path)
    if isinstance(fs, LocalFileSystem):
        persist(path, lambda: put_local(p, data, exclusive))
    else:
        persist(path, lambda: _put_object(fs, p, data, exclusive))


def _put_object(fs: fsspec.AbstractFileSystem, p: str, data: bytes, exclusive: bool) -> None:
    """An object store's PUT is atomic, and mode `create` sends If-None-Match."""
    try:
        fs.pipe_file(p, data, mode="create" if exclusive else "overwrite", **_timeout(fs, len(data)))
    except OSError as e:
        # 412: it exists; 409: another writer is at it. Either may be this very write, repeated by a client that got no answer.
        if not exclusive or not (isinstance(e, FileExistsError) or _status(e.__cause__ or e) in (409, 412)):
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
    try:
        data = get(path)
        return json.loads(data) if data else None  # an empty file is a claim on a disk without hard links
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise ValueError(f"{hide_credentials(path)} is no whole JSON ({len(data)} bytes: {e}); a full or failing disk cut it "
                         "off: remove that file and run the same command again") from e


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
    fs, p = open_fs(folder)
    found = persist(folder, lambda: fs.find(p, detail=True, **_timeout(fs)))
    return {name[len(p.rstrip("/")) + 1:]: int(info["size"]) for name, info in sorted(found.items())
            if info["type"] == "file" and not name.endswith(".tmp")}  # some S3 servers keep empty folders


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
