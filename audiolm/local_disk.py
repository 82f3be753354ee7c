"""Whole and exclusive writes on a disk, with hard links or without; no file is seen half written, not even after a crash."""

from __future__ import annotations

import os
import uuid

CLAIM_S = 60.0  # on a disk without hard links: an empty file of this age is a claim whose writer died


def put_local(p: str, data: bytes, exclusive: bool) -> None:
    """Writes aside, then links (exclusive) or renames (overwrite), and makes the new name last."""
    os.makedirs(os.path.dirname(p), exist_ok=True)
    aside = aside_of(p)
    try:
        with open(aside, "xb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        if exclusive:
            link_once(aside, p)
        else:
            os.replace(aside, p)
    except FileExistsError:
        with open(p, "rb") as f:
            if f.read() != data:
                raise
    except OSError as e:
        e.filename = p  # the name aside says nothing
        raise
    finally:
        if os.path.exists(aside):
            os.unlink(aside)
    _sync_folder(os.path.dirname(p))


def aside_of(p: str) -> str:
    """A name to write to until a file is whole: beside it, so that the rename is atomic, and short whatever its name."""
    return os.path.join(os.path.dirname(p), f".{uuid.uuid4().hex}.tmp")


def link_once(aside: str, p: str) -> None:
    """Gives a whole file its name, unless that exists: a rename would replace it. Raises FileExistsError."""
    try:
        try:
            os.link(aside, p)
            return
        except FileExistsError:
            raise
        except OSError:  # a disk without hard links: making an empty file, which reads as absent, is exclusive on every disk
            os.close(os.open(p, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        there = os.stat(p)
        if there.st_size or os.stat(aside).st_mtime - there.st_mtime < CLAIM_S:
            raise
    try:
        os.replace(aside, p)
    except OSError:
        os.unlink(p)
        raise


def _sync_folder(folder: str) -> None:
    """Makes a folder's new names outlive a loss of power; some network disks cannot, and need not."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError:
        pass
    finally:
        os.close(fd)
