"""One Ray cluster and one whole run of the tiny pipeline, submitted as a user would; fixtures of the end-to-end tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import psutil
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
    started = [psutil.Process(int(p.name)) for p in Path("/proc").iterdir() if p.name.isdigit() and _mentions(p, str(temp))]
    address, deadline = f"http://127.0.0.1:{dashboard}", time.monotonic() + 120
    while not _listens(agent[0]) and time.monotonic() < deadline:  # who takes jobs comes up last
        time.sleep(0.2)
    yield address
    for end in (psutil.Process.terminate, psutil.Process.kill):  # some stay on SIGTERM
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)
        started = psutil.wait_procs(started, timeout=3)[1]
    shutil.rmtree(temp, ignore_errors=True)


def _mentions(process: Path, text: str) -> bool:
    try:
        return text in process.joinpath("cmdline").read_text(errors="replace")
    except OSError:
        return False


def _listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def submit(head, folder, *command):
    """Submits a script as a user would."""
    return subprocess.run([f"{BIN}/ray", "job", "submit", "--address", head, "--working-dir", str(folder), "--",
                           sys.executable, *command], env=ENV, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A copy of the project, as a user would submit it."""
    folder = tmp_path_factory.mktemp("checkout") / "audiolm"
    folder.mkdir()
    for name in ("audiolm", "workflows", "pyproject.toml", *(f"tests/{n}" for n in (
            "e2e.yaml", "__init__.py", *(f"worlds/{m}.py" for m in ("__init__", "basics", "training", "dying_worker"))))):
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
