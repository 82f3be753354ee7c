"""The log of a step's metrics: `metrics-{attempt:04d}.jsonl` in its build, the source of trackers and reports.

One JSON object a line: {"step": int, "time": epoch seconds, "metrics": {name: float}}.  Training workers and the
driver write it, a tracker and the report read it; no tracking server is needed to train.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from audiolm import store

REWRITE_S = 15.0  # an object store has no append: the whole object is written again, at most this often


class MetricsFile:
    """Appends rows to a metrics file; thread-safe. One writer process at a time, any number of readers.

    Local disk: a row is one `write` of a whole line. Object store: rows are kept and the object is rewritten every
    15 s (longer for files of many megabytes), and by `flush` and `close`. What an earlier writer left is continued.
    """

    def __init__(self, path: str):
        self.path = path
        self._lock = threading.Lock()
        self._fd: int | None = None
        self._text: bytearray | None = None  # object store: all of the object
        self._unsent = False
        self._sent_at = time.monotonic()

    def add(self, step: int, metrics: Mapping[str, float]) -> float:
        """Adds one row; values become floats (0-d arrays and tensors included). Returns its time, epoch seconds."""
        row = {"step": int(step), "time": time.time(), "metrics": {k: float(v) for k, v in metrics.items()}}
        line = json.dumps(row).encode() + b"\n"
        with self._lock:
            if store.is_local(self.path):
                self._append(line)
                return row["time"]
            if self._text is None:
                self._text = bytearray(_existing(self.path))
            self._text += line
            self._unsent = True
            wait_s = REWRITE_S * (1 + len(self._text) / 2**20)  # larger logs more rarely: traffic stays about 70 kB/s
            if time.monotonic() - self._sent_at >= wait_s:
                self._rewrite()
        return row["time"]

    def flush(self) -> None:
        """Every row added so far is in the store after this."""
        with self._lock:
            if self._unsent:
                self._rewrite()

    def close(self) -> None:
        self.flush()
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None

    def _append(self, line: bytes) -> None:
        if self._fd is None:
            _, p = store.open_fs(self.path)
            os.makedirs(os.path.dirname(p), exist_ok=True)
            self._fd = os.open(p, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            size = os.fstat(self._fd).st_size
            if size and os.pread(self._fd, 1, size - 1) != b"\n":
                line = b"\n" + line  # an earlier writer died within a line: keep the new one whole
        try:
            if os.write(self._fd, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            e.filename = self.path
            raise

    def _rewrite(self) -> None:
        store.put(self.path, bytes(self._text))
        self._unsent, self._sent_at = False, time.monotonic()


def _existing(path: str) -> bytes:
    try:
        data = store.get(path)
    except FileNotFoundError:
        return b""
    return data if not data or data.endswith(b"\n") else data + b"\n"


def read_from(path: str, offset: int = 0, max_bytes: int | None = None) -> tuple[list[dict[str, Any]], int]:
    """The whole rows after byte `offset` and the offset behind the last of them; ([], offset) where there are none.

    A line still being written is left for the next call; a damaged line is skipped. A missing file has no rows.
    `max_bytes` bounds one call; it must exceed the longest line.
    """
    try:
        size = store.size(path)
        if size <= offset:
            return [], offset
        data = store.get(path, offset, min(size, offset + max_bytes) if max_bytes else size)
    except FileNotFoundError:
        return [], offset
    rows = []
    for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
        offset += len(line)
        try:
            row = json.loads(line)
            rows.append({"step": int(row["step"]), "time": float(row["time"]), "metrics": dict(row["metrics"])})
        except (ValueError, KeyError, TypeError):
            continue
    return rows, offset


def read_build(build: str) -> list[dict[str, Any]]:
    """The rows of all attempts of a build, one per (step, metric) with the newest attempt's value, in step order."""
    merged: dict[int, dict[str, Any]] = {}
    for name in store.names(build):
        if name.startswith("metrics-") and name.endswith(".jsonl"):
            for row in read_from(store.join(build, name))[0]:
                seen = merged.setdefault(row["step"], {"step": row["step"], "time": row["time"], "metrics": {}})
                seen["time"] = row["time"]
                seen["metrics"].update(row["metrics"])
    return [merged[step] for step in sorted(merged)]
