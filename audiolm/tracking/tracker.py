"""Shows a run in MLflow without ever slowing or breaking it (DESIGN 1.10). Knows nothing of audio or torch.

A parent run a pipeline run, a nested run a step.  Callers only note what should be known; one thread delivers it, in
order, with explicit run ids.  What is not delivered yet stands in `{store}/.tracking/`, so that an outage or a killed
driver only delays: the next run of the same name delivers the rest.  Metrics come from the step's metrics file, the
delivered offset is kept beside it (`metrics-NNNN.shipped.json`), and a row sent twice is one row (same time stamp).
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from audiolm import store
from audiolm.dag.run_index import index_path
from audiolm.metrics_log import read_from
from audiolm.store import hide_credentials
from audiolm.tracking import client, outbox, registry
from audiolm.tracking.outbox import TrackedRun, key

EVERY_S = 3.0
REFUSED = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "ENDPOINT_NOT_FOUND")
BATCH, METRICS = 100, 1000  # params or tags, and metrics, of one call: MLflow's limits


class Tracker:
    """`uri`: none, sqlite (a database in a local store) or an MLflow tracking URI. `say` gets the rare warnings.

    No method but the constructor raises, none waits for a server longer than a few seconds.
    """

    def __init__(self, uri: str, store: str, experiment: str, run_name: str, say: Callable[[str], None] | None = None):
        self.uri, self.artifacts = outbox.resolve(uri, store)
        self._store, self._experiment, self._run_name = store, experiment, run_name
        self._folder = f"{store.rstrip('/')}/.tracking/{quote(run_name, safe='')}"
        self._say = say or logging.getLogger(__name__).warning
        self._owner = run_name, index_path(store, run_name)
        self._head = {"uri": hide_credentials(self.uri), "experiment": experiment}
        self._name = hashlib.sha256(f"{store}|{run_name}".encode()).hexdigest()[:16]  # of both, safe in a search
        self._off = self.uri is None
        self._runs: list[TrackedRun] = []
        self._saved: dict[str, str] = {}
        self._models: dict[str, registry.ShownCheckpoints] = {}
        self._parent: TrackedRun | None = None
        self._client = self._experiment_id = None
        self._lock = threading.Lock()
        self._passed = threading.Condition()
        self._begun = self._ended = 0  # passes of the thread
        self._good = True  # the last pass delivered all there was
        self._failures, self._refused = 0, set()
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
            self._say(f"tracking: cannot read {hide_credentials(self._folder)}: {outbox.first_line(e)}")
        over = {"takes_over": ",".join(killed)} if killed else {}
        self._parent = outbox.new(self._run_name, None, params, {**tags, **over})
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
        """Names a step's metrics file, and the build whose checkpoints are shown; what is new there is delivered from then
        on, every few seconds. May be called again."""
        with self._lock:
            handle.metrics_path, handle.build = metrics_path, build

    def end_step(self, handle: TrackedRun, status: str, facts: Mapping[str, Any], ui_folder: str | None) -> str | None:
        """Ends a nested run: FINISHED, FAILED or KILLED. Flush the metrics file first. Returns the run's id if known.

        Numbers among the facts become metrics `fact.x`; everything below `ui_folder` becomes artifacts.
        """
        with self._lock:
            outbox.end(handle, status, facts, ui_folder)
        if self._off:
            return None
        self._wake.set()
        if handle.run_id is None and not self._failures:
            self.flush(15.0)  # a new database takes seconds to be laid out
        return handle.run_id

    def link_step(self, name: str, run_id: str | None) -> None:
        """Notes on the parent run which run built a step that was skipped."""
        if self._parent and run_id:
            with self._lock:
                self._parent.tags[f"built_by.{name}"] = run_id

    def serves(self, index: str, steps: Mapping[str, str]) -> None:
        """Notes on the parent run which system it ended with (tracked_systems): a run's index, its models' folders."""
        if self._parent:
            with self._lock:
                self._parent.system = {"index": hide_credentials(index), "steps": {name: hide_credentials(path) for name, path in steps.items()}}

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
            self._say(f"tracking: {len(left)} run(s) are not all in MLflow at {hide_credentials(self.uri)}; "
                      f"the next run named {self._run_name!r} on this store delivers the rest")

    def flush(self, timeout_s: float) -> bool:
        """Waits until all that was noted before is delivered; False when it was not in time."""
        if self._off or self._thread is None:
            return True
        if not self._thread.is_alive():
            return not self._runs
        with self._passed:
            target = self._begun + 1
            self._wake.set()
            self._passed.wait_for(lambda: self._ended >= target, timeout_s)
            return self._ended >= target and self._good

    def url(self) -> str:
        """How to open the UI, for people."""
        if self._off:
            return "no tracking (tracking: none)"
        if self.uri.startswith("http"):
            where = f"/#/experiments/{self._experiment_id}" if self._experiment_id else ""
            return hide_credentials(self.uri).rstrip("/") + where
        return f"mlflow ui --backend-store-uri '{hide_credentials(self.uri)}'   then open http://127.0.0.1:5000"

    # ---- the thread

    def _work(self) -> None:
        while True:
            self._wake.wait(EVERY_S if not self._failures else min(60.0, 2.0 ** min(self._failures, 6)))
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
                if empty or time.monotonic() > self._deadline or self._failures >= 3:
                    return

    def _pass(self) -> bool:
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
                self._say(f"tracking: MLflow at {hide_credentials(self.uri)} does not answer; the run goes on and what it has to "
                          f"show is delivered later ({outbox.first_line(e)})")
            with self._lock:  # let the others go first next time
                if run in self._runs:
                    self._runs.append(self._runs.pop(self._runs.index(run)))
            return False
        if self._failures:
            self._say(f"tracking: MLflow at {hide_credentials(self.uri)} answers again")
        self._failures = 0
        return True

    def _save(self, run: TrackedRun) -> None:
        with self._lock:
            text = outbox.note_text(self._head, run)
        if self._saved.get(run.key) != text:
            outbox.save(self._folder, run, text)
            self._saved[run.key] = text

    def _deliver(self, run: TrackedRun) -> bool:
        """Sends what a run has still to be told; True when it is complete. Raises when the server does not answer."""
        if self._experiment_id is None:
            self._open_experiment()
        if run.run_id is None:
            self._create(run)
        with self._lock:
            params, tags, facts = dict(run.params), dict(run.tags), dict(run.facts)
            status, ui = run.status, run.ui_folder
        self._send(run, params, tags)
        self._send_metrics(run)
        self._log_batch(run, metrics=[(k, v, run.ended_ms, 0) for k, v in facts.items()])
        self._refusable(run, registry.deliver_checkpoints, self._client, self._experiment_id, run, self._owner,
                        self._models.setdefault(run.key, registry.ShownCheckpoints()), self._log_batch)
        if ui and store.names(ui):
            self._upload(run, ui)
        with self._lock:
            for kept, sent in ((run.params, params), (run.tags, tags), (run.facts, facts)):
                for k, v in sent.items():
                    if kept.get(k) == v:
                        del kept[k]
            run.ui_folder = None if run.ui_folder == ui else run.ui_folder
        if status is None:
            return False
        self._refusable(run, self._client.set_terminated, run.run_id, status, run.ended_ms)
        if run.system:
            self._refusable(run, registry.deliver_system, self._client, self._experiment_id, run)
        return True

    def _open_experiment(self) -> None:
        from mlflow.exceptions import MlflowException

        self._client = self._client or client.connect(self.uri)
        found = self._client.get_experiment_by_name(self._experiment)
        if found is None:
            try:
                self._experiment_id = self._client.create_experiment(
                    self._experiment, self.artifacts, {"mlflow.experimentKind": "custom_model_development"})  # the UI's pages
                return
            except MlflowException as e:  # another driver made it in this moment
                found = self._client.get_experiment_by_name(self._experiment)
                if found is None:
                    raise e
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        self._experiment_id = found.experiment_id

    def _create(self, run: TrackedRun) -> None:
        tags = {"audiolm.key": run.key, "audiolm.name": self._name, "audiolm.owner": json.dumps(run.owner)}
        with self._lock:
            parent = next((r for r in self._runs if r.key == run.parent), None)
        if parent and parent.run_id is None:
            self._create(parent)
        if run.parent_id:
            tags["mlflow.parentRunId"] = run.parent_id
        if run is self._parent and (dead := self._end_dead()):
            known = filter(None, run.tags.get("takes_over", "").split(","))
            run.tags["takes_over"] = ",".join(dict.fromkeys([*known, *dead]))
        found = self._search(f"tags.`audiolm.key` = '{run.key}'") if run.asked else []
        run.asked = True
        made = found[0] if found else self._client.create_run(self._experiment_id, run.started_ms, tags, run.name)
        run.run_id = made.info.run_id
        with self._lock:
            for child in self._runs:
                child.parent_id = run.run_id if child.parent == run.key else child.parent_id
        self._save(run)

    def _search(self, text: str) -> list:
        return list(self._client.search_runs([self._experiment_id], text, max_results=1000))

    def _end_dead(self) -> list[str]:
        """Ends runs of this name and store whose driver is gone, as KILLED; the ids of the parents among them.

        A driver on another machine cannot be asked: the newer one takes the name over, as it does on the store.
        """
        running = f"attributes.status = 'RUNNING' and tags.`audiolm.name` = '{self._name}'"
        ended = []
        for found in self._search(running):
            if outbox.alive(json.loads(found.data.tags.get("audiolm.owner", "{}"))):
                continue
            if "mlflow.parentRunId" not in found.data.tags:
                ended.append(found.info.run_id)
            self._client.set_terminated(found.info.run_id, "KILLED")
        return ended

    def _send(self, run: TrackedRun, params: dict[str, str], tags: dict[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        for group, make, name in ((params, Param, "params"), (tags, RunTag, "tags")):
            items = [make(k, v) for k, v in group.items()]
            for i in range(0, len(items), BATCH):
                part = {"params": (), "tags": (), name: items[i:i + BATCH]}
                self._refusable(run, self._client.log_batch, run.run_id, (), part["params"], part["tags"])

    def _send_metrics(self, run: TrackedRun) -> None:
        start = run.offset
        try:
            while run.metrics_path:
                rows, offset = read_from(run.metrics_path, run.offset, max_bytes=2**18)
                if offset == run.offset:
                    return
                self._log_batch(run, [(key(k), v, round(row["time"] * 1000), row["step"])
                                      for row in rows for k, v in row["metrics"].items()])
                run.offset = offset
        finally:
            if run.offset != start:
                store.put_json(outbox.shipped_path(run.metrics_path), {"offset": run.offset, "run_id": run.run_id})

    def _log_batch(self, run: TrackedRun, metrics: list[tuple]) -> None:
        from mlflow.entities import Metric

        items = [Metric(k, float(v), *rest) for k, v, *rest in metrics]
        for i in range(0, len(items), METRICS):
            self._refusable(run, self._client.log_batch, run.run_id, items[i:i + METRICS])

    def _upload(self, run: TrackedRun, folder: str) -> None:
        with tempfile.TemporaryDirectory() as aside:
            self._refusable(run, self._client.log_artifacts, run.run_id, store.local_copy(folder, aside))

    def _refusable(self, run: TrackedRun, fn: Callable, *args) -> None:
        """Calls the server. What it refuses for good is reported once a run and dropped; an outage raises."""
        from mlflow.exceptions import MlflowException

        try:
            fn(*args)
        except MlflowException as e:
            if e.error_code not in REFUSED:
                raise
            if run.key not in self._refused:
                self._refused.add(run.key)
                self._say(f"tracking: MLflow refused something of {run.name}: {outbox.first_line(e)}")
