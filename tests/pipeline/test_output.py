"""A display never fails the work: closed pipes, missing streams, full disks, terminals that go away, characters they lack."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from audiolm.pipeline.cli import run_command
from audiolm.pipeline.output import Output
from audiolm.pipeline.progress import ProgressBoard
from tests.worlds.basics import ROOT


class Broken(io.StringIO):
    """A stream that raises `error` on each call from the `good`-th write on."""

    def __init__(self, error: Exception, good: int = 0, tty: bool = False):
        super().__init__()
        self.error, self.good, self.tty = error, good, tty

    def isatty(self):
        return self.tty

    def write(self, text):
        self.good -= 1
        if self.good < 0:
            raise self.error
        return super().write(text)

    def flush(self):
        if self.good <= 0:
            raise self.error


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS = {"pipe": lambda: Broken(BrokenPipeError()), "disk": lambda: Broken(OSError(28, "No space left")),
           "later": lambda: Broken(OSError(5, "EIO"), good=2), "terminal": lambda: Broken(OSError(5, "EIO"), tty=True),
           "busy": lambda: Broken(BlockingIOError()), "closed": closed, "none": lambda: None}


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_the_board_goes_quiet(stream, monkeypatch):
    stream = stream()
    monkeypatch.setattr(sys, "stdout", stream)  # of None it takes this one
    board = ProgressBoard(stream)
    board.start("codec")
    for done in range(3):
        board.update("codec", done, 3, "steps", "loss 1")
    board.say("hello")
    board.end("codec", "DONE", 1.0)


def test_a_disk_that_has_room_again_gets_what_follows():
    stream = Broken(OSError(28, "No space left"))
    board = ProgressBoard(stream)
    board.say("lost")
    stream.good = 9
    board.say("kept")
    assert stream.getvalue() == "kept\n"


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_a_command_goes_on_and_has_its_own_status(stream, monkeypatch):
    """Its prints and logs, of handlers too whose own stream is broken."""
    handler = logging.StreamHandler(stream())

    def command():
        print("out", flush=True)
        print("err", file=sys.stderr, flush=True)
        handler.handle(logging.makeLogRecord({"msg": "odd"}))
        sys.stdout.isatty()
        done.append(1)
        return status

    monkeypatch.setattr(sys, "stdout", stream())
    monkeypatch.setattr(sys, "stderr", stream())
    done = []
    for status in (0, 1):
        assert run_command(command) == status
    assert len(done) == 2
    monkeypatch.setattr(sys, "stdout", stream())

    def fails():
        raise ValueError("wrong")

    assert run_command(fails) == 2


@pytest.mark.parametrize(("encoding", "text", "shown"), [
    ("ascii", "für 试", r"f\xfcr \u8bd5"), ("utf-8", "f\udcfcr.wav", r"f\udcfcr.wav"), ("latin-1", "für 试", r"für \u8bd5")])
def test_characters_that_the_terminal_lacks_are_escaped(encoding, text, shown):
    """As in the C locale, and of a file's name that is no UTF-8."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print(text, file=Output(stream), flush=True)
    assert stream.buffer.getvalue().decode(encoding) == shown + "\n"


MANIFEST = ("workflows/full_pipeline.py", "tests/e2e.yaml", "--only", "manifest", "--inline", "tracking=none")
SHORT = "import sys; from audiolm.pipeline.cli import run_command as r\n"
TALKS = SHORT + "def f():\n for i in range(9999): print(i, 'x' * 99)\n return 3\nsys.exit(r(f))"
OPENS = SHORT + ("import os\ndef f():\n a = open(sys.argv[1], 'w'); print('loud', flush=True)\n"
                 " os.write(1, b'C'); os.write(2, b'C')\n"
                 " a.write('mine'); a.close(); return 3\nsys.exit(r(f))")


def shell(line: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-c", line], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **env},
                          capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("tail", ["| head -1", ">&-", ">&- 2>&-", "> /dev/full", "> /dev/full 2>&1", "<&-", "2>&1 | true",
                                  "<&- >&- 2>&-"])
def test_exit_status_is_the_commands(tail, tmp_path):
    """Python itself would end with 120, where its last flush fails."""
    done = shell(f'{sys.executable} -c "$TALKS" {tail}; echo ${{PIPESTATUS[0]}} > {tmp_path}/status', TALKS=TALKS)
    assert Path(tmp_path, "status").read_text() == "3\n"
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    """Else what a C library prints lands in a checkpoint."""
    shell(f'{sys.executable} -c "$OPENS" {tmp_path}/file <&- >&- 2>&-', OPENS=OPENS)
    assert Path(tmp_path, "file").read_text() == "mine"


def test_a_step_is_done_though_nobody_reads_its_progress(tmp_path):
    done = shell(f"{sys.executable} {' '.join(MANIFEST)} store={tmp_path} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == 0 and done.stdout.startswith("audiolm: run") and len(done.stdout.splitlines()) == 1
    assert list(tmp_path.glob("manifest/*/0001/done.json"))
    assert json.loads(next(tmp_path.glob("manifest/*/0001/attempts/0001.json")).read_text())["state"] == "done"


def test_a_command_outlives_its_terminal(tmp_path):
    code = SHORT + ("import time\ndef f():\n print('ready', flush=True); time.sleep(0.5)\n"
                    " for i in range(9): print(i, flush=True)\n"
                    " open(sys.argv[1], 'w').write('done'); return 0\nsys.exit(r(f))")
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-c", code, f"{tmp_path}/file"], {**os.environ, "PYTHONPATH": str(ROOT)})
    assert os.read(terminal, 5) == b"ready"
    os.close(terminal)  # SIGHUP, and EIO for what is printed
    assert os.waitpid(pid, 0)[1] == 0 and Path(tmp_path, "file").read_text() == "done"
