"""Runs a plan: every step as soon as its inputs exist, each coordinated by a thread of this process (DESIGN 1.4).

Independent branches overlap; at most `slots` training steps run at once, the others wait without a lease.  The first
error stops new launches and is raised after the running steps have ended.  `inline` runs all in this thread.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pkgutil import resolve_name

from audiolm.dag.lease import Lease, LeaseLost, Waiter
from audiolm.dag.plan import PlanRow
from audiolm.dag.step import Artifact, Observer, Status, Step, StepContext, inspect, trunk_siblings
from audiolm.store import get_json, join, put_json


class StepFailed(RuntimeError):
    """A step ended with an error; the text names it."""


def execute(rows: list[PlanRow], store: str, *, force: Iterable[str] = (), inline: bool = False, slots: int = 1,
            observer: Observer | None = None, retries: int = 0, may_retry: Callable[[BaseException], bool] = lambda e: False,
            finished: Callable[[str, Artifact], None] = lambda name, artifact: None) -> dict[str, Artifact]:
    """Returns every step's artifact (skipped ones too). Raises StepFailed, from the first error."""
    built = {r.step.name: r.state.artifact for r in rows if not r.run and r.state.artifact}
    for name, artifact in built.items():
        finished(name, artifact)
    todo, running, results, stopping = [r for r in rows if r.run], set(), queue.Queue(), threading.Event()
    errors: list[tuple[str, BaseException]] = []

    def work(row: PlanRow, inputs: dict[str, Artifact]) -> None:
        for left in range(retries, -1, -1):
            try:
                results.put((row, run_step(row.step, store, inputs, force=row.step.name in force, inline=inline,
                                           observer=observer, stop=stopping.is_set)))
                return
            except BaseException as e:  # noqa: BLE001  reported once, by execute
                if inline and isinstance(e, KeyboardInterrupt):
                    raise
                if left == 0 or not may_retry(e) or stopping.is_set():
                    results.put((row, e))
                    return

    def launch() -> None:
        for row in list(todo):
            inputs = {u.name: built[u.name] for u in row.step.inputs if u.name in built}
            busy = sum(bool(r.step.trains) for r in running) >= slots
            if len(inputs) < len(row.step.inputs) or (row.step.trains and busy) or (inline and running):
                continue
            todo.remove(row)
            running.add(row)
            if inline:
                work(row, inputs)
            else:
                threading.Thread(target=work, args=(row, inputs), name=row.step.name, daemon=True).start()

    try:
        launch()
        while running:
            row, result = results.get()
            running.discard(row)
            if isinstance(result, BaseException):
                errors.append((row.step.name, result))
                stopping.set()
            else:
                built[row.step.name] = result
                finished(row.step.name, result)
            if not errors:
                launch()
    except KeyboardInterrupt:
        stopping.set()
        raise
    if errors:
        name, error = errors[0]
        raise StepFailed(f"step {name} failed: {type(error).__name__}: {error}") from error
    return built


def _open_build(step: Step, store: str, inputs: dict[str, str], force: bool) -> tuple[str, int]:
    """The build to work on: the newest for these inputs, or a new one (exclusive: two drivers agree on it)."""
    while True:
        state = inspect(step, store, inputs)
        if state.build is not None and not (force and state.status is Status.DONE):
            return join(step.root(store), f"{state.build:04d}"), state.build
        n = state.newest_build + 1
        trunk = {"trunk": trunk_siblings(step, store, inputs, None, force)[0]} if step.trains else {}
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
    out = StepContext(step, path, lease, observer, inline, force, trunk_siblings(step, store, builds, path)[1] if step.trains else [])
    began = time.time()
    try:
        if observer:
            observer.began(out)
        fn = resolve_name(step.fn) if isinstance(step.fn, str) else step.fn
        facts = fn(dict(step.config), inputs, out) or {}
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
