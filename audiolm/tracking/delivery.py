"""Delivery: sends the outbox's notes to one experiment of an MLflow server. One thread calls it.

What the server refuses for good is reported once a run and dropped; an outage raises, and the note is sent again later.
Sending twice adds nothing: a metric comes with the time stamp of its note, and a run is searched by its key first.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from audiolm import store
from audiolm.dag.run_index import index_path
from audiolm.metrics_log import read_from
from audiolm.tracking import client, lineage, outbox, registry
from audiolm.tracking.outbox import TrackedRun, key

READ_BYTES = 2**18  # of a metrics file at once: some thousand rows, so that a long backlog stays out of memory
CLAIMED = "takes_over"  # tag: the runs of killed drivers whose name this run took over


@dataclass
class Delivery:
    uri: str
    artifacts: str | None  # where a new experiment keeps them; None: the server decides
    experiment: str
    store: str
    run_name: str
    say: Callable[[str], None]
    experiment_id: str | None = None
    shown: dict[str, registry.ShownCheckpoints] = field(default_factory=dict)  # by run key
    _client: Any = None
    _refused: set[str] = field(default_factory=set)  # keys of runs of which something was refused

    @property
    def index(self) -> str:
        """Path of the pipeline run's index, which its models' versions name."""
        return index_path(self.store, self.run_name)

    @property
    def _name_tag(self) -> str:
        """Store and run name as one word that is safe in a search."""
        return hashlib.sha256(f"{self.store}|{self.run_name}".encode()).hexdigest()[:16]

    def open(self) -> None:
        """Finds the experiment, creates it, or restores it from the bin. Once a process."""
        from mlflow.exceptions import MlflowException

        if self.experiment_id is not None:
            return
        self._client = self._client or client.connect(self.uri)
        found = self._client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                self.experiment_id = self._client.create_experiment(
                    self.experiment, self.artifacts, {"mlflow.experimentKind": "custom_model_development"})  # the UI's pages
                return
            except MlflowException as e:  # another driver made it in this moment
                found = self._client.get_experiment_by_name(self.experiment)
                if found is None:
                    raise e
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        self.experiment_id = found.experiment_id

    def create(self, run: TrackedRun) -> None:
        """Gives a run its id: of the server's run with its key where an earlier create arrived, else of a new one."""
        tags = {"audiolm.key": run.key, "audiolm.name": self._name_tag, "audiolm.owner": json.dumps(run.owner)}
        if run.parent_id:
            tags["mlflow.parentRunId"] = run.parent_id
        found = self._search(f"tags.`audiolm.key` = '{run.key}'") if run.asked else []
        run.asked = True
        created = found[0] if found else self._client.create_run(self.experiment_id, run.started_ms, tags, run.name)
        run.run_id = created.info.run_id

    def take_over(self, run: TrackedRun) -> None:
        """Ends the runs of killed drivers of this name and store, and names the parents among them in a tag of `run`.

        A driver on another machine cannot be asked: the newer one takes the name over, as it does on the store.
        """
        known = [i for i in run.tags.get(CLAIMED, "").split(",") if i]
        for found in self._search(f"attributes.status = 'RUNNING' and tags.`audiolm.name` = '{self._name_tag}'"):
            if outbox.alive(json.loads(found.data.tags.get("audiolm.owner", "{}"))):
                continue
            if "mlflow.parentRunId" not in found.data.tags:
                known.append(found.info.run_id)
            self._client.set_terminated(found.info.run_id, "KILLED")
        if known:
            run.tags[CLAIMED] = ",".join(dict.fromkeys(known))

    def send(self, run: TrackedRun, note: TrackedRun) -> None:
        """Sends all that `note`, a copy of `run`, holds, and what is new in the metrics file and among the checkpoints."""
        self._send_params_and_tags(note)
        self._send_metrics_file(run)
        self._send_metrics(run, [(k, v, note.ended_ms, 0) for k, v in note.facts.items()])
        self._send_metrics(run, [(k, value, at_ms, 0) for k, (value, at_ms) in note.headline.items()])
        self._refusable(run, registry.deliver_checkpoints, self._client, self.experiment_id, run,
                        (self.run_name, self.index), self.shown.setdefault(run.key, registry.ShownCheckpoints()),
                        self._send_metrics)
        if note.dataset:
            self._refusable(run, lineage.log_dataset, self._client, run.run_id, note.dataset)
        if note.ui_folder and store.names(note.ui_folder):
            with tempfile.TemporaryDirectory() as aside:
                local = store.local_copy(note.ui_folder, aside)
                self._refusable(run, self._client.log_artifacts, run.run_id, local)

    def end(self, run: TrackedRun, note: TrackedRun) -> None:
        self._refusable(run, self._client.set_terminated, run.run_id, note.status, note.ended_ms)
        if run.system:
            self._refusable(run, registry.deliver_system, self._client, self.experiment_id, run)

    def _search(self, text: str) -> list:
        return list(self._client.search_runs([self.experiment_id], text, max_results=1000))

    def _send_params_and_tags(self, note: TrackedRun) -> None:
        from mlflow.entities import Param, RunTag

        params = [Param(k, v) for k, v in note.params.items()]
        tags = [RunTag(k, v) for k, v in note.tags.items()]
        for i in range(0, len(params), client.BATCH):  # apart: a refused parameter must not take tags with it
            self._refusable(note, self._client.log_batch, note.run_id, (), params[i:i + client.BATCH])
        for i in range(0, len(tags), client.BATCH):
            self._refusable(note, self._client.log_batch, note.run_id, (), (), tags[i:i + client.BATCH])

    def _send_metrics_file(self, run: TrackedRun) -> None:
        """Sends the rows after the delivered offset, which is kept beside the file, however far this came."""
        start = run.offset
        try:
            while run.metrics_path:
                rows, offset = read_from(run.metrics_path, run.offset, max_bytes=READ_BYTES)
                if offset == run.offset:
                    return
                self._send_metrics(run, [(key(k), v, round(row["time"] * 1000), row["step"])
                                         for row in rows for k, v in row["metrics"].items()])
                run.offset = offset
        finally:
            if run.offset != start:
                store.put_json(outbox.shipped_path(run.metrics_path), {"offset": run.offset, "run_id": run.run_id})

    def _send_metrics(self, run: TrackedRun, rows: Iterable[tuple]) -> None:
        for part in client.metric_batches(rows):
            self._refusable(run, self._client.log_batch, run.run_id, part)

    def _refusable(self, run: TrackedRun, fn: Callable, *args) -> None:
        """Calls the server. What it refuses for good is reported once a run and dropped; an outage raises."""
        from mlflow.exceptions import MlflowException

        try:
            fn(*args)
        except MlflowException as e:
            if e.error_code not in client.REFUSED:
                raise
            if run.key not in self._refused:
                self._refused.add(run.key)
                self.say(f"tracking: MLflow refused something of {run.name}: {outbox.first_line(e)}")
