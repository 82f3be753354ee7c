"""The lease on a build: which attempt, by which process, may work on it and publish it.

Each attempt is a file `attempts/NNNN.json`.  Taking a build over is the exclusive write of the next number, so that there
is no lock to delete and no race.  The owner rewrites its own file as a heartbeat.  A waiter takes over
once the beat has not changed for LEASE_S on the waiter's own monotonic clock; the owner's clock is never believed.  It
takes over at once when the owner is a dead process of this same boot.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from pathlib import Path

import psutil

from audiolm.store import get_json, join, names, patience, put_json

HEARTBEAT_S = 10.0
LEASE_S = 60.0  # six beats: an object store may fail some writes and a waiter still does not take over
START_TOLERANCE = 1.0  # of a process's start


class LeaseLost(RuntimeError):
    """Another worker took the build over; this attempt must stop and must not publish."""


def _this_machine() -> dict:
    """This boot and pid namespace: only within both is a process id the same process."""
    boot, ns = Path("/proc/sys/kernel/random/boot_id"), "/proc/self/ns/pid"
    return {"host": socket.gethostname(),
            "boot": boot.read_text().strip() if boot.exists() else str(int(psutil.boot_time())),
            "pids": os.readlink(ns) if os.path.exists(ns) else ""}


def owner() -> dict:
    """The identity of this process, unique here and among other machines."""
    return {**_this_machine(), "pid": os.getpid(), "started": _life(os.getpid())[0],
            "ray_job": os.environ.get("RAY_JOB_SUBMISSION_ID")}


def is_here(attempt: dict) -> bool:
    """True where the attempt's owner is, or was, a process of this boot and pid namespace."""
    return all(attempt.get(k) == v for k, v in _this_machine().items())


def is_dead(attempt: dict) -> bool:
    """True when the attempt's owner surely died: a process of this same boot and pid namespace that is gone."""
    if not is_here(attempt):
        return False
    life = _life(attempt["pid"])  # another start: the pid was given to a new process
    return life is None or life[1] or abs(life[0] - attempt["started"]) > START_TOLERANCE


def _life(pid: int) -> tuple[float, bool] | None:
    """(start, is it a zombie) of a process; None where it is gone.

    Linux counts the start in clock ticks since the boot; psutil's seconds move when somebody sets the machine's clock.
    """
    try:
        if os.path.exists("/proc/self/stat"):
            # Behind the name, which may hold anything, the fields are separated by spaces (proc_pid_stat(5)).
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
            return float(fields[19]), fields[0] == b"Z"
        process = psutil.Process(pid)
        return process.create_time(), process.status() == psutil.STATUS_ZOMBIE
    except (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):
        return None


def latest(build: str) -> int:
    """The number of a build's newest attempt, 0 where there is none."""
    return max((int(n.removesuffix(".json")) for n in names(join(build, "attempts")) if n.endswith(".json")), default=0)


def read_attempt(build: str, number: int) -> dict | None:
    return get_json(join(build, "attempts", f"{number:04d}.json")) if number else None


def check_lease(build: str, attempt: int) -> None:
    """Raises LeaseLost when a newer attempt exists or this one was stopped. For training workers, on any machine."""
    if latest(build) > attempt:
        raise LeaseLost(f"{build}: attempt {attempt} was taken over by attempt {latest(build)}")
    record = read_attempt(build, attempt)
    if record is None or record["state"] != "running":
        raise LeaseLost(f"{build}: attempt {attempt} is {record and record['state']}, no longer running")


class Lease:
    """A claimed attempt and its heartbeat thread.

    The attempt follows number `after`, by default the latest. Raises FileExistsError where somebody else was first.
    It is lost only to a newer attempt that was seen: while the store is out of reach nobody can say, so `check` waits for it.
    """

    def __init__(self, build: str, after: int | None = None):
        self.build, self.attempt = build, (latest(build) if after is None else after) + 1
        self.path = join(build, "attempts", f"{self.attempt:04d}.json")
        self.lost, self._stop, self._write = threading.Event(), threading.Event(), threading.Lock()
        self._record = {**owner(), "nonce": uuid.uuid4().hex, "state": "running", "beat": 0, "time": time.time()}
        put_json(self.path, self._record, exclusive=True)
        self._beaten = time.monotonic()
        self._thread = threading.Thread(target=self._beat, name=f"lease {build}", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        """The heartbeat's thread: ends when the lease is closed or taken over."""
        while not self._stop.wait(HEARTBEAT_S):
            try:
                with patience(HEARTBEAT_S):
                    if latest(self.build) > self.attempt:
                        self.lost.set()
                        return
                    with self._write:  # `close` writes the last state, no beat may follow it
                        if self._stop.is_set():
                            return
                        self._record |= {"beat": self._record["beat"] + 1, "time": time.time()}
                        put_json(self.path, self._record)
                self._beaten = time.monotonic()
            except Exception:  # noqa: BLE001  whatever a store raises; the next beat tries again
                continue

    def check(self, now: bool = False) -> None:
        """Raises LeaseLost after a takeover: as of the last heartbeat, which costs nothing, or as of `now`.

        Once a waiter may have taken over unseen, the store is asked: with half a lease without a beat.
        """
        late = time.monotonic() - self._beaten > LEASE_S / 2
        if self.lost.is_set() or ((now or late) and latest(self.build) > self.attempt):
            raise LeaseLost(f"{self.build}: attempt {self.attempt} was taken over by another worker")

    def close(self, state: str, error: str | None = None) -> None:
        """Ends the heartbeat and records the attempt's end: done, failed or stopped."""
        self._stop.set()
        with self._write:
            if not self.lost.is_set():
                put_json(self.path, self._record | {"state": state, "time": time.time(), "error": error})


class Waiter:
    """A watch on somebody else's attempt: `free()` is true once attempt `number`, the latest then, may be taken over.

    A claim passes `number` on, since by then there may be a newer attempt, which must not be taken over too.
    """

    def __init__(self, build: str):
        self.build, self.number = build, 0
        self._last_beat, self._quiet_s, self._looked = None, 0.0, time.monotonic()

    def free(self) -> bool:
        number = self.number = latest(self.build)
        record = read_attempt(self.build, number)
        if record is None or record["state"] != "running" or is_dead(record):
            return True
        # A time in which this process could not look counts as one beat: then the owner could not beat either.
        now = time.monotonic()
        self._quiet_s += min(now - self._looked, HEARTBEAT_S)
        self._looked = now
        if (number, record["beat"]) != self._last_beat:
            self._last_beat, self._quiet_s = (number, record["beat"]), 0.0
        return self._quiet_s > LEASE_S
