"""One part in a process of its own: an error of CUDA spoils its process, and a part that hangs can be killed.

The worker appends JSON lines to a file: {"begin": name}, {"figure": [...]}, {"end": true} or {"failed": error}, at last
{"finished": true}.  `watch` reads them as they come, kills a part whose time is over, and starts it again behind an item
that killed it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from tests.bench.figures import Figure
from tests.bench.gpu_parts.report import Report

GPU = Path(__file__).resolve().parents[1] / "gpu.py"
POLL_S = 0.1


def work(part: str, skip: int, lines: str, device: str, tiny: bool) -> None:
    """The items of a part behind the first `skip`; `part` is a module with items(device, tiny) -> {name: figures}."""
    module = importlib.import_module(part)
    with open(lines, "a", buffering=1) as out:
        def say(**line) -> None:
            out.write(json.dumps(line) + "\n")

        for name, item in list(module.items(device, tiny).items())[skip:]:
            say(begin=name)
            try:
                for figure in item():
                    say(figure=list(figure))
                say(end=True)
            except Exception as e:  # noqa: BLE001  the next item runs whatever became of this one
                traceback.print_exc()
                say(failed=f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}")
        say(finished=True)


def watch(part: str, device: str, tiny: bool, report: Report, letter: str, seconds: float, log: Path) -> None:
    """Runs a part for at most `seconds`; what it prints goes to the end of `log`."""
    deadline, begun, finished = time.monotonic() + seconds, 0, False
    with tempfile.TemporaryDirectory() as temp:
        lines = Path(temp) / "lines.jsonl"
        lines.touch()
        reader = _lines(lines)
        while not finished and time.monotonic() < deadline:
            with log.open("ab") as out:
                child = subprocess.Popen([sys.executable, str(GPU), "--part", part, "--skip", str(begun), "--lines", str(lines),
                                          "--device", device, *(["--tiny"] if tiny else [])],
                                         stdout=out, stderr=out, start_new_session=True)
            try:
                now, finished, died = _follow(child, reader, report, letter, deadline)
            finally:
                _kill(child)
            begun += now
            if died and not now:
                report.begin(letter, part)
                report.end("failed", 0.0, f"its process ended before an item began, see {log.name}")
                return
    if not finished:
        report.begin(letter, f"the rest of {part}")
        report.end("out of time", 0.0, f"{seconds:.0f} s were not enough")


def _follow(child: subprocess.Popen, reader: Iterator[dict | None], report: Report, letter: str,
            deadline: float) -> tuple[int, bool, bool]:
    """(items begun, True where the part is finished, True where its process died) of a worker, until it or the time ends."""
    begun, started, running = 0, time.monotonic(), False
    while True:
        dead = child.poll() is not None  # before the last lines are read
        for line in reader:
            if line is None:
                break
            if "begin" in line:
                report.begin(letter, line["begin"])
                begun, started, running = begun + 1, time.monotonic(), True
            elif "figure" in line:
                report.figure(Figure(*line["figure"]))
            elif "finished" in line:
                return begun, True, False
            else:
                report.end("failed" if "failed" in line else "done", time.monotonic() - started, line.get("failed"))
                running = False
        late = time.monotonic() > deadline
        if dead or late:
            if running:
                report.end("out of time" if late else "failed", time.monotonic() - started,
                           None if late else f"its process ended with status {child.returncode}")
            return begun, False, dead and not late
        time.sleep(POLL_S)


def _lines(path: Path) -> Iterator[dict | None]:
    """The file's JSON lines as they are written, None where there is no whole one yet."""
    with path.open() as file:
        while True:
            at, line = file.tell(), file.readline()
            if line.endswith("\n"):
                yield json.loads(line)
            else:
                file.seek(at)
                yield None


def _kill(child: subprocess.Popen) -> None:
    """Ends a worker and what it started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()
