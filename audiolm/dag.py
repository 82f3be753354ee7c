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
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from audiolm.identity import flatten, identity
from audiolm.lease import LEASE_S, Lease, LeaseLost, Waiter, is_dead, latest, read_attempt
from audiolm.metrics import MetricsFile
from audiolm.store import get_json, join, names, put_json


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
    fn: Callable[[dict, dict[str, Artifact], Out], dict | None]
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

    def began(self, out: Out) -> None: ...
    def progress(self, out: Out, done: float, total: float, unit: str, note: str) -> None: ...
    def ended(self, out: Out, status: str, facts: dict, error: str | None) -> str | None: ...


class Out:
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
class View:
    """What the store says of a step: status, the newest finished build and the build that would be continued."""

    status: Status
    artifact: Artifact | None
    build: int | None  # the newest build for these inputs
    newest: int  # the newest build of all
    note: str = ""


def look(step: Step, store: str, inputs: Mapping[str, str | None]) -> View:
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
        return View(Status.DONE, artifact, match[-1], newest, f"built in {done[match[-1]]['seconds']:.0f} s")
    if match:
        path = join(root, f"{match[-1]:04d}")
        attempt = read_attempt(path, latest(path))
        if attempt is None:
            return View(Status.LOST, artifact, match[-1], newest, "opened, not begun")
        if attempt["state"] in ("failed", "stopped"):
            last = (attempt.get("error") or "stopped").strip().splitlines()[-1]
            return View(Status.FAILED, artifact, match[-1], newest, last[:200])
        lost = is_dead(attempt) or time.time() - attempt["time"] > LEASE_S
        return View(Status.LOST if lost else Status.RUNNING, artifact, match[-1], newest,
                    f"attempt {latest(path)} on {attempt['host']}" + (", its owner died" if lost else ""))
    if finished:
        changed = [k for k, v in inputs.items() if artifact.record["inputs"].get(k) != v]
        return View(Status.STALE, artifact, None, newest, f"newer build of {', '.join(changed)}")
    return View(Status.MISSING, artifact, None, newest)


