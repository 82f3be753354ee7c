"""Lists the files below a folder, local or remote, without passing over anything in silence.

Links are followed, and every folder is listed once, so that no loop is without end.  What cannot be entered or read is an
entry with a fault, (reason, detail); reasons are those of scan.REASONS.  Names that start with a dot are hidden.
Only regular files count: a pipe would wait for a writer, and a device has no end.
"""

from __future__ import annotations

import errno
import os
import stat as stats
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from audiolm import places, store

Fault = tuple[str, str]
LEFT_OUT = "left out"  # the reason of a file that looks like audio and is of no type that is read
NOT_ITS_OWN = (errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT)  # of a disk or a machine


@dataclass(frozen=True)
class Entry:
    """A file as its filesystem lists it; size -1 where it is missing or faulty, stamp = etag or mtime."""

    uri: str
    path: str
    size: int
    stamp: str
    fault: Fault | None = None


def walk(root: str, wanted: Callable[[str], bool]) -> Iterator[Entry]:
    """The wanted files below a root, by uri, and the folders that cannot be listed. Raises FileNotFoundError, PermissionError.

    `wanted` takes a uri, which is relative to the root.
    """
    fs, p = store.open_fs(root)
    local = isinstance(fs, LocalFileSystem)
    for uri, info in _local(p) if local else _remote(fs, p.rstrip("/")):
        dotted = uri.startswith(".") or "/." in uri
        if dotted and any(part.startswith(".") and part not in (".", "..") for part in uri.split("/")):
            continue
        # A faulty name without an ending may be a folder, such as a link to a disk that is not mounted.
        if not (wanted(uri) or info.get("folder") or info.get("fault") and "." not in uri.rpartition("/")[2]):
            continue
        if dotted and not local:
            info = {"fault": ("unreadable", "its key holds a part '.' or '..', which paths resolve; rename it")}
        name = f"./{uri}" if places.is_whole(uri) else uri  # of a key with two slashes in a row
        yield entry(name, places.join(root, uri), info)


def find(place: str, wanted: Callable[[str], bool]) -> list[tuple[str, str]]:
    """(name, path) of the wanted files below a folder and of its folders that cannot be listed, in natural order."""
    return [(e.uri, e.path) for e in sorted(walk(place, wanted), key=lambda e: store.natural(e.uri))]


def stat(uri: str, path: str) -> Entry:
    """The entry of one named file, with its fault. A filesystem out of reach raises its own error."""
    try:
        fs, p = store.open_fs(path)
        return entry(uri, path, _local_info(p) if isinstance(fs, LocalFileSystem) else fs.info(p))
    except (OSError, ValueError) as e:
        return entry(uri, path, {"fault": fault_of(e)})


def entry(uri: str, path: str, info: dict[str, Any]) -> Entry:
    """An entry of what a filesystem says of a file."""
    fault = info.get("fault") or (("unreadable", "a folder, not a file") if info.get("type") == "directory" else None)
    if uri != (shown := shown_name(uri)):
        uri, fault = shown, ("unreadable", "its name is not UTF-8; rename it")
    # Every filesystem names the tag or date of a change in its own way: S3, Google's, the Hub, local disks, others.
    keys = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "last_modified")
    stamp = "" if fault else str(next((info[k] for k in keys if info.get(k) is not None), ""))
    return Entry(uri, path, -1 if fault else int(info.get("size") or 0), stamp.strip('"'), fault)


def shown_name(name: str) -> str:
    """A name as text that every file and terminal takes: bytes that are no UTF-8 are escaped."""
    return name if name.isascii() else name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def fault_of(e: Exception) -> Fault:
    """The fault of one item that a filesystem refuses. Raises the error where it is not the item's own."""
    if isinstance(e, (FileNotFoundError, NotADirectoryError)):
        return "missing", "no such file"
    code = getattr(e, "errno", None)
    if isinstance(e, PermissionError):
        return "unreadable", f"denied: {e.strerror or e}"
    if isinstance(e, OSError) and (code is None or code in NOT_ITS_OWN or isinstance(e, (ConnectionError, TimeoutError))):
        raise e
    loops = "a link that leads to itself"
    return "unreadable", loops if code == errno.ELOOP else shown_name(getattr(e, "strerror", None) or str(e))


