"""A node of a Ray cluster on this machine, as `ray start` starts it: the head, or one that joins; closed by a token."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.worlds.basics import ROOT, free_port
from tests.worlds.servers import START_S
from tests.worlds.whole_run import BIN, ENV

RAYS_OWN = ("IDLE", "DashboardAgent", "RuntimeEnvAgent", "JobSupervisor", "_AutoscalingCoordinatorActor", "TrainController",
            "StatsActor")  # titles that are no task of a step


def environment(**more: str) -> dict[str, str]:
    """For nodes and for those who join them: the token, the environment's S3 keys, one thread a process."""
    env = {**ENV, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    del env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]  # which allows no second node
    return env | {k: v for k, v in os.environ.items() if k.startswith("AWS_")} | more


def until(ready: Callable[[], Any], what: str, seconds: float = START_S) -> Any:
    """The first true value of `ready()`. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.25)
    return found


def listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def title(process: psutil.Process) -> str:
    """What Ray calls one of its processes; empty where it has ended."""
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


def is_rank(name: str) -> bool:
    return name.startswith("ray::") and "TrainWorker" in name


def is_task(name: str) -> bool:
    return name.startswith("ray::") and not is_rank(name) and not any(own in name for own in RAYS_OWN)


class Node:
    """A node with so many CPUs, with its log in `folder`; it joins the head at `address`, or is a head itself.

    Each has its own temporary folder: in a shared one a node would replace the working folder of the other's job.
    """

    def __init__(self, folder: Path, name: str, env: dict[str, str], cpus: int, address: str | None = None):
        agent, dashboard, port = free_port(), free_port(), free_port()
        self.address, self.dashboard = address or f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        role = [f"--address={address}"] if address else ["--head", f"--port={port}", f"--dashboard-port={dashboard}"]
        command = [f"{BIN}/ray", "start", *role, f"--temp-dir={folder / name}", "--block", f"--num-cpus={cpus}",
                   f"--resources={{\"{name}\": 1}}", "--object-store-memory=200000000", "--disable-usage-stats",
                   f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={free_port()}",
                   f"--metrics-export-port={free_port()}"]
        self.process, log = None, folder / f"{name}.log"

        def up() -> bool:
            """Ray gives up where a busy machine takes more than 30 s for it: then once more."""
            if self.process is None or self.process.poll() is not None:
                with log.open("wb") as out:
                    self.process = psutil.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
            return listens(agent) and "Ray runtime started" in log.read_text(errors="replace")

        until(up, f"node {name}", 2 * START_S)

    def processes(self) -> list[psutil.Process]:
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def tasks(self) -> list[str]:
        """Names of the tasks that run now."""
        return [t.removeprefix("ray::") for t in map(title, self.processes()) if is_task(t)]

    def kill(self) -> None:
        """All processes at once, as when a machine fails."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
