"""How an evaluation's job is started and found again: as a Ray job, or as a process of this machine.

`submit` returns False where the id was used before, whoever did it; `status` is (alive, what is known). Both raise where
nobody can be asked.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from audiolm import store
from audiolm.dag import lease

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "workflows/evaluate.py"
UPLOADED = ("audiolm", "workflows")


class RayJobs:
    """`address`: of Ray's job server, http://HOST:8265. The job's code is this checkout's."""

    def __init__(self, address: str | None):
        from ray.job_submission import JobSubmissionClient

        self._client = JobSubmissionClient(address)

    def submit(self, job: str, args: list[str]) -> bool:
        beside = [f"/{p.name}" for p in ROOT.iterdir() if p.name not in UPLOADED]
        try:
            self._client.submit_job(entrypoint=shlex.join(["python", SCRIPT, *args]), submission_id=job,
                                    runtime_env={"working_dir": str(ROOT), "excludes": [*beside, "/workflows/quickstart"]})
            return True
        except RuntimeError:
            if self._known(job):
                return False
            raise

    def status(self, job: str) -> tuple[bool, str]:
        if not self._known(job):
            return False, "Ray's job server does not know it (it was started anew)"
        info = self._client.get_job_info(job)
        lines = (info.message or "").strip().splitlines()
        return not info.status.is_terminal(), f"Ray says {info.status}{': ' + lines[-1] if lines else ''}"

    def _known(self, job: str) -> bool:
        return any(found.submission_id == job for found in self._client.list_jobs())


class Processes:
    """Processes that outlive their watcher; each claims its id by a file in `folder` before it does anything."""

    def __init__(self, folder: str):
        self.folder, self._children = os.path.abspath(folder), []

    def submit(self, job: str, args: list[str]) -> bool:
        claim = self._claim(job)
        if store.exists(claim):
            return False
        os.makedirs(self.folder, exist_ok=True)
        with open(f"{self.folder}/{job}.log", "ab") as log:
            child = subprocess.Popen([sys.executable, str(ROOT / SCRIPT), *args, "--claim", claim], stdin=subprocess.DEVNULL,
                                     stdout=log, stderr=log, start_new_session=True)
        self._children.append(child)
        for _ in range(600):
            if store.exists(claim):
                return store.get_json(claim)["pid"] == child.pid
            if child.poll() is not None:
                break
            time.sleep(0.1)
        raise RuntimeError(f"the process of {job} did not begin: see {self.folder}/{job}.log")

    def status(self, job: str) -> tuple[bool, str]:
        self._children = [c for c in self._children if c.poll() is None]  # reaps those that ended
        claim = store.get_json(self._claim(job))
        if claim is None:
            return False, f"{self.folder} holds nothing of it"
        rebooted = claim["host"] == lease.owner()["host"] and claim["boot"] != lease.owner()["boot"]
        return not (rebooted or lease.is_dead(claim)), f"its process is gone; see {self.folder}/{job}.log"

    def _claim(self, job: str) -> str:
        return f"{self.folder}/{job}.json"


def claim(path: str) -> bool:
    """By a process that was started for a job: False where another one has it."""
    try:
        store.put_json(path, lease.owner(), exclusive=True)
        return True
    except FileExistsError:
        return False


def open_launcher(inline: bool, address: str | None, folder: str) -> Any:
    """Raises ValueError where there is no job server."""
    if inline:
        return Processes(folder)
    try:
        return RayJobs(address)
    except (ConnectionError, RuntimeError) as e:
        raise ValueError(f"no Ray job server at {address or 'RAY_API_SERVER_ADDRESS or http://127.0.0.1:8265'} "
                         f"({str(e).splitlines()[0]}): start Ray with `ray start --head`, name it with --ray, check "
                         "RAY_AUTH_MODE, or evaluate in processes of this machine with --inline") from e
