"""Where a request for an evaluation stands, in a model version's tags: requested -> submitted -> running -> done or failed.

A person sets `evaluate=requested` (and `evaluate.suites`).  `evaluate.ended` = "N done" or "N failed" is the last request that
ended, so the next is N + 1 and has the job id eval-MODEL-VERSION-(N + 1), whoever submits it and how often: Ray takes an id
once.  A job's end is `evaluate.ended` first, then `evaluate`; who comes between finishes it (`settle`).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from audiolm.store import hide_credentials

REQUESTED, SUBMITTED, RUNNING, DONE, FAILED = "requested", "submitted", "running", "done", "failed"
STATE, SUITES, JOB, ENDED, REASON, RESULT = ("evaluate", "evaluate.suites", "evaluate.job", "evaluate.ended", "evaluate.reason",
                                             "evaluate.run")
REASON_CHARS = 1000


@dataclass(frozen=True)
class Request:
    name: str
    version: str
    tags: dict[str, str]
    description: str

    @property
    def state(self) -> str:
        return self.tags.get(STATE, "")

    @property
    def ended(self) -> int:
        """The number of the last request that ended; 0 where none did, or somebody wrote nonsense."""
        found = re.match(r"(\d{1,9}) (done|failed)$", self.tags.get(ENDED, ""))
        return int(found[1]) if found else 0

    @property
    def number(self) -> int:
        """Of the request that is, or would be, worked on."""
        return self.ended + 1

    @property
    def job(self) -> str:
        return job_id(self.name, self.version, self.number)

    @property
    def suites(self) -> list[str]:
        return [s.strip() for s in self.tags.get(SUITES, "").split(",") if s.strip()]

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"


def job_id(name: str, version: str, number: int) -> str:
    """Safe in a path, a URL and a shell; two names never share one."""
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    if safe != name:
        safe += "." + hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"eval-{safe}-{version}-{number}"


def of_version(v: Any) -> Request:
    return Request(v.name, str(v.version), dict(v.tags), v.description or "")


def read(client: Any, name: str, version: str) -> Request:
    return of_version(client.get_model_version(name, version))


def in_state(client: Any, state: str) -> list[Request]:
    """All versions whose request stands so, oldest change first."""
    from audiolm.tracking.registry import search

    found = search(client, f"tags.`{STATE}` = '{state}'")
    return [of_version(v) for v in sorted(found, key=lambda v: v.last_updated_timestamp or 0)]


def submitted(client: Any, asked: Request) -> None:
    """After its job was submitted, or found at work: unless the job itself has already said more."""
    now = read(client, asked.name, asked.version)
    if now.number == asked.number and now.state == REQUESTED:
        _set(client, asked, JOB, asked.job)
        _set(client, asked, STATE, RUNNING if asked.tags.get(JOB) == asked.job else SUBMITTED)


def running(client: Any, asked: Request) -> None:
    """By the job, when it begins."""
    _set(client, asked, JOB, asked.job)
    _set(client, asked, REASON, "")
    _set(client, asked, STATE, RUNNING)


def end(client: Any, asked: Request, state: str, reason: str = "") -> None:
    """The end of a request, done or failed; nothing if it has ended."""
    if read(client, asked.name, asked.version).number != asked.number:
        return
    _set(client, asked, JOB, asked.job)
    _set(client, asked, REASON, hide_credentials(reason)[:REASON_CHARS])
    _set(client, asked, ENDED, f"{asked.number} {state}")
    _set(client, asked, STATE, state)


def runs_of(client: Any, asked: Request) -> list:
    """The MLflow runs of its job: none or one, in the experiment of the run that made the version."""
    experiment = client.get_run(client.get_model_version(asked.name, asked.version).run_id).info.experiment_id
    return list(client.search_runs([experiment], f"tags.`audiolm.evaluation` = '{asked.job}'"))


def settle(client: Any, asked: Request) -> bool:
    """Completes an end that was interrupted; True where there was one. `asked` is submitted or running."""
    if asked.tags.get(JOB) != job_id(asked.name, asked.version, asked.ended):
        return False
    _set(client, asked, STATE, asked.tags[ENDED].split(" ")[1])
    return True


def _set(client: Any, asked: Request, key: str, value: str) -> None:
    client.set_model_version_tag(asked.name, asked.version, key, value)
