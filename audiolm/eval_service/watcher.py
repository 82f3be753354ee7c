"""The service behind `evaluate=requested`: polls MLflow for requests, starts a job for each, and finds lost jobs.

It keeps no state that counts: killed at any moment and started again, or running twice, it starts no job a second time
and forgets none (request.py).  A job is submitted first, then its tag is set.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from audiolm.eval_service.request import (
    FAILED,
    JOB,
    REQUESTED,
    RUNNING,
    SUBMITTED,
    Request,
    end_request,
    in_state,
    mark_submitted,
    read_request,
    runs_of,
    settle,
)
from audiolm.tracking.outbox import first_line
from audiolm.tracking.registry import alone
from audiolm.tracking.target import refusal

RETRY_S, RETRY_MOST_S = 10.0, 300.0  # before a job that cannot be submitted is tried again; doubled each time


@dataclass
class Watcher:
    """`launcher` as in launcher.py; `extra`: further arguments of each job; `check` raises ValueError for suites that
    are unknown, or do not answer for a checkpoint of this kind.

    What MLflow's tags name must lie in `store` (tracking/lookup.py).
    """

    client: Any
    store: str
    launcher: Any
    extra: list[str]
    parallel: int  # jobs at a time
    say: Callable[[str], None]
    check: Callable[[list[str], str | None], Any]
    _aside: dict[str, tuple[float, float]] = field(default_factory=dict)  # job -> (when it is tried again, the pause before)

    def watch(self, every_s: float, wake: threading.Event) -> None:
        """Sweeps for ever, every `every_s` seconds and whenever `wake` is set. An MLflow or Ray that is down delays."""
        trouble = ""
        while True:
            wake.clear()  # before the sweep: a bell during it starts another
            try:
                self.sweep()
                if trouble:
                    self.say("it answers again")
                trouble = ""
            except Exception as e:  # noqa: BLE001  whatever a server raised: it is asked again
                if first_line(e) != trouble:
                    self.say(f"waiting: {first_line(e)}")
                trouble = first_line(e)
            wake.wait(every_s)

    def sweep(self) -> None:
        """Goes through all requests once: first those at work, which take up `parallel`, then the new ones."""
        busy = 0
        for state in (SUBMITTED, RUNNING):
            for request in in_state(self.client, state):
                busy += self._is_alive(request)
        for request in in_state(self.client, REQUESTED):
            if problem := self._problem(request):
                end_request(self.client, request, FAILED, problem)
                self.say(f"{request.uri}: refused: {problem}")
            elif busy < self.parallel and self._aside.get(request.job, (0.0, 0.0))[0] <= time.monotonic():
                busy += self._submit(request)  # the others wait as they are

    def _is_alive(self, request: Request) -> bool:
        """True while its job runs; a lost job ends its request."""
        if settle(self.client, request):
            return False
        if JOB not in request.tags:
            return False  # somebody typed the state by hand
        alive, reason = self.launcher.status(request.job)
        if alive:
            return True
        now = read_request(self.client, request.name, request.version)  # it may have ended in between
        if now.number == request.number and now.state in (SUBMITTED, RUNNING, REQUESTED):
            self._end_lost(now, reason)
        return False

    def _problem(self, request: Request) -> str | None:
        """The reason why a request cannot be carried out."""
        try:
            self.check(request.suites, alone(request.tags.get("audiolm.step", "")))
        except ValueError as e:
            return f"evaluate.suites: {e}"
        return refusal(request.tags, self.store, self.client.tracking_uri)

    def _submit(self, request: Request) -> bool:
        """Starts the request's job; True where it runs now, whoever started it. One that cannot be started is set aside."""
        suites = ["--suites", ",".join(request.suites)] if request.suites else []
        try:
            is_new = self.launcher.submit(request.job, [request.uri, "--answer", str(request.number), *suites, *self.extra])
        except Exception as e:  # noqa: BLE001  whatever a process or server raised: the other requests go on
            pause_s = min(RETRY_MOST_S, 2 * self._aside.get(request.job, (0.0, RETRY_S / 2))[1])
            self._aside[request.job] = time.monotonic() + pause_s, pause_s
            self.say(f"{request.uri}: {request.job} cannot be submitted, again in {pause_s:g} s: {first_line(e)}")
            return False
        self._aside.pop(request.job, None)
        if is_new:
            self.say(f"{request.uri}: submitted as {request.job}")
        else:  # submitted before its tag was set, or requested again while it runs
            alive, reason = self.launcher.status(request.job)
            if not alive:
                now = read_request(self.client, request.name, request.version)
                if now.number == request.number:
                    self._end_lost(now, reason)
                return False
            self.say(f"{request.uri}: {request.job} is at work already")
        mark_submitted(self.client, request)
        return True

    def _end_lost(self, request: Request, reason: str) -> None:
        """Ends a request whose job is gone, and the MLflow run that the job left open."""
        reason = f"{request.job} was lost: {reason}"
        end_request(self.client, request, FAILED, reason)
        for run in runs_of(self.client, request):
            if run.info.status == "RUNNING":
                self.client.set_terminated(run.info.run_id, "KILLED")
        self.say(f"{request.uri}: {reason}")