def kin(step: Step, store: str, inputs: Mapping[str, str | None], build: str | None,
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


def _open_build(step: Step, store: str, inputs: dict[str, str], force: bool) -> tuple[str, int]:
    """The build to work on: the newest for these inputs, or a new one (exclusive: two drivers agree on it)."""
    while True:
        view = look(step, store, inputs)
        if view.build is not None and not (force and view.status is Status.DONE):
            return join(step.root(store), f"{view.build:04d}"), view.build
        n = view.newest + 1
        trunk = {"trunk": kin(step, store, inputs, None, force)[0]} if step.trains else {}
        try:
            put_json(join(step.root(store), "recipe.json"), step.recipe)
            put_json(join(step.root(store), f"{n:04d}", "build.json"), {"inputs": inputs, "time": time.time(), **trunk},
                     exclusive=True)
        except FileExistsError:
            pass
        force = False  # whoever opened it: this build is newer than the one that was to be replaced


def run_step(step: Step, store: str, inputs: dict[str, Artifact], *, force: bool = False, inline: bool = False,
             observer: Observer | None = None, stop: Callable[[], bool] = lambda: False, poll_s: float = 2.0) -> Artifact:
    """Claims, runs and publishes one step, or waits for whoever is at it. Runs in the driver (a thread of it)."""
    builds = {name: a.build for name, a in inputs.items()}
    path, number = _open_build(step, store, builds, force)
    waiter = Waiter(path)
    while True:
        if done := get_json(join(path, "done.json")):
            return Artifact(path, f"{step.fingerprint}.{number:04d}", done["facts"], done)
        if stop():
            raise LeaseLost(f"{step.name}: stopped before it began")
        if waiter.free():
            try:
                lease = Lease(path, waiter.judged)
            except FileExistsError:
                continue  # lost the race: wait for the winner
            if not get_json(join(path, "done.json")):
                break
            lease.close("done")  # it was finished between the look and the claim
            continue
        time.sleep(poll_s)
    out = Out(step, path, lease, observer, inline, force, kin(step, store, builds, path)[1] if step.trains else [])
    began = time.time()
    try:
        if observer:
            observer.began(out)
        facts = step.fn(dict(step.config), inputs, out) or {}
        lease.check(now=True)
        out.flush()
        run_id = observer.ended(out, "done", facts, None) if observer else None
        done = {"facts": facts, "inputs": builds, "seconds": round(time.time() - began, 3), "time": time.time(),
                "attempt": lease.attempt, "run_id": run_id}
        put_json(join(path, "done.json"), done, exclusive=True)
        lease.close("done")
        return Artifact(path, f"{step.fingerprint}.{number:04d}", facts, done)
    except BaseException as e:
        stopped = isinstance(e, (LeaseLost, KeyboardInterrupt))
        out.flush()
        lease.close("stopped" if stopped else "failed", traceback.format_exc()[-4000:])
        if observer:
            observer.ended(out, "stopped" if stopped else "failed", {}, f"{type(e).__name__}: {e}")
        raise


def toposort(targets: Iterable[Step]) -> list[Step]:
    order: dict[str, Step] = {}

    def visit(s: Step) -> None:
        if s.name in order:
            if order[s.name].fingerprint != s.fingerprint:
                raise ValueError(f"two different steps are named {s.name!r}")
            return
        for up in s.inputs:
            visit(up)
        order[s.name] = s

    for t in targets:
        visit(t)
    return list(order.values())


@dataclass(frozen=True, eq=False)
class Row:
    """One step of a plan: will it run, and why; for training, the builds it may go on from, its own first."""

    step: Step
    view: View
    run: bool
    reason: str
    builds: tuple[str | None, ...] = ()


def plan(steps: list[Step], store: str, *, only: Iterable[str] = (), from_: Iterable[str] = (),
         force: Iterable[str] = ()) -> list[Row]:
    """What would run, in order. Reads the store, writes nothing. Raises ValueError for unknown or unbuilt names."""
    known = [s.name for s in steps]
    for option, given in (("--only", only), ("--from", from_), ("--force", force)):
        if unknown := set(given) - set(known):
            raise ValueError(f"{option}: no step named {', '.join(sorted(unknown))}; the steps are {', '.join(known)}")
    chosen = set(only) | set(from_) or set(known)
    builds: dict[str, str | None] = {}
    rows, will_run = [], set()
    for s in steps:
        if from_ and any(u.name in chosen for u in s.inputs):
            chosen.add(s.name)
        inputs = {u.name: builds[u.name] for u in s.inputs}
        view = look(s, store, inputs)
        builds[s.name] = view.artifact.build if view.artifact else None
        above = [u.name for u in s.inputs if u.name in will_run]
        run = s.name in chosen and (s.name in force or bool(above) or view.status is not Status.DONE)
        if run and (missing := [u.name for u in s.inputs if builds[u.name] is None and u.name not in will_run]):
            raise ValueError(f"{s.name} needs {', '.join(missing)}, not built and not selected: "
                             f"add --only {','.join([*missing, s.name])} or run without --only/--from")
        will_run |= {s.name} if run else set()
        before = ()
        if run and s.trains and not above:
            again = view.build is None or (s.name in force and view.status is Status.DONE)
            own = None if again else join(s.root(store), f"{view.build:04d}")
            before = (own, *kin(s, store, inputs, own, s.name in force)[1])
        rows.append(Row(s, view, run, _reason(s, store, view, run, s.name in force, above), before))
    return rows


def _reason(step: Step, store: str, view: View, run: bool, forced: bool, above: list[str]) -> str:
    if not run:
        return view.note if view.status is Status.DONE else f"{view.status}, not selected"
    if forced:
        return "forced" if view.status is Status.DONE or view.build is None else f"forced, goes on with build {view.build:04d}"
    if view.status is Status.MISSING:
        return sibling_difference(step, store) or "never built"
    return view.note or (f"after {', '.join(above)}" if above else str(view.status))


def sibling_difference(step: Step, store: str) -> str:
    """How the recipe differs from the newest one of the same step, or '' where there is none."""
    newest, recipe = 0.0, None
    for name in names(join(store, step.name)):
        root = join(store, step.name, name)
        if name != step.fingerprint and (first := get_json(join(root, "0001", "build.json"))) and first["time"] > newest:
            newest, recipe = first["time"], get_json(join(root, "recipe.json"))
    if recipe is None:
        return ""
    old, new = flatten(recipe), flatten(step.recipe)
    parts = [f"{k.removeprefix('config.')}: {old.get(k, 'absent')} -> {new.get(k, 'absent')}"
             for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and not k.startswith("inputs.")]
    ups = [k.removeprefix("inputs.") for k in new if k.startswith("inputs.") and old.get(k) != new[k]]
    return "; ".join(parts[:4] + ([f"{len(parts) - 4} more"] if len(parts) > 4 else [])) or f"other {', '.join(ups)}"
