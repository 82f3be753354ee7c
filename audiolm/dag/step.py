"""A thin DAG of steps whose outputs are addressed by recipe (DESIGN 1.1 to 1.4).

A step is a plain function `fn(config, inputs, out) -> facts`; its outputs live at `{store}/{step}/{fingerprint}/{build}/`.
The fingerprint hashes what is computed (step name, the author's `version`, the config's identity, the inputs'
fingerprints), never where or how.  A build is opened for given inputs' builds, or by force; a resumed attempt continues
it.  Facts on disk: recipe.json, BUILD/build.json, BUILD/attempts/NNNN.json, BUILD/done.json (exclusive, last).
Status is derived from these and stored nowhere else.  This module knows nothing of audio, torch, Ray or MLflow.
"""

from __future__ import annotations

import enum
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from audiolm.config.base import identity
from audiolm.dag.lease import LEASE_S, Lease, is_dead, latest, read_attempt
from audiolm.metrics_log import MetricsFile
from audiolm.store import get_json, join, names


class Status(enum.StrEnum):
    MISSING = "missing"
    WAITING = "waiting"  # it will run, its inputs or its turn are not there yet
    RUNNING = "running"
    LOST = "lost"  # started, but its owner died
    FAILED = "failed"
    STALE = "stale"  # done, but an input has a newer build
    DONE = "done"


@dataclass(frozen=True, eq=False)
class Step:
    name: str
    fn: Callable[[dict, dict[str, Artifact], StepContext], dict | None] | str  # a reference is imported when the step runs
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[Step, ...] = ()
    version: int = 1  # raise it when the meaning of fn changes
    trains: Any = False  # where it trains: its config.Train; it takes one of the cluster's training slots

    @property
    def recipe(self) -> dict:
        return {"step": self.name, "version": self.version, "config": identity(dict(self.config)),
                "inputs": {s.name: s.fingerprint for s in self.inputs}}

    @property
    def fingerprint(self) -> str:
        return _digest(self.recipe)

    @property
    def trunk(self) -> str:
        """The fingerprint of what it has in common with runs of another length (DESIGN 1.6)."""
        return _digest({**self.recipe, "config": identity(dict(self.config), trunk=True)})

    def root(self, store: str) -> str:
        return join(store, self.name, self.fingerprint)


def _digest(recipe: dict) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Artifact:
    """A finished step's folder."""

    path: str
    build: str
    facts: dict
    record: dict = field(default_factory=dict)


class Observer(Protocol):
    """What wants to know how steps fare: a terminal, a tracker."""

    def began(self, out: StepContext) -> None: ...
    def progress(self, out: StepContext, done: float, total: float, unit: str, note: str) -> None: ...
    def ended(self, out: StepContext, status: str, facts: dict, error: str | None) -> str | None: ...


class StepContext:
    """A running step's folder: its lease, its metrics, its progress, whether the user forced it; `kin` are the other builds
    of its trunk."""

    def __init__(self, step: Step, path: str, lease: Lease, observer: Observer | None, inline: bool, forced: bool,
                 kin: list[str]):
        self.step, self.path, self.lease, self.inline, self.forced, self.kin = step, path, lease, inline, forced, kin
        self.attempt = lease.attempt
        self.metrics_path = join(path, f"metrics-{self.attempt:04d}.jsonl")
        self._observer, self._metrics = observer, None

    def check(self) -> None:
        """Call from long loops: raises LeaseLost when another worker owns the build now."""
        self.lease.check()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._metrics is None:
            self._metrics = MetricsFile(self.metrics_path)
        self._metrics.add(step, metrics)

    def flush(self) -> None:
        if self._metrics is not None:
            self._metrics.flush()

    def progress(self, done: float, total: float, unit: str, note: str = "") -> None:
        self.check()
        if self._observer:
            self._observer.progress(self, done, total, unit, note)


@dataclass(frozen=True)
class StepState:
    """What the store says of a step: status, the newest finished build and the build that would be continued."""

    status: Status
    artifact: Artifact | None
    build: int | None  # the newest build for these inputs
    newest: int  # the newest build of all
    note: str = ""


def inspect(step: Step, store: str, inputs: Mapping[str, str | None]) -> StepState:
    """Reads a step's state, given its inputs' build ids (None where an input is not built); writes nothing."""
    root = step.root(store)
    numbers = [int(n) for n in names(root) if n.isdigit()]
    records = {n: get_json(join(root, f"{n:04d}", "build.json")) for n in numbers}
    done = {n: get_json(join(root, f"{n:04d}", "done.json")) for n in numbers}
    finished = [n for n in numbers if done[n]]
    artifact = None
    if finished:
        n = finished[-1]
        artifact = Artifact(join(root, f"{n:04d}"), f"{step.fingerprint}.{n:04d}", done[n]["facts"], done[n])
    newest = max((n for n in numbers if records[n]), default=0)  # a folder without its record is only being opened
    match = [n for n in numbers if records[n] and records[n]["inputs"] == dict(inputs)]
    if match and done[match[-1]]:
        return StepState(Status.DONE, artifact, match[-1], newest, f"built in {done[match[-1]]['seconds']:.0f} s")
    if match:
        path = join(root, f"{match[-1]:04d}")
        attempt = read_attempt(path, latest(path))
        if attempt is None:
            return StepState(Status.LOST, artifact, match[-1], newest, "opened, not begun")
        if attempt["state"] in ("failed", "stopped"):
            last = (attempt.get("error") or "stopped").strip().splitlines()[-1]
            return StepState(Status.FAILED, artifact, match[-1], newest, last[:200])
        lost = is_dead(attempt) or time.time() - attempt["time"] > LEASE_S
        return StepState(Status.LOST if lost else Status.RUNNING, artifact, match[-1], newest,
                    f"attempt {latest(path)} on {attempt['host']}" + (", its owner died" if lost else ""))
    if finished:
        changed = [k for k, v in inputs.items() if artifact.record["inputs"].get(k) != v]
        return StepState(Status.STALE, artifact, None, newest, f"newer build of {', '.join(changed)}")
    return StepState(Status.MISSING, artifact, None, newest)


def trunk_siblings(step: Step, store: str, inputs: Mapping[str, str | None], build: str | None,
        force: bool = False) -> tuple[dict, list[str]]:
    """The trunk of a build (one to be opened where `build` is None) and the other builds that stand on it.

    Such builds have the same inputs and differ in their training's length alone.  Forcing starts a new trunk, so that
    nothing old is continued.
    """
    found = {}
    for recipe in names(join(store, step.name)):
        for n in names(join(store, step.name, recipe)):
            path = join(store, step.name, recipe, n)
            record = get_json(join(path, "build.json")) if n.isdigit() else None
            if record and record["inputs"] == dict(inputs) and record.get("trunk", {}).get("recipe") == step.trunk:
                found[path] = record["trunk"]
    if build is None:
        own = {"recipe": step.trunk, "forced": max((t["forced"] for t in found.values()), default=0) + force}
    else:
        own = found.get(build, {})
    return own, [path for path, trunk in found.items() if trunk == own and path != build]
