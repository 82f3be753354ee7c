"""A step, its identity, and what the store knows of it.

A step is a plain function `fn(config, inputs, out) -> facts`; its outputs live at
`{store}/{step}/{fingerprint}/{build}/{attempt}/`, of the attempt that done.json names (dag/outputs.py).  The fingerprint
hashes what is computed (step name, the author's `version`, the config's identity, the inputs' fingerprints), never where or
how.  A build is opened for its inputs' builds, or by force; a resumed attempt continues it.  Facts on disk: recipe.json,
BUILD/build.json, BUILD/attempts/NNNN.json, and last BUILD/done.json (exclusive).  The status is derived from these files and
stored nowhere else.
"""

from __future__ import annotations

import enum
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from audiolm.config.base import identity
from audiolm.dag.lease import LEASE_S, Lease, is_dead, latest, read_attempt
from audiolm.dag.outputs import build_of, path_of
from audiolm.dag.stored_builds import REMOVED
from audiolm.metrics_log import MetricsFile
from audiolm.store import at_once, exists, files, get_json, join, names


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
    """A node of the graph: a function, its config and the steps whose artifacts it reads."""

    name: str
    fn: Callable[[dict, dict[str, Artifact], StepContext], dict | None] | str  # or "module:function"
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[Step, ...] = ()
    version: int = 1  # raise it when the meaning of fn changes
    trains: Any = False  # a training step: its TrainConfig; it takes one of the cluster's training slots
    part: str = ""  # prefix of outputs that fn makes one by one, so that a lost one alone is made again
    after: tuple[Step, ...] = ()  # order alone, as behind a gate: waits for these where the same run builds them

    @property
    def recipe(self) -> dict:
        return {"step": self.name, "version": self.version, "config": identity(dict(self.config)),
                "inputs": {s.name: s.fingerprint for s in self.inputs}}

    @property
    def fingerprint(self) -> str:
        return _digest(self.recipe)

    @property
    def trunk(self) -> str:
        """The fingerprint of what the step shares with trainings of another length."""
        return _digest({**self.recipe, "config": identity(dict(self.config), trunk=True)})

    def root(self, store: str) -> str:
        return join(store, self.name, self.fingerprint)


def _digest(recipe: dict) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Artifact:
    """A finished step's outputs: the folder of the attempt that was published."""

    path: str
    build: str  # FINGERPRINT.BUILD
    facts: dict
    record: dict = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The build's folder, with commits and metrics."""
        return build_of(self.path)


class Observer(Protocol):
    """A listener to the steps of a run, such as a terminal or a tracker.

    `run_id` is the id of its record of a running step; `ended` comes after a finished step is published.
    """

    def say(self, text: str) -> None: ...
    def began(self, out: StepContext) -> None: ...
    def progress(self, out: StepContext, done: float, total: float, unit: str, note: str) -> None: ...
    def run_id(self, out: StepContext) -> str | None: ...
    def ended(self, out: StepContext, status: str, facts: dict, error: str | None) -> None: ...


class StepContext:
    """A running step's side of the scheduler: its folders, lease, metrics and progress.

    `path`: the folder of its outputs, which no other attempt writes to; `build`: the build's folder, with checkpoints and
    metrics; `forced`: the user asked for this step by --force; `siblings`: folders of the other builds of its trunk.
    """

    def __init__(self, step: Step, build: str, lease: Lease, observer: Observer | None, inline: bool, forced: bool,
                 siblings: list[str]):
        self.step, self.build, self.lease, self.inline, self.forced = step, build, lease, inline, forced
        self.siblings, self.attempt = siblings, lease.attempt
        self.path = path_of(build, self.attempt)
        self.metrics_path = join(build, f"metrics-{self.attempt:04d}.jsonl")
        self._observer, self._metrics = observer, MetricsFile(self.metrics_path)

    @property
    def name(self) -> str:
        return self.step.name

    def check(self) -> None:
        """Raises LeaseLost when another worker owns the build now. Long loops call it once an iteration."""
        self.lease.check()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._metrics.add(step, metrics)

    def flush(self) -> None:
        self._metrics.flush()

    def progress(self, done: float, total: float, unit: str, note: str = "") -> None:
        """Reports work done so far; raises LeaseLost as `check` does."""
        self.check()
        if self._observer:
            self._observer.progress(self, done, total, unit, note)


