"""Requests in the model registry, as the UI makes them: one sweep of the watcher, and waits for an answer."""

from __future__ import annotations

import time

from audiolm.eval.suites.run import check_names
from audiolm.eval_service.watcher import Watcher

NAME = "tiny-lm_semantic"


def look(client, launcher, parallel=9) -> list[str]:
    """`client`: of an SQLite database, which lies in the store."""
    said = []
    watcher_of(client, launcher, said, parallel).sweep()
    return said


def watcher_of(client, launcher, said, parallel=9) -> Watcher:
    return Watcher(client, "outputs", launcher, ["--tracking", client.tracking_uri], parallel, said.append, check_names)


def tags(client, version) -> dict[str, str]:
    return dict(client.get_model_version(NAME, version).tags)


def until(client, version, *wanted, seconds=480.0, log=lambda: "") -> dict[str, str]:
    return until_of(client, NAME, version, *wanted, seconds=seconds, log=log)


def until_of(client, name, version, *wanted, seconds=480.0, log=lambda: "") -> dict[str, str]:
    """The version's tags once `evaluate` is one of `wanted`; `log`: what a job that never gets there has printed."""
    deadline = time.monotonic() + seconds  # below pytest's own limit: a busy machine takes many times as long as a free one
    while (found := dict(client.get_model_version(name, version).tags))["evaluate"] not in wanted:
        assert time.monotonic() < deadline, f"{found}\n{log()}"
        time.sleep(0.1)
    return found
