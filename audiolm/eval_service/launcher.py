"""Launchers of evaluation jobs: Ray's job server, or processes of this machine. Both start a job id at most once.

`submit(job, args)` returns False where the id was used before, by whatever watcher; `status(job)` is (alive, the reason
where it is not).  Both raise where the job server does not answer.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from audiolm import store
from audiolm.dag import lease

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "workflows/evaluate.py"
UPLOADED = ("audiolm", "workflows")  # of the checkout; data and outputs beside them would exceed Ray's limit
START_S, POLL_S = 60.0, 0.1  # a process imports torch before it claims its id


class RayJobs:
    """`address`: of Ray's job server, http://HOST:8265. The job's code is this checkout's."""

    def __init__(self, address: str | None):
        from ray.job_submission import JobSubmissionClient

        self._client = JobSubmissionClient(address)

    def submit(self, job: str, args: list[str]) -> bool:
        excluded = [f"/{p.name}" for p in ROOT.iterdir() if p.name not in UPLOADED]
        try:
            self._client.submit_job(entrypoint=shlex.join(["python", SCRIPT, *args]), submission_id=job,
                                    runtime_env={"working_dir": str(ROOT), "excludes": [*excluded, "/workflows/quickstart"]})
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
    """Processes that outlive their watcher; each claims its id by a file in `folder` before it does anything else."""

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
        for _ in range(round(START_S / POLL_S)):
            if store.exists(claim):
                return store.get_json(claim)["pid"] == child.pid
            if child.poll() is not None:
                break
            time.sleep(POLL_S)
        raise RuntimeError(f"the process of {job} did not begin: see {self.folder}/{job}.log")

    def status(self, job: str) -> tuple[bool, str]:
        self._children = [c for c in self._children if c.poll() is None]  # reaps those that ended
        owner, me = store.get_json(self._claim(job)), lease.owner()
        if owner is None:
            return False, f"{self.folder} holds nothing of it"
        rebooted = owner["host"] == me["host"] and owner["boot"] != me["boot"]
        return not (rebooted or lease.is_dead(owner)), f"its process is gone; see {self.folder}/{job}.log"

    def _claim(self, job: str) -> str:
        return f"{self.folder}/{job}.json"


def claim(path: str) -> bool:
    """Claims a job for this process; False where another process has it."""
    try:
        store.put_json(path, {**lease.owner(), "nonce": uuid.uuid4().hex}, exclusive=True)
        return True
    except FileExistsError:
        return False


def open_launcher(inline: bool, address: str | None, folder: str) -> Any:
    """Processes with logs in `folder`, or Ray's job server at `address`. Raises ValueError where there is none."""
    if inline:
        return Processes(folder)
    try:
        return RayJobs(address)
    except (ConnectionError, RuntimeError) as e:
        raise ValueError(f"no Ray job server at {address or 'RAY_API_SERVER_ADDRESS or http://127.0.0.1:8265'} "
                         f"({str(e).splitlines()[0]}): start Ray with `ray start --head`, name it with --ray, check "
                         "RAY_AUTH_MODE, or evaluate in processes of this machine with --inline") from e
