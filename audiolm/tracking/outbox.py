"""The outbox of a tracker: what MLflow has not got yet, as notes in the store, `{store}/.tracking/{run name}/{key}.json`.

A note is one `TrackedRun`: written when the run begins, again when something changed, removed when all of it was
delivered.  The next driver finds the notes that a killed driver or an outage left.  Credentials are masked before
anything is kept.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from audiolm import store
from audiolm.dag import lease
from audiolm.store import hide_credentials
from audiolm.tracking.client import database_uri

PARAM_CHARS, TAG_CHARS, KEY_CHARS = 6000, 5000, 250  # MLflow's limits
STATUSES = ("FINISHED", "FAILED", "KILLED")


@dataclass(eq=False)
class TrackedRun:
    """A run and what is not delivered of it; `run_id` is None until the server gave one."""

    key: str
    name: str
    parent: str | None  # key of the parent's TrackedRun
    started_ms: int
    owner: dict
    parent_id: str | None = None
    run_id: str | None = None
    asked: bool = False  # a create may have been sent: look for its run before sending another
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)  # metrics of the time when it ended
    headline: dict[str, list] = field(default_factory=dict)  # metrics [value, time in ms] of the parent
    dataset: dict[str, str] | None = None  # that it trains on
    metrics_path: str | None = None
    build: str | None = None  # the build whose checkpoints are shown
    offset: int = 0  # bytes of the metrics file that are delivered
    ui_folder: str | None = None
    system: dict | None = None  # that it ended with, to be registered
    status: str | None = None
    ended_ms: int = 0


def new(name: str, parent: TrackedRun | None, params: Mapping[str, str], tags: Mapping[str, str]) -> TrackedRun:
    """A run that begins now, owned by this process; names and values are cut to MLflow's limits."""
    return TrackedRun(uuid.uuid4().hex, name, parent and parent.key, now_ms(), lease.owner(), parent and parent.run_id,
                      params={key(k): hide_credentials(v)[:PARAM_CHARS] for k, v in params.items()},
                      tags={key(k): hide_credentials(v)[:TAG_CHARS] for k, v in tags.items()})


def end(run: TrackedRun, status: str, facts: Mapping[str, Any], ui_folder: str | None) -> None:
    """Notes how a run ended. Raises ValueError for an unknown status."""
    if status not in STATUSES:
        raise ValueError(f"status {status!r} is not one of {', '.join(STATUSES)}")
    run.facts, run.ui_folder = numbers("fact", facts), ui_folder
    run.ended_ms, run.status = now_ms(), status


def snapshot(run: TrackedRun) -> TrackedRun:
    """A copy that stays as it is while callers change the run."""
    return replace(run, params=dict(run.params), tags=dict(run.tags), facts=dict(run.facts), headline=dict(run.headline))


def forget(run: TrackedRun, sent: TrackedRun) -> None:
    """Drops what was delivered of a run, except what changed since the snapshot `sent`."""
    for name in ("params", "tags", "facts", "headline"):
        delivered = getattr(sent, name).items()
        setattr(run, name, {k: v for k, v in getattr(run, name).items() if (k, v) not in delivered})
    run.ui_folder = None if run.ui_folder == sent.ui_folder else run.ui_folder
    run.dataset = None if run.dataset == sent.dataset else run.dataset


def save(folder: str, run: TrackedRun, text: str) -> None:
    store.put(store.join(folder, f"{run.key}.json"), text.encode())


def note_text(head: Mapping[str, str], run: TrackedRun) -> str:
    """A run's note; `head` says which server and experiment it is meant for."""
    # without the offset, which is kept beside the metrics file: a row must not rewrite the note
    return json.dumps({**head, "run": {**asdict(run), "offset": 0}}, sort_keys=True)


def drop(folder: str, run: TrackedRun) -> None:
    store.remove(store.join(folder, f"{run.key}.json"))


def release(folder: str, head: Mapping[str, str], runs: list[TrackedRun]) -> None:
    """Gives runs up for the next tracker, even one of this same process. A store that fails here changes nothing."""
    for run in runs:
        run.owner = {}
        try:
            save(folder, run, note_text(head, run))
        except OSError:
            pass


def left_over(folder: str, head: Mapping[str, str]) -> tuple[list[TrackedRun], list[str]]:
    """Runs that earlier drivers did not deliver, parents first, and the ids of the parents whose driver was killed."""
    runs, killed = [], []
    for name in store.names(folder):
        note = store.get_json(store.join(folder, name))
        if not note or any(note.get(k) != v for k, v in head.items()):
            continue
        run = TrackedRun(**note["run"])
        if alive(run.owner):
            continue
        run.owner, run.asked = lease.owner(), True
        if run.status is None:
            run.status, run.ended_ms = "KILLED", now_ms()
            killed += [run.run_id] if run.parent is None and run.run_id else []
        shipped = store.get_json(shipped_path(run.metrics_path)) if run.metrics_path else None
        if shipped and shipped["run_id"] == run.run_id:
            run.offset = shipped["offset"]
        runs.append(run)
    return sorted(runs, key=lambda r: (r.parent is not None, r.started_ms)), killed


def alive(owner: Mapping[str, Any]) -> bool:
    """True for a process of this very machine that still runs. One on another machine cannot be asked: False."""
    me = lease.owner()
    return all(owner.get(k) == me[k] for k in ("host", "boot", "pids")) and not lease.is_dead(dict(owner))


def shipped_path(metrics_path: str) -> str:
    """The file that keeps the delivered offset of a metrics file."""
    return f"{metrics_path.removesuffix('.jsonl')}.shipped.json"


def resolve(uri: str, folder: str) -> tuple[str | None, str | None]:
    """(tracking URI, artifact location of a new experiment), None where there is none. Raises ValueError."""
    if uri == "none":
        return None, None
    if uri == "sqlite":
        if not store.is_local(folder):
            raise ValueError(f"tracking: sqlite needs a store on a local disk, but store is {hide_credentials(folder)}; "
                             "set tracking to an MLflow server's URI (http://host:5000) or to none")
        root = Path(store.open_fs(folder)[1])
        root.mkdir(parents=True, exist_ok=True)
        return database_uri(str(root / "mlflow.db")), (root / "mlflow").as_uri()
    if "://" not in uri:
        raise ValueError(f"tracking: {hide_credentials(uri)!r} is neither sqlite, none nor a URI such as http://host:5000")
    return uri, None


def first_line(e: BaseException) -> str:
    return hide_credentials(f"{type(e).__name__}: {e}".splitlines()[0][:300])


def numbers(prefix: str, facts: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among nested facts, by dotted name."""
    found = {}
    for k, v in facts.items():
        if isinstance(v, Mapping):
            found |= numbers(f"{prefix}.{k}", v)
        elif isinstance(v, (int, float)):
            found[key(f"{prefix}.{k}")] = float(v)
    return found


def key(name: str) -> str:
    """A name as MLflow takes it for metrics, params and tags."""
    return re.sub(r"[^\w\-./ ]", "_", str(name))[:KEY_CHARS]


def now_ms() -> int:
    return int(time.time() * 1000)