@dataclass(frozen=True)
class StepState:
    """A step's state in the store: its status, a finished build (for these inputs, else the newest) and the build that would
    be continued."""

    status: Status
    artifact: Artifact | None
    build: int | None  # the newest build for these inputs
    newest_build: int  # the newest build for any inputs, 0 where there is none
    note: str = ""


def inspect(step: Step, store: str, inputs: Mapping[str, str | None]) -> StepState:
    """Reads a step's state, given its inputs' build ids (None where an input is not built); writes nothing."""
    root = step.root(store)
    numbers = [int(n) for n in names(root) if n.isdigit()]
    opened = {n: r for n in numbers if (r := get_json(join(root, f"{n:04d}", "build.json")))}
    done = {n: d for n in opened if (d := get_json(join(root, f"{n:04d}", "done.json")))}
    # A folder without its record is only being opened, or being removed: then its number is taken.
    newest = max((n for n in numbers if n in opened or exists(join(root, f"{n:04d}", REMOVED))), default=0)
    # The newest build for exactly these inputs decides; without one, older results are stale.
    build = max((n for n in opened if opened[n]["inputs"] == dict(inputs)), default=None)
    artifact = None
    if done:
        n = build if build in done else max(done)
        path = path_of(join(root, f"{n:04d}"), done[n]["attempt"])
        artifact = Artifact(path, f"{step.fingerprint}.{n:04d}", done[n]["facts"], done[n])
    if build in done:
        status, note = Status.DONE, f"built in {done[build]['seconds']:.0f} s"
    elif build is not None:
        status, note = _unfinished(join(root, f"{build:04d}"))
    elif artifact:
        changed = [k for k, v in inputs.items() if artifact.record["inputs"].get(k) != v]
        status, note = Status.STALE, f"newer build of {', '.join(changed)}"
    else:
        status, note = Status.MISSING, ""
    return StepState(status, artifact, build, newest, note)


def _unfinished(path: str) -> tuple[Status, str]:
    """(status, note) of a build that was opened and is not done, by its latest attempt."""
    number = latest(path)
    attempt = read_attempt(path, number)
    if attempt is None:
        return Status.LOST, "opened, not begun"
    if attempt["state"] in ("failed", "stopped"):
        return Status.FAILED, (attempt.get("error") or "stopped").strip().splitlines()[-1][:200]
    if attempt["state"] == "done":
        return Status.LOST, "taken back, to be repaired"
    where = f"attempt {number} on {attempt['host']}"
    if is_dead(attempt) or time.time() - attempt["time"] > LEASE_S:
        return Status.LOST, f"{where}, its owner died"
    return Status.RUNNING, where


def trunk_siblings(step: Step, store: str, inputs: Mapping[str, str | None], build: str | None,
                   force: bool = False) -> tuple[dict, list[str]]:
    """The trunk of a build (one to be opened where `build` is None) and the folders of the trunk's other builds.

    Builds of one trunk have the same inputs and differ in their training's length alone, so that the longer one
    continues the shorter.  `force` starts a new trunk, so that nothing old is continued.  However many builds there are, one
    listing finds them, and their records are read at once.
    """
    top, trunks = join(store, step.name), {}
    found = [name for name in files(top) if re.fullmatch(r"[^/]+/\d+/build\.json", name)]
    for name, record in zip(found, at_once(get_json, (join(top, name) for name in found)), strict=True):
        if record and record["inputs"] == dict(inputs) and record.get("trunk", {}).get("recipe") == step.trunk:
            trunks[join(top, name.removesuffix("/build.json"))] = record["trunk"]
    if build is None:
        own = {"recipe": step.trunk, "forced": max((t["forced"] for t in trunks.values()), default=0) + force}
    else:
        own = trunks.get(build, {})
    return own, [path for path, trunk in trunks.items() if trunk == own and path != build]
