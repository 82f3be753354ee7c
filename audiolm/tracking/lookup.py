"""Look-ups in MLflow: a run's index, `{store}/runs/{run.name}.json`, by the run's id, and a registered model's version.

Every failure is a ValueError with the fix.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from audiolm import pretrained, store
from audiolm.dag.run_index import OUTPUTS, index_path
from audiolm.places import is_within
from audiolm.tracking import client as mlflow_client
from audiolm.tracking import outbox

DEFAULT_STORE = "outputs"
DEFAULT_RUN = "quickstart"


def default_tracking(folder: str, tracking: str | None) -> str:
    """`tracking`, else MLFLOW_TRACKING_URI, else the SQLite database of a local store. Raises ValueError for none."""
    tracking = tracking or os.environ.get("MLFLOW_TRACKING_URI")
    if not tracking and not store.is_local(folder):
        raise ValueError(f"{folder} holds no MLflow database: name the server by --tracking or MLFLOW_TRACKING_URI")
    return tracking or mlflow_client.database_uri(f"{store.absolute(folder)}/mlflow.db")


def connect(tracking: str | None = None) -> tuple[Any, str]:
    """(MlflowClient, its URI). `tracking` defaults to MLFLOW_TRACKING_URI, else to the SQLite database of ./outputs. Raises
    ValueError with the fix where there is no such MLflow."""
    uri = tracking or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite"
    database = f"{DEFAULT_STORE}/mlflow.db" if uri == "sqlite" else mlflow_client.database_path(uri) or uri
    if uri.startswith("sqlite") and not os.path.exists(database):  # MLflow would create an empty one
        raise ValueError(f"there is no MLflow database {database}: name the run's own with --tracking or MLFLOW_TRACKING_URI, "
                         "sqlite:////STORE/mlflow.db or http://HOST:5000")
    if uri == "none":
        raise ValueError("tracking: none has no runs; give the run's index, STORE/runs/NAME.json")
    uri, _ = outbox.resolve(uri, DEFAULT_STORE)
    return mlflow_client.connect(uri), uri


@contextmanager
def _readable_errors(server: str, missing: str) -> Iterator[None]:
    """Turns MLflow's errors into ValueErrors: `missing` where there is no such thing, else that `server` is down."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as e:
        if e.error_code in mlflow_client.NOT_FOUND:
            raise ValueError(missing) from e
        raise ValueError(f"{server} does not answer ({outbox.first_line(e)}): start it, or name another with --tracking") from e


def check_named(paths: Mapping[str, str], folder: str, tracking: str) -> None:
    """Raises ValueError where MLflow, which others may write to, names a path outside the user's store.

    That is `folder`, and the folder of an SQLite database that the user named. `paths`: by the tag or file that they are from.
    """
    own = [folder] + ([os.path.dirname(database)] if (database := mlflow_client.database_path(tracking)) else [])
    for name, path in paths.items():
        if not any(is_within(place, path) for place in own):
            raise ValueError(f"MLflow's {name} is {path!r}, outside {' and '.join(own)}: name the store it lies in with "
                             "--store if you trust it")


def index_of(run_id: str, tracking: str | None = None, folder: str = OUTPUTS) -> str:
    """The path of the index of a pipeline's run, or of the run that a step's run belongs to.

    `tracking` as in `connect`; the run's store is `folder` or lies below it. Raises ValueError with the fix where there is no
    such MLflow, no such run, no run of this project, or one of another store.
    """
    client, uri = connect(tracking)
    server = f"MLflow at {store.hide_credentials(uri)}"
    with _readable_errors(server, f"no run {run_id!r} in {server}: copy its id from the run's page, or name another MLflow "
                                  "with --tracking"):
        run = client.get_run(run_id)
        if parent := run.data.tags.get("mlflow.parentRunId"):
            run = client.get_run(parent)
    place, name = run.data.tags.get("store"), run.data.params.get("run.name")
    if not place or not name:
        raise ValueError(f"run {run_id} in {server} is not a run of this pipeline (no tag `store`, no parameter `run.name`)")
    if store.is_local(place) and not os.path.isabs(place.removeprefix("file://")):
        raise ValueError(f"run {run_id} has the store {place!r}, relative to the folder it was started in: give its index, "
                         f"{index_path(place, name)}, from there")
    check_named({"tag store": place}, folder, uri)
    return index_path(place, name)


def version_of(client: Any, uri: str) -> Any:
    """The ModelVersion that models:/NAME/VERSION or models:/NAME@ALIAS names. Raises ValueError where there is none."""
    parts = re.fullmatch(r"models:/([^/@]+)(?:/(\d+)|@([^/@]+))", uri)
    if not parts:
        raise ValueError(f"{uri!r}: give models:/NAME/VERSION or models:/NAME@ALIAS (aliases: best, latest)")
    name, version, alias = parts.groups()
    with _readable_errors("MLflow", f"MLflow has no {uri}: copy name and version from the Models page, or name another MLflow "
                                    "with --tracking"):
        return client.get_model_version(name, version) if version else client.get_model_version_by_alias(name, alias)


def system_of(version: Any, tracking: str) -> dict:
    """{"index", "steps"} of a whole system's version, from its model's artifacts."""
    import mlflow

    with tempfile.TemporaryDirectory() as aside:
        path = mlflow.artifacts.download_artifacts(f"{version.source.rstrip('/')}/artifacts/system.json", dst_path=aside,
                                                   tracking_uri=tracking)
        return json.loads(Path(path).read_text())


def find_run(run: str | None, folder: str = OUTPUTS, tracking: str | None = None) -> str:
    """The index of a run: a path or URI that ends in .json as it is, an MLflow run id (32 hex digits) by the server
    `tracking` (None: MLFLOW_TRACKING_URI, else the database in `folder`), else a name's below `folder`, else that of the
    published system of this name. None: the quickstart's, else the published system."""
    if run is None:
        known = store.exists(index_path(folder, DEFAULT_RUN)) or pretrained.DEFAULT_SYSTEM not in pretrained.systems()
        run = DEFAULT_RUN if known else pretrained.DEFAULT_SYSTEM
    if re.fullmatch("[0-9a-f]{32}", run):
        return index_of(run, default_tracking(folder, tracking), folder)
    if run.endswith(".json"):
        return run
    own = index_path(folder, run)
    return pretrained.path(run) if run in pretrained.systems() and not store.exists(own) else own