def _local(top: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(uri, info) below a local folder. Folders before links, so that what a link repeats keeps its own name."""
    seen: set[tuple[int, int]] = set()
    folders, links = [""], []
    while folders or links:
        uri = folders.pop() if folders else links.pop(0)
        path = os.path.join(top, uri)
        try:
            found = os.stat(path)
            if (found.st_dev, found.st_ino) in seen:
                continue
            seen.add((found.st_dev, found.st_ino))
            with os.scandir(path) as items:
                items = sorted(items, key=lambda item: item.name)
        except OSError as e:
            if not uri:
                raise
            yield uri, {"fault": _folder_fault(e), "folder": True}
            continue
        for item in items:
            name = f"{uri}/{item.name}" if uri else item.name
            info = _local_info(item.path, item.stat)
            if info.get("type") != "directory":
                yield name, info
            elif not item.name.startswith("."):
                (links if item.is_symlink() else folders).append(name)


def _local_info(path: str, stat: Callable[[], os.stat_result] | None = None) -> dict[str, Any]:
    try:
        found = stat() if stat else os.stat(path)
    except (OSError, ValueError) as e:
        nowhere = isinstance(e, FileNotFoundError) and os.path.islink(path)
        return {"fault": ("missing", "a link that leads nowhere") if nowhere else fault_of(e)}
    if stats.S_ISDIR(found.st_mode):
        return {"type": "directory"}
    if not stats.S_ISREG(found.st_mode):
        kind = "pipe" if stats.S_ISFIFO(found.st_mode) else "socket" if stats.S_ISSOCK(found.st_mode) else "device"
        return {"fault": ("unreadable", f"a {kind}, not a regular file")}
    return {"size": found.st_size, "mtime": found.st_mtime}


def _folder_fault(e: Exception) -> Fault:
    return "unreadable", f"the folder cannot be listed: {fault_of(e)[1]}"


def _remote(fs: Any, p: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(uri, info) below a remote folder: all keys where the filesystem lists them so, on S3 by pages, else folder by folder."""
    if hasattr(fs, "call_s3"):
        yield from _s3_pages(fs, p)
        return
    own = getattr(type(fs), "_find", None) or type(fs).find
    if own not in (AsyncFileSystem._find, AbstractFileSystem.find):
        infos = fs.find(p, detail=True)
        if not infos and not fs.exists(p):  # object stores list a missing folder as an empty one
            raise FileNotFoundError(p)
        for key, info in infos.items():
            if info.get("type") != "directory" and key != p:  # a key that ends in a slash stands for a folder
                yield key[len(p) + 1:] if p else key, info
        return
    folders = [("", p)]
    while folders:
        uri, folder = folders.pop()
        try:
            infos = fs.ls(folder, detail=True)
        except (FileNotFoundError, PermissionError) as e:
            if not uri:
                raise
            yield uri, {"fault": _folder_fault(e), "folder": True}
            continue
        for info in sorted(infos, key=lambda info: info["name"]):
            key = info["name"].rstrip("/").rsplit("/", 1)[-1]
            if info["name"].strip("/") == folder.strip("/"):
                continue
            name = f"{uri}/{key}" if uri else key
            if info["type"] != "directory":
                yield name, info
            elif not key.startswith("."):
                folders.append((name, info["name"]))


def _s3_pages(fs: Any, p: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(uri, info) below a folder of S3, with a thousand in memory. Raises FileNotFoundError where there is none."""
    bucket, key, _ = fs.split_path(p)
    prefix, more, found = f"{key}/" if key else "", {}, False
    while more is not None:
        page = store.persist(p, lambda more=more: fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **more))
        for item in page.get("Contents", ()):
            found = True
            if not item["Key"].endswith("/"):  # else it stands for a folder
                yield item["Key"][len(prefix):], {"size": item["Size"], "ETag": item["ETag"]}
        more = {"ContinuationToken": page["NextContinuationToken"]} if page.get("IsTruncated") else None
    if not found and not fs.exists(p):
        raise FileNotFoundError(p)
