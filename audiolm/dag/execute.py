"""Runs a plan: every step as soon as its inputs exist, each coordinated by a thread of this process.

Independent branches overlap; at most `slots` training steps run at once, the others wait without a lease.  The first
error stops new launches and is raised after the running steps have ended.  `inline` runs one step after the other in
this thread.  Threads only coordinate: the work itself is in Ray tasks and training workers.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pkgutil import resolve_name

from audiolm.dag.lease import LEASE_S, Lease, LeaseLost, Waiter, read_attempt
from audiolm.dag.outputs import inherit, path_of, seal, sweep
from audiolm.dag.plan import PlanRow
from audiolm.dag.step import Artifact, Observer, Status, Step, StepContext, inspect, trunk_siblings
from audiolm.dag.stored_builds import take_into_use
from audiolm.store import QUIET_S, clean_up, exists, get_json, join, modified, put_json, remove_unfinished

BACKOFF_S = 2.0  # before a step is launched again; doubled with each death, up to BACKOFF_MOST_S
BACKOFF_MOST_S = 60.0
WAIT_SAID_S = 60.0  # between two lines of a driver that waits for another one


class StepFailed(RuntimeError):
    """A step ended with an error; the text names it."""


def execute(rows: list[PlanRow], store: str, *, force: Iterable[str] = (), inline: bool = False, slots: int = 1,
            observer: Observer | None = None, retries: int = 0,
            may_retry: Callable[[BaseException], bool] = lambda e: False, kept: Callable[[str], float] = lambda build: 0,
            finished: Callable[[str, Artifact], None] = lambda name, artifact: None) -> dict[str, Artifact]:
    """Returns every step's artifact, of skipped steps too. Raises StepFailed, from the first error.

    A step whose error `may_retry` accepts is launched again, `retries` times at most without progress by `kept`, a measure
    of what a build's folder keeps.  `finished` is called in this thread, once for each artifact; its error is the step's.
    """
    built = _skipped(rows)
    for name, artifact in built.items():
        finished(name, artifact)
    todo, running = [r for r in rows if r.run], set()
    results, stopping, interrupted = queue.Queue(), threading.Event(), threading.Event()
    errors: list[tuple[str, BaseException]] = []

    def work(row: PlanRow, inputs: dict[str, Artifact]) -> None:
        """Runs one step to its result or its last error, in a thread of its own unless inline."""
        run = partial(run_step, row.step, store, inputs, force=row.step.name in force, inline=inline, observer=observer,
                      stop=stopping.is_set, interrupted=interrupted.is_set)
        progress = partial(_progress, kept, row.step, store, inputs)
        again = _Retries(row.step.name, retries, may_retry, progress, stopping, _say(observer))
        results.put((row, _with_retries(run, again, inline)))

    def launch() -> None:
        """Starts every step whose inputs exist, that has nothing to wait for and, for training steps, whose turn it is."""
        for row in list(todo):
            inputs = {u.name: built[u.name] for u in row.step.inputs if u.name in built}
            slots_taken = sum(bool(r.step.trains) for r in running) >= slots
            waits = {s.name for s in row.step.after} & {r.step.name for r in (*todo, *running)}
            if len(inputs) < len(row.step.inputs) or waits or (row.step.trains and slots_taken) or (inline and running):
                continue
            todo.remove(row)
            running.add(row)
            if inline:
                work(row, inputs)
            else:
                threading.Thread(target=work, args=(row, inputs), name=row.step.name, daemon=True).start()

    try:  # each result may free a slot or complete another step's inputs; after an error nothing new is launched
        launch()
        while running:
            row, result = results.get()
            running.discard(row)
            if not isinstance(result, BaseException):
                built[row.step.name] = result
                result = _objection(finished, row.step.name, result)
            if result:
                errors.append((row.step.name, result))
                stopping.set()
            if not errors:
                launch()
    except KeyboardInterrupt:
        interrupted.set()
        stopping.set()
        raise
    if errors:
        name, error = errors[0]
        raise StepFailed(f"step {name} failed: {type(error).__name__}: {error}") from error
    return built


def _skipped(rows: list[PlanRow]) -> dict[str, Artifact]:
    """The artifacts of the steps that do not run, which others may read. Raises StepFailed where one is gone."""
    built = {r.step.name: r.state.artifact for r in rows if not r.run and r.state.artifact}
    if gone := take_into_use(a.folder for a in built.values()):
        raise StepFailed(f"{gone} was removed by --gc since this run was planned: give the same command again")
    return built


def _objection(finished: Callable[[str, Artifact], None], name: str, artifact: Artifact) -> Exception | None:
    """What `finished` raises of an artifact that the next steps cannot work with."""
    try:
        finished(name, artifact)
    except Exception as e:  # noqa: BLE001  reported as the step's
        return e


def _say(observer: Observer | None) -> Callable[[str], None]:
    return observer.say if observer else lambda text: None


def _progress(kept: Callable[[str], float], step: Step, store: str, inputs: dict[str, Artifact]) -> float:
    """What the build that was worked on last keeps."""
    build = inspect(step, store, {n: a.build for n, a in inputs.items()}).build
    return kept(join(step.root(store), f"{build:04d}")) if build else 0


@dataclass
class _Retries:
    """Whether and when a step is launched again: progress forgets earlier deaths, so that a long step survives many."""

    name: str
    most: int
    may_retry: Callable[[BaseException], bool]
    progress: Callable[[], float]
    stopping: threading.Event
    say: Callable[[str], None]
    deaths: int = 0
    reached: float = 0

    def again(self, e: BaseException) -> bool:
        """True, after a pause, where the step may run again after its error."""
        if self.stopping.is_set() or not self.may_retry(e):
            return False
        if (progress := self.progress()) > self.reached:
            self.deaths, self.reached = 0, progress
        self.deaths += 1
        if self.deaths > self.most:
            return False
        pause_s = min(BACKOFF_MOST_S, BACKOFF_S * 2 ** min(self.deaths - 1, 9))
        text = str(e).strip().split("\n")[0]
        self.say(f"{self.name}: launched again in {pause_s:g} s, time {self.deaths} of {self.most} without progress, after "
                 f"{type(e).__name__}: {text}")
        return not self.stopping.wait(pause_s)


def _with_retries(run: Callable[[], Artifact], retries: _Retries, inline: bool) -> Artifact | BaseException:
    """The artifact or the last error, as a value: in a thread nobody would catch it. Inline, Ctrl-C is raised."""
    while True:
        try:
            return run()
        except BaseException as e:  # noqa: BLE001  reported once, by execute
            if inline and isinstance(e, KeyboardInterrupt):
                raise
            try:
                if not retries.again(e):
                    return e
            except Exception as second:  # noqa: BLE001  the store cannot say how far the step came
                return second


def _open_build(step: Step, store: str, inputs: dict[str, str], force: bool) -> tuple[str, int]:
    """(folder, number) of the build to work on: the newest for these inputs, or a new one.

    Opening is one exclusive write, so that two drivers which open at once agree on the same build.
    """
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
             observer: Observer | None = None, stop: Callable[[], bool] = lambda: False,
             interrupted: Callable[[], bool] = lambda: False, poll_s: float = 2.0) -> Artifact:
    """Claims, runs and publishes one step, or waits for the driver that is at it. Runs in the driver, in any thread.

    Raises the step's own error, and LeaseLost when `stop` says so before the step began.  An error after the user
    `interrupted` the run is no fault of the step.
    """
    builds = {name: a.build for name, a in inputs.items()}
    path, number = _open_build(step, store, builds, force)
    build = f"{step.fingerprint}.{number:04d}"
    lease = _claim(step, path, stop, poll_s, _say(observer))
    if lease is None:  # another driver finished it
        done = get_json(join(path, "done.json"))
        return Artifact(path_of(path, done["attempt"]), build, done["facts"], done)

    if lease.attempt > 1:  # of what earlier attempts left the surely dead goes
        clean_up(None, lambda: remove_unfinished(path, modified(lease.path) - QUIET_S))
        inherit(path, lease.attempt)
    siblings = trunk_siblings(step, store, builds, path)[1] if step.trains else []
    out = StepContext(step, path, lease, observer, inline, force, siblings)
    began = time.time()
    try:
        if observer:
            observer.began(out)
        fn = resolve_name(step.fn) if isinstance(step.fn, str) else step.fn
        facts = fn(dict(step.config), inputs, out) or {}

        # Publish: only the owner of the lease, after all metrics, and done.json last.
        seal(out.path)
        out.flush()
        lease.check(now=True)
        run_id = observer.run_id(out) if observer else None
        done = {"facts": facts, "inputs": builds, "seconds": round(time.time() - began, 3), "time": time.time(),
                "attempt": lease.attempt, "run_id": run_id}
        try:
            put_json(join(path, "done.json"), done, exclusive=True)
        except FileExistsError as e:
            raise LeaseLost(f"{path}: another attempt published it") from e
    except BaseException as e:
        status = "stopped" if isinstance(e, (LeaseLost, KeyboardInterrupt)) or interrupted() else "failed"
        clean_up(e, out.flush, partial(lease.close, status, traceback.format_exc()[-4000:]))
        if observer:
            why = "interrupted" if interrupted() else f"{type(e).__name__}: {e}"
            clean_up(e, partial(observer.ended, out, status, {}, why))
        raise

    # Published: listeners hear of it now, and nothing that fails here unmakes it.
    clean_up(None, partial(lease.close, "done"), partial(sweep, path, lease.attempt, True))
    if observer:
        clean_up(None, partial(observer.ended, out, "done", facts, None))
    return Artifact(out.path, build, facts, done)


def _claim(step: Step, path: str, stop: Callable[[], bool], poll_s: float, say: Callable[[str], None]) -> Lease | None:
    """The lease of a build, as soon as nobody else's attempt holds it; None once the build is done."""
    waiter, since, said = Waiter(path), "", float("-inf")
    while get_json(join(path, "done.json")) is None:
        if stop():
            raise LeaseLost(f"{step.name}: stopped before it began")
        if not waiter.free():
            if time.monotonic() - said > WAIT_SAID_S and (owner := read_attempt(path, waiter.number)):
                since, said = since or time.strftime("%H:%M"), time.monotonic()
                say(f"{step.name}: waits since {since} for attempt {waiter.number}, process {owner['pid']} on {owner['host']}; "
                    f"goes on when that ends, or {LEASE_S:g} s after its last heartbeat")
            time.sleep(poll_s)
            continue
        try:
            lease = Lease(path, waiter.number)
        except FileExistsError:
            continue  # lost the race: wait for the winner
        if not exists(join(path, "build.json")):
            lease.close("stopped")
            raise LeaseLost(f"{path} was removed by --gc meanwhile: give the same command again")
        if get_json(join(path, "done.json")) is None:
            return lease
        lease.close("done")  # it was finished between the look and the claim
    return None
