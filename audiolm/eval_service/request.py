"""Requests for an evaluation as a model version's tags: requested -> submitted -> running -> done or failed.

A person sets `evaluate=requested` (and `evaluate.suites`).  `evaluate.ended` = "N done" or "N failed" names the last
request that ended, so the next is N + 1.  Its job id is eval-MODEL-VERSION-(N + 1), whoever submits it: Ray takes an id
once, so no request is worked on twice.  A job's end writes `evaluate.ended` first, then `evaluate`; `settle` completes
an end that was interrupted between the two.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from audiolm.store import hide_credentials
from audiolm.tracking.registry import search

REQUESTED, SUBMITTED, RUNNING, DONE, FAILED = "requested", "submitted", "running", "done", "failed"
STATE, SUITES, JOB, ENDED, REASON, RESULT = ("evaluate", "evaluate.suites", "evaluate.job", "evaluate.ended", "evaluate.reason",
                                             "evaluate.run")
REASON_CHARS = 1000  # of a tag: the UI shows it on one line


@dataclass(frozen=True)
class Request:
    """A model version as the last look at its tags saw it."""

    name: str  # of the registered model
    version: str
    tags: dict[str, str]

    @property
    def state(self) -> str:
        return self.tags.get(STATE, "")

    @property
    def ended(self) -> int:
        """The number of the last request that ended; 0 where none did, or the tag was typed by hand and has no number."""
        found = re.match(r"(\d{1,9}) (done|failed)$", self.tags.get(ENDED, ""))
        return int(found[1]) if found else 0

    @property
    def number(self) -> int:
        """The number of the request at work, or of the next one."""
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
    """A job id that is safe in a path, a URL and a shell; two model names never share one."""
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    if safe != name:
        safe += "." + hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"eval-{safe}-{version}-{number}"


def _of_version(v: Any) -> Request:
    return Request(v.name, str(v.version), dict(v.tags))


def read_request(client: Any, name: str, version: str) -> Request:
    return _of_version(client.get_model_version(name, version))


def in_state(client: Any, state: str) -> list[Request]:
    """All requests in a state, oldest change first."""
    found = search(client, f"tags.`{STATE}` = '{state}'")
    return [_of_version(v) for v in sorted(found, key=lambda v: v.last_updated_timestamp or 0)]


def mark_submitted(client: Any, request: Request) -> None:
    """Called after the job was submitted, or found at work. A state that the job itself wrote since then stays."""
    now = read_request(client, request.name, request.version)
    if now.number == request.number and now.state == REQUESTED:
        _set(client, request, JOB, request.job)
        _set(client, request, STATE, RUNNING if request.tags.get(JOB) == request.job else SUBMITTED)


def mark_running(client: Any, request: Request) -> None:
    """Called by the job when it begins."""
    _set(client, request, JOB, request.job)
    _set(client, request, REASON, "")
    _set(client, request, STATE, RUNNING)


def end_request(client: Any, request: Request, state: str, reason: str = "") -> None:
    """Ends a request, done or failed; changes nothing where it has ended already."""
    if read_request(client, request.name, request.version).number != request.number:
        return
    _set(client, request, JOB, request.job)
    _set(client, request, REASON, hide_credentials(reason)[:REASON_CHARS])
    _set(client, request, ENDED, f"{request.number} {state}")  # from here on the request has ended, see settle
    _set(client, request, STATE, state)


def runs_of(client: Any, request: Request) -> list:
    """The MLflow runs of a request's job: none or one, in the experiment of the run that made the version."""
    experiment = client.get_run(client.get_model_version(request.name, request.version).run_id).info.experiment_id
    return list(client.search_runs([experiment], f"tags.`audiolm.evaluation` = '{request.job}'"))


def settle(client: Any, request: Request) -> bool:
    """Completes an end that was interrupted; True where there was one. `request` is submitted or running."""
    if request.tags.get(JOB) != job_id(request.name, request.version, request.ended):
        return False
    _set(client, request, STATE, request.tags[ENDED].split(" ")[1])
    return True


def _set(client: Any, request: Request, key: str, value: str) -> None:
    client.set_model_version_tag(request.name, request.version, key, value)
