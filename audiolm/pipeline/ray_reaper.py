"""Ends the processes of a private Ray after the driver that started it, however that one ends.

Ray's servers end with the driver; its agents do not, where the driver is killed.  Each writes to files of Ray's session, whose
name has the time and the driver's process id, so that no other Ray is touched.  Run as a script, which imports nothing heavy.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

SESSION = re.compile(r"/session_(\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d)_\d+_(\d+)/")
GRACE_S = 1.0  # for what ends by itself
LOOKS = 4  # without a process left, before the search ends: a dying server may still start another


def start_reaper() -> None:
    """Has the processes of a Ray that this process starts from now on end with it. Only on Linux."""
    if not os.path.exists("/proc/self/fdinfo"):
        return
    read, _write = os.pipe()  # the other end is this process's alone, and never closed
    subprocess.Popen([sys.executable, "-S", __file__, str(os.getpid()), time.strftime("%Y-%m-%d_%H-%M-%S")], stdin=read,
                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    os.close(read)


def writers(driver: str, since: str) -> list[int]:
    """The processes that may write to a file of the driver's Ray session, begun at `since` or later."""
    found = []
    for process in (p for p in Path("/proc").iterdir() if p.name.isdigit()):
        try:
            if any(_is_of(driver, since, process, fd) for fd in os.listdir(process / "fd")):
                found.append(int(process.name))
        except OSError:  # it has ended, or is somebody else's
            continue
    return found


def _is_of(driver: str, since: str, process: Path, fd: str) -> bool:
    session = SESSION.search(os.readlink(process / "fd" / fd))
    if not session or session[2] != driver or session[1] < since:
        return False
    flags = re.search(r"flags:\s*([0-7]+)", (process / "fdinfo" / fd).read_text())
    return bool(int(flags[1], 8) & os.O_ACCMODE)  # who only reads a log is no process of Ray


def reap(driver: str, since: str) -> None:
    """Waits for the end of stdin, then kills the driver's Ray."""
    while os.read(0, 1):
        pass
    time.sleep(GRACE_S)
    left = LOOKS
    while left:
        pids = writers(driver, since)
        left = LOOKS if pids else left - 1
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.25)


if __name__ == "__main__":
    reap(*sys.argv[1:])
