"""Runs under a private Ray that are stopped or killed: the status, what is said, and that nothing of that Ray stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.worlds.basics import ROOT

GONE_S = 60.0  # some seconds, on a busy machine


def start(store) -> subprocess.Popen:
    """A run that is in its first step."""
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [sys.executable, "workflows/full_pipeline.py", "tests/e2e.yaml", f"store={store}", "tracking=none", "--only",
               "manifest"]
    process = subprocess.Popen(command, cwd=ROOT, env={**env, "PYTHONPATH": str(ROOT)}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                               preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))  # a shell's `&` has it ignored
    lines = []
    while not lines or "manifest: started" not in lines[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    return process


@pytest.mark.parametrize(("first", "second", "status"), [
    (signal.SIGTERM, None, 143), (signal.SIGINT, signal.SIGINT, 130), (signal.SIGKILL, None, -9)],
    ids=["SIGTERM", "Ctrl-C twice", "SIGKILL"])
def test_a_run_that_is_stopped_says_so_and_leaves_no_process(tmp_path, first, second, status):
    process = start(tmp_path)
    rays = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in p.name() for p in rays)
    process.send_signal(first)
    said = "" if first == signal.SIGKILL else process.stdout.readline()
    if second:
        process.send_signal(second)  # while it stops Ray
    said += process.communicate(timeout=GONE_S)[0]
    assert process.returncode == status and "FAILED" not in said and "Traceback" not in said, said
    _, left = psutil.wait_procs(rays, timeout=GONE_S)
    assert not left
    if first != signal.SIGKILL:
        assert "stopped; the same command continues" in said
        assert len(list(Path("/tmp/ray").glob(f"session_*_{process.pid}"))) == 1  # no thread has started another Ray
    if first == signal.SIGTERM:
        assert "manifest         STOPPED" in said
        assert [json.loads(p.read_text())["state"] for p in tmp_path.glob("manifest/*/0001/attempts/*.json")] == ["stopped"]
