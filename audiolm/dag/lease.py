"""Who owns a build while it is being made (DESIGN 1.3).

Each try is a file `attempts/NNNN.json`; taking a build over means creating the next number exclusively, so there is no
lock to delete and no race.  The owner rewrites its own file as a heartbeat.  A waiter judges by "the beat did not
change for LEASE_S on my monotonic clock", and at once when the owner is a dead process of this same boot.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import psutil

from audiolm.store import get_json, join, names, put_json

HEARTBEAT_S, LEASE_S = 10.0, 60.0


class LeaseLost(RuntimeError):
    """Another worker took the build over; this attempt must stop and must not publish."""


def _this_machine() -> dict:
    boot, ns = Path("/proc/sys/kernel/random/boot_id"), "/proc/self/ns/pid"
    return {"host": socket.gethostname(),
            "boot": boot.read_text().strip() if boot.exists() else str(int(psutil.boot_time())),
            "pids": os.readlink(ns) if os.path.exists(ns) else ""}


def owner() -> dict:
    """What tells this process from every other one, here and on other machines."""
    return {**_this_machine(), "pid": os.getpid(), "started": psutil.Process().create_time(),
            "ray_job": os.environ.get("RAY_JOB_SUBMISSION_ID")}


def is_dead(attempt: dict) -> bool:
    """True when the attempt's owner surely died: a process of this same boot and pid namespace that is gone."""
    if any(attempt.get(k) != v for k, v in _this_machine().items()):
        return False
    try:
        process = psutil.Process(attempt["pid"])
        return abs(process.create_time() - attempt["started"]) > 1.0 or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def latest(build: str) -> int:
    return max((int(n[:4]) for n in names(join(build, "attempts")) if n.endswith(".json")), default=0)


def read_attempt(build: str, number: int) -> dict | None:
    return get_json(join(build, "attempts", f"{number:04d}.json")) if number else None


def check_lease(build: str, attempt: int) -> None:
    """For workers on other machines: raises LeaseLost when a newer attempt exists or this one was stopped."""
    if latest(build) > attempt:
        raise LeaseLost(f"{build}: attempt {attempt} was taken over by attempt {latest(build)}")
    record = read_attempt(build, attempt)
    if record is None or record["state"] != "running":
        raise LeaseLost(f"{build}: attempt {attempt} is {record and record['state']}, no longer running")


class Lease:
    """A claimed attempt and its heartbeat thread; it follows attempt `after`, by default the latest."""

    def __init__(self, build: str, after: int | None = None):
        self.build, self.attempt = build, (latest(build) if after is None else after) + 1
        self.path = join(build, "attempts", f"{self.attempt:04d}.json")
        self.lost, self._stop, self._write = threading.Event(), threading.Event(), threading.Lock()
        self._record = {**owner(), "state": "running", "beat": 0, "time": time.time()}
        put_json(self.path, self._record, exclusive=True)  # FileExistsError: somebody else was first
        self._thread = threading.Thread(target=self._beat, name=f"lease {build}", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        good = time.monotonic()
        while not self._stop.wait(HEARTBEAT_S):
            try:
                if latest(self.build) > self.attempt:
                    self.lost.set()
                    return
                with self._write:
                    if self._stop.is_set():
                        return
                    self._record |= {"beat": self._record["beat"] + 1, "time": time.time()}
                    put_json(self.path, self._record)
                good = time.monotonic()
            except Exception:  # noqa: BLE001  a store that stumbles is tried again until half the lease is gone
                if time.monotonic() - good > LEASE_S / 2:
                    self.lost.set()
                    return

    def check(self, now: bool = False) -> None:
        if self.lost.is_set() or (now and latest(self.build) > self.attempt):
            raise LeaseLost(f"{self.build}: attempt {self.attempt} was taken over by another worker")

    def close(self, state: str, error: str | None = None) -> None:
        """Ends the heartbeat and records how it ended: done, failed or stopped."""
        self._stop.set()
        with self._write:
            if not self.lost.is_set():
                put_json(self.path, self._record | {"state": state, "time": time.time(), "error": error})


class Waiter:
    """Watches somebody else's attempt: `free()` is true once `judged`, the latest then, may be taken over. Who claims names
    it, since there may be a newer one by now."""

    def __init__(self, build: str):
        self.build, self.judged, self._seen, self._since = build, 0, None, time.monotonic()

    def free(self) -> bool:
        number = self.judged = latest(self.build)
        record = read_attempt(self.build, number)
        if record is None or record["state"] != "running" or is_dead(record):
            return True
        if (number, record["beat"]) != self._seen:
            self._seen, self._since = (number, record["beat"]), time.monotonic()
        return time.monotonic() - self._since > LEASE_S
