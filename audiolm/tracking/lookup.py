"""Finds a run's index, `{store}/runs/{run.name}.json`, by the id that MLflow shows for it, and a registered model's version."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from audiolm import store
from audiolm.dag.run_index import OUTPUTS, index_path
from audiolm.tracking import client as mlflow_client
from audiolm.tracking import outbox

DEFAULT_STORE = "outputs"


def default_tracking(folder: str, tracking: str | None) -> str:
    """`tracking`, else MLFLOW_TRACKING_URI, else the SQLite database of a local store. Raises ValueError for none."""
    tracking = tracking or os.environ.get("MLFLOW_TRACKING_URI")
    if not tracking and not store.is_local(folder):
        raise ValueError(f"{folder} holds no MLflow database: name the server by --tracking or MLFLOW_TRACKING_URI")
    return tracking or f"sqlite:///{store.absolute(folder)}/mlflow.db"


def connect(tracking: str | None = None) -> tuple[Any, str]:
    """(MlflowClient, its URI). `tracking` defaults to MLFLOW_TRACKING_URI, else to the SQLite database of ./outputs. Raises
    ValueError with the fix where there is no such MLflow."""
    uri = tracking or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite"
    database = f"{DEFAULT_STORE}/mlflow.db" if uri == "sqlite" else uri.removeprefix("sqlite:///")
    if uri.startswith("sqlite") and not os.path.exists(database):  # it would be made, and be empty
        raise ValueError(f"there is no MLflow database {database}: name the run's own with --tracking or MLFLOW_TRACKING_URI, "
                         "sqlite:////STORE/mlflow.db or http://HOST:5000")
    if uri == "none":
        raise ValueError("tracking: none has no runs; give the run's index, STORE/runs/NAME.json")
    uri, _ = outbox.resolve(uri, DEFAULT_STORE)
    return mlflow_client.connect(uri), uri


def index_of(run_id: str, tracking: str | None = None) -> str:
    """The path of the index of a pipeline's run, or of the run that a step's run belongs to.

    `tracking` as in `connect`. Raises ValueError with the fix where there is no such MLflow, no such run, or no run of this
    project.
    """
    client, uri = connect(tracking)
    from mlflow.exceptions import MlflowException

    where = f"MLflow at {store.hide_credentials(uri)}"
    try:
        run = client.get_run(run_id)
        if parent := run.data.tags.get("mlflow.parentRunId"):
            run = client.get_run(parent)
    except MlflowException as e:
        if e.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise ValueError(f"no run {run_id!r} in {where}: copy its id from the run's page, or name another MLflow with "
                             "--tracking") from e
        raise ValueError(f"{where} does not answer ({outbox.first_line(e)}): start it, or name another with --tracking") from e
    folder, name = run.data.tags.get("store"), run.data.params.get("run.name")
    if not folder or not name:
        raise ValueError(f"run {run_id} in {where} is not a run of this pipeline (no tag `store`, no parameter `run.name`)")
    if store.is_local(folder) and not os.path.isabs(folder.removeprefix("file://")):
        raise ValueError(f"run {run_id} has the store {folder!r}, relative to the folder it was started in: give its index, "
                         f"{index_path(folder, name)}, from there")
    return index_path(folder, name)


def version_of(client: Any, uri: str) -> Any:
    """The ModelVersion that models:/NAME/VERSION or models:/NAME@ALIAS names. Raises ValueError where there is none."""
    from mlflow.exceptions import MlflowException

    parts = re.fullmatch(r"models:/([^/@]+)(?:/(\d+)|@([^/@]+))", uri)
    if not parts:
        raise ValueError(f"{uri!r}: give models:/NAME/VERSION or models:/NAME@ALIAS (aliases: best, latest)")
    name, version, alias = parts.groups()
    try:
        return client.get_model_version(name, version) if version else client.get_model_version_by_alias(name, alias)
    except MlflowException as e:
        if e.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise ValueError(f"MLflow has no {uri}: copy name and version from the Models page, or name another MLflow with "
                             "--tracking") from e
        raise ValueError(f"MLflow does not answer ({outbox.first_line(e)}): start it, or name another with --tracking") from e


def system_of(version: Any, tracking: str) -> dict:
    """{"index", "steps"} of a version that is a whole system."""
    import mlflow

    with tempfile.TemporaryDirectory() as aside:
        path = mlflow.artifacts.download_artifacts(f"{version.source.rstrip('/')}/artifacts/system.json", dst_path=aside,
                                                   tracking_uri=tracking)
        return json.loads(Path(path).read_text())


def find_run(run: str, folder: str = OUTPUTS, tracking: str | None = None) -> str:
    """The index of a run: a path or URI that ends in .json as it is, an MLflow run id (32 hex digits) by the server
    `tracking` (None: MLFLOW_TRACKING_URI, else the database in `folder`), else a name's below `folder`."""
    if re.fullmatch("[0-9a-f]{32}", run):
        return index_of(run, default_tracking(folder, tracking))
    return run if run.endswith(".json") else index_path(folder, run)
