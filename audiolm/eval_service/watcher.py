"""The service that answers `evaluate=requested`: finds requests by polling MLflow, starts a job for each, finds lost ones.

It keeps nothing in memory that matters: killed at any moment and started again, or running twice, it starts no job a second
time and forgets none (states.py).  A job is submitted first, then its tag is set.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from audiolm.eval_service import request
from audiolm.eval_service.request import FAILED, REQUESTED, RUNNING, SUBMITTED, Request
from audiolm.tracking.outbox import first_line
from audiolm.tracking.target import refusal


def watch(client: Any, launcher: Any, extra: list[str], *, every_s: float, parallel: int, wake: threading.Event,
          say: Callable[[str], None], check: Callable[[list[str]], Any]) -> None:
    """Sweeps for ever, every `every_s` seconds and whenever `wake` is set. An MLflow or Ray that is down delays."""
    trouble = ""
    while True:
        wake.clear()
        try:
            sweep(client, launcher, extra, parallel=parallel, say=say, check=check)
            if trouble:
                say("it answers again")
            trouble = ""
        except Exception as e:  # noqa: BLE001  whatever a server raised: it is asked again
            if first_line(e) != trouble:
                say(f"waiting: {first_line(e)}")
            trouble = first_line(e)
        wake.wait(every_s)


def sweep(client: Any, launcher: Any, extra: list[str], *, parallel: int, say: Callable[[str], None],
          check: Callable[[list[str]], Any]) -> None:
    """One look at all requests. `extra`: further arguments of a job; `check` raises ValueError for suites that are none."""
    busy = 0
    for state in (SUBMITTED, RUNNING):
        for asked in request.in_state(client, state):
            busy += _look(client, launcher, asked, say)
    for asked in request.in_state(client, REQUESTED):
        if problem := _problem(asked, check):
            request.end(client, asked, FAILED, problem)
            say(f"{asked.uri}: refused: {problem}")
        elif busy < parallel:  # the others wait as they are
            busy += _accept(client, launcher, extra, asked, say)


def _look(client: Any, launcher: Any, asked: Request, say: Callable[[str], None]) -> bool:
    """True while its job is alive."""
    if request.settle(client, asked):
        return False
    if request.JOB not in asked.tags:
        return False  # somebody typed the state by hand
    alive, known = launcher.status(asked.job)
    if alive:
        return True
    now = request.read(client, asked.name, asked.version)  # it may have ended between
    if now.number == asked.number and now.state in (SUBMITTED, RUNNING, REQUESTED):
        _lost(client, now, known, say)
    return False


def _problem(asked: Request, check: Callable[[list[str]], Any]) -> str | None:
    try:
        check(asked.suites)
    except ValueError as e:
        return f"evaluate.suites: {e}"
    return refusal(asked.tags)


def _accept(client: Any, launcher: Any, extra: list[str], asked: Request, say: Callable[[str], None]) -> bool:
    """True if its job was started, or is at work already."""
    suites = ["--suites", ",".join(asked.suites)] if asked.suites else []
    if launcher.submit(asked.job, [asked.uri, "--answer", str(asked.number), *suites, *extra]):
        say(f"{asked.uri}: submitted as {asked.job}")
    else:  # submitted before its tag was set, or asked for again while it runs
        alive, known = launcher.status(asked.job)
        if not alive:
            now = request.read(client, asked.name, asked.version)
            if now.number == asked.number:
                _lost(client, now, known, say)
            return False
        say(f"{asked.uri}: {asked.job} is at work already")
    request.submitted(client, asked)
    return True


def _lost(client: Any, asked: Request, known: str, say: Callable[[str], None]) -> None:
    request.end(client, asked, FAILED, f"{asked.job} was lost: {known}")
    for run in request.runs_of(client, asked):
        if run.info.status == "RUNNING":
            client.set_terminated(run.info.run_id, "KILLED")
    say(f"{asked.uri}: {asked.job} was lost: {known}")
