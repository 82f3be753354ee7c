"""Shows a run in MLflow without ever slowing or breaking it. Knows nothing of audio or torch.

A pipeline run is a parent run, a step a nested run.  Callers only note what should be known; one thread delivers it, in
order, with explicit run ids.  Undelivered notes stay in `{store}/.tracking/`, so an outage or a killed driver only delays:
the next run of the same name delivers the rest.  Metrics come from the step's metrics file; the delivered offset is kept
beside it (`metrics-NNNN.shipped.json`), and a row sent twice is one row (same time stamp).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from audiolm.store import hide_credentials
from audiolm.tracking import client, lineage, outbox
from audiolm.tracking.delivery import CLAIMED, Delivery
from audiolm.tracking.outbox import TrackedRun, first_line

EVERY_S = 3.0  # between passes: curves in the UI that follow a training
LONGEST_WAIT_S = 60.0  # between tries while the server does not answer
FIRST_RUN_S = 15.0  # a new database takes seconds to be laid out
GIVE_UP = 3  # failed passes in a row, once the run has ended


class Tracker:
    """`uri`: none, sqlite (a database in a local store) or an MLflow tracking URI. `say` gets the rare warnings.

    No method but the constructor raises, none waits for a server longer than a few seconds.
    """

    def __init__(self, uri: str, store: str, experiment: str, run_name: str, say: Callable[[str], None] | None = None):
        self.uri, artifacts = outbox.resolve(uri, store)
        self._off = self.uri is None
        self._run_name = run_name
        self._say = say or logging.getLogger(__name__).warning
        self._server = hide_credentials(self.uri)  # for people
        self._folder = f"{store.rstrip('/')}/.tracking/{quote(run_name, safe='')}"
        self._head = {"uri": self._server, "experiment": experiment}  # which server the notes are meant for
        self._delivery = Delivery(self.uri, artifacts, experiment, store, run_name, self._say)
        self._runs: list[TrackedRun] = []  # with something left to deliver
        self._saved: dict[str, str] = {}  # each run's note as the store has it
        self._parent: TrackedRun | None = None
        self._lock = threading.Lock()  # of the runs, which callers and the thread change
        self._passed = threading.Condition()
        self._begun = self._ended = 0  # passes of the thread
        self._good = True  # the last pass delivered all there was
        self._failures = 0  # passes that failed since the last good one
        self._wake, self._stopping, self._deadline = threading.Event(), False, 0.0
        self._thread: threading.Thread | None = None

    # ---- what callers use

    def start(self, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Opens the parent run and takes over what an earlier run of this name left undelivered."""
        if self._off:
            return
        client.quiet_import(self.uri)
        left, killed = [], []
        try:
            left, killed = outbox.left_over(self._folder, self._head)
        except Exception as e:  # noqa: BLE001  a store that stumbles here fails its steps with a better error
            self._say(f"tracking: cannot read {hide_credentials(self._folder)}: {first_line(e)}")
        claimed = {CLAIMED: ",".join(killed)} if killed else {}
        self._parent = outbox.new(self._run_name, None, params, {**lineage.source_tags(), **tags, **claimed})
        with self._lock:
            self._runs = [*left, self._parent]
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()
        self._wake.set()

    def begin_step(self, name: str, attempt_path: str, params: Mapping[str, str], tags: Mapping[str, str]) -> TrackedRun:
        """Opens a nested run; returns at once with its handle."""
        run = outbox.new(name, self._parent, params, {"step": name, "attempt": attempt_path, **tags})
        if not self._off:
            with self._lock:
                self._runs.append(run)
            self._wake.set()
        return run

    def ship(self, handle: TrackedRun, metrics_path: str, build: str | None = None) -> None:
        """Names a step's metrics file, and the build whose checkpoints are shown. Rows and commits that appear there are
        delivered every few seconds. May be called again."""
        with self._lock:
            handle.metrics_path, handle.build = metrics_path, build

    def run_id(self, handle: TrackedRun) -> str | None:
        """A run's id, if the server gave one by now; waits for it a little while the server answers."""
        if handle.run_id is None and not self._off and not self._failures:
            self.flush(FIRST_RUN_S)
        return handle.run_id

    def end_step(self, handle: TrackedRun, status: str, facts: Mapping[str, Any], ui_folder: str | None) -> None:
        """Ends a nested run: FINISHED, FAILED or KILLED. Flush the metrics file first.

        Numbers among the facts become metrics `fact.x`; everything below `ui_folder` becomes artifacts.
        """
        with self._lock:
            outbox.end(handle, status, facts, ui_folder)
        self._wake.set()

    def link_step(self, name: str, run_id: str | None) -> None:
        """Notes on the parent run which run built a step that was skipped."""
        if self._parent and run_id:
            with self._lock:
                self._parent.tags[f"built_by.{name}"] = run_id

    def headline(self, values: Mapping[str, float]) -> None:
        """Notes main results of the steps as metrics of the parent run, by stable names."""
        if self._parent:
            with self._lock:
                self._parent.headline |= {outbox.key(name): [float(v), outbox.now_ms()] for name, v in values.items()}

    def uses_dataset(self, name: str, digest: str, roots: Sequence[str]) -> None:
        """Notes the corpus as the parent run's dataset input: its digest and its folders, without credentials."""
        if self._parent:
            with self._lock:
                self._parent.dataset = lineage.dataset(name, digest, roots)

    def serves(self, index: str, steps: Mapping[str, str]) -> None:
        """Notes on the parent run the system that it ended with: a run's index, its models' folders."""
        if self._parent:
            with self._lock:
                self._parent.system = {"index": hide_credentials(index),
                                       "steps": {name: hide_credentials(path) for name, path in steps.items()}}

    def finish(self, status: str, timeout_s: float = 30.0) -> None:
        """Ends the parent run and waits until all is delivered, at most `timeout_s`; the next run does the rest."""
        if self._off or self._thread is None or self._stopping:
            return
        with self._lock:
            outbox.end(self._parent, status, {}, None)
            for run in self._runs:
                if run.status is None:  # a step that nobody ended: the driver was interrupted
                    outbox.end(run, "KILLED", {}, None)
        self._deadline, self._stopping = time.monotonic() + timeout_s, True
        self._wake.set()
        self._thread.join(timeout_s + 5.0)
        with self._lock:
            left = list(self._runs)
        if left:
            if not self._thread.is_alive():
                outbox.release(self._folder, self._head, left)
            self._say(f"tracking: {len(left)} run(s) are not all in MLflow at {self._server}; "
                      f"the next run named {self._run_name!r} on this store delivers the rest")

    def flush(self, timeout_s: float) -> bool:
        """Waits until all that was noted before is delivered; False when it was not in time."""
        if self._off or self._thread is None:
            return True
        if not self._thread.is_alive():
            return not self._runs
        with self._passed:
            target = self._begun + 1  # the pass under way may have read the notes before
            self._wake.set()
            self._passed.wait_for(lambda: self._ended >= target, timeout_s)
            return self._ended >= target and self._good

    def url(self) -> str:
        """The UI's address, or the command that opens it."""
        if self._off:
            return "no tracking (tracking: none)"
        if self.uri.startswith("http"):
            experiment = self._delivery.experiment_id
            return self._server.rstrip("/") + (f"/#/experiments/{experiment}" if experiment else "")
        return f"mlflow ui --backend-store-uri '{self._server}'   then open http://127.0.0.1:5000"

    # ---- the thread

    def _work(self) -> None:
        while True:
            self._wake.wait(min(LONGEST_WAIT_S, 2.0 ** min(self._failures, 6)) if self._failures else EVERY_S)
            self._wake.clear()
            with self._passed:
                self._begun += 1
            good = self._pass()
            with self._passed:
                self._ended, self._good = self._begun, good
                self._passed.notify_all()
            if self._stopping:
                with self._lock:
                    empty = not self._runs
                if empty or time.monotonic() > self._deadline or self._failures >= GIVE_UP:
                    return

    def _pass(self) -> bool:
        """Saves and delivers every note; False where the server or the store did not answer."""
        with self._lock:
            runs = list(self._runs)
        run = None
        try:
            for run in runs:  # first of all what a killed driver must leave behind
                self._save(run)
            for run in runs:
                if self._deliver(run):
                    outbox.drop(self._folder, run)
                    with self._lock:
                        self._runs.remove(run)
                else:
                    self._save(run)
        except Exception as e:  # noqa: BLE001  a tracker's trouble is never a step's trouble
            self._failures += 1
            if self._failures == 1:
                self._say(f"tracking: MLflow at {self._server} does not answer; the run goes on and what it has to "
                          f"show is delivered later ({first_line(e)})")
            with self._lock:  # let the others go first next time
                if run in self._runs:
                    self._runs.append(self._runs.pop(self._runs.index(run)))
            return False
        if self._failures:
            self._say(f"tracking: MLflow at {self._server} answers again")
        self._failures = 0
        return True

    def _save(self, run: TrackedRun) -> None:
        with self._lock:
            text = outbox.note_text(self._head, run)
        if self._saved.get(run.key) != text:
            outbox.save(self._folder, run, text)
            self._saved[run.key] = text

    def _deliver(self, run: TrackedRun) -> bool:
        """Sends what is new of a run; True when it has ended and is complete. Raises when the server does not answer."""
        self._delivery.open()
        if run.run_id is None:
            self._create(run)
        with self._lock:
            note = outbox.snapshot(run)
        self._delivery.send(run, note)
        with self._lock:
            outbox.forget(run, note)
        if note.status is None:
            return False
        self._delivery.end(run, note)
        return True

    def _create(self, run: TrackedRun) -> None:
        """Creates a run after its parent; its children learn its id."""
        with self._lock:
            parent = next((r for r in self._runs if r.key == run.parent), None)
        if parent and parent.run_id is None:
            self._create(parent)
        if run is self._parent:
            self._delivery.take_over(run)
        self._delivery.create(run)
        with self._lock:
            for child in self._runs:
                child.parent_id = run.run_id if child.parent == run.key else child.parent_id
        self._save(run)
