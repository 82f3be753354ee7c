"""One Ray cluster and one whole run of the tiny pipeline, submitted as a user would; fixtures of the end-to-end tests."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import pytest

from tests.worlds.basics import ROOT, free_port
from tests.worlds.servers import CLOSED

STEPS = ["manifest", "masked_model", "kmeans", "codec", "codec_figures", "semantic_tokens", "semantic_figures",
         "acoustic_tokens", "lm_semantic", "lm_coarse", "lm_fine", "samples", "evaluate", "tables", "report"]
PIPELINE = ("workflows/full_pipeline.py", "tests/e2e.yaml")
BIN = sysconfig.get_path("scripts")
ENV = {**os.environ, **CLOSED, "PYTHONPATH": "", "PATH": BIN + os.pathsep + os.environ["PATH"]}


@pytest.fixture(scope="session")
def head():
    """`ray start --head` with token authentication; yields the dashboard's address."""
    port, dashboard, *agent = (free_port() for _ in range(5))  # another Ray on this machine may hold the usual ports
    temp = tempfile.mkdtemp(prefix="r")  # short: the paths of Ray's sockets must stay below 108 characters
    subprocess.run([f"{BIN}/ray", "start", "--head", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2",
                    f"--temp-dir={temp}", "--disable-usage-stats", f"--dashboard-agent-listen-port={agent[0]}",
                    f"--dashboard-agent-grpc-port={agent[1]}", f"--metrics-export-port={agent[2]}"],
                   env=ENV, check=True, capture_output=True, timeout=120)
    pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _mentions(p, str(temp))]
    address, deadline = f"http://127.0.0.1:{dashboard}", time.monotonic() + 120
    while "No available agent to submit job" in str(_submitted(address, "--", "true")) and time.monotonic() < deadline:
        time.sleep(2.0)  # it has just started
    yield address
    for pid in pids:  # only what this fixture started
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            pass
    shutil.rmtree(temp, ignore_errors=True)


def _mentions(process: Path, text: str) -> bool:
    try:
        return text in process.joinpath("cmdline").read_text(errors="replace")
    except OSError:
        return False


def submit(head, folder, *command):
    """Submits a script as a user would."""
    return _submitted(head, "--working-dir", str(folder), "--", sys.executable, *command)


def _submitted(head, *arguments):
    return subprocess.run([f"{BIN}/ray", "job", "submit", "--address", head, *arguments], env=ENV, capture_output=True,
                          text=True, timeout=500)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A copy of the project, as a user would submit it."""
    folder = tmp_path_factory.mktemp("checkout") / "audiolm"
    folder.mkdir()
    for name in ("audiolm", "workflows", "pyproject.toml", *(f"tests/{n}" for n in (
            "e2e.yaml", "__init__.py", "worlds/__init__.py", "worlds/training.py", "worlds/dying_worker.py"))):
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    return folder


@pytest.fixture(scope="session")
def job(head, checkout, tmp_path_factory):
    """The one whole run: submitted as a Ray job with an absolute store."""
    store = str(tmp_path_factory.mktemp("job") / "store")
    done = submit(head, checkout, *PIPELINE, f"store={store}")
    assert done.returncode == 0 and f"all {len(STEPS)} steps done" in done.stdout, done.stdout[-6000:] + done.stderr[-3000:]
    return store
