"""MlflowClients of this project: quiet, and with an answer or an error within seconds rather than minutes."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import unquote

from audiolm.local_disk import link_once

# MLflow's own defaults retry for minutes; a thread that delivers notes tries again by itself.
QUIET = (("MLFLOW_LOGGING_LEVEL", "WARNING"), ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
         ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"), ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"),
         ("MLFLOW_HTTP_REQUEST_TIMEOUT", "20"))
NOT_FOUND = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # a malformed id is the latter
REFUSED = (*NOT_FOUND, "RESOURCE_ALREADY_EXISTS", "ENDPOINT_NOT_FOUND")
BATCH, METRICS = 100, 1000  # params or tags, and metrics, of one log_batch call: MLflow's limits


def quiet_import(uri: str) -> None:
    """Imports all of mlflow that is used with `uri`. Call it in the main thread: two threads that import the same packages
    can deadlock."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    for name, value in QUIET:
        os.environ.setdefault(name, value)
    import mlflow.pyfunc
    import mlflow.tracking  # noqa: F401

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if "://" in uri and not uri.startswith("http"):
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401


def connect(uri: str) -> Any:
    """An MlflowClient of `uri`; touches no global state of MLflow's. Raises ValueError for a database that cannot be used."""
    quiet_import(uri)
    from mlflow import MlflowClient

    path = database_path(uri)
    if path not in (None, "", ":memory:") and "?" not in uri:
        _lay_out(path)
    client = MlflowClient(uri)
    if path and (stray := os.path.dirname(uri.removeprefix("sqlite:///"))) != os.path.dirname(path):
        with contextlib.suppress(OSError):
            os.removedirs(stray)  # MLflow makes the folder of the name as the URI has it: empty, and beside the real one
    return client


def database_uri(path: str) -> str:
    """The URI of an SQLite database, in which `?` would begin options and `%41` be an A."""
    return f"sqlite:///{path.replace('%', '%25').replace('?', '%3F')}"


def database_path(uri: str) -> str | None:
    """The file of an SQLite database's URI; None for another."""
    return unquote(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def _lay_out(path: str) -> None:
    """Makes an SQLite database whole and once, however many processes ask for it and whenever one of them dies.

    MLflow itself lays it out in place, in dozens of steps none of which can be repeated.
    """
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy.exc import OperationalError

    if os.path.exists(path) and not os.path.isfile(path):  # MLflow would try to open it for minutes
        raise ValueError(f"MLflow's database {path} is no file: move it away, or name another with tracking")
    if os.path.exists(path) and os.path.getsize(path):
        try:
            SqlAlchemyStore(database_uri(path), DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
        except OperationalError as e:
            if "locked" in str(e):
                raise
            raise ValueError(f"MLflow's database {path} is laid out by half, as a process died meanwhile: move it away "
                             f"(mv {path} {path}.broken) and run the same command again") from e
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    aside = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        SqlAlchemyStore(database_uri(aside), DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH).engine.dispose()
        while not (os.path.exists(path) and os.path.getsize(path)):
            try:
                link_once(aside, path)
            except FileExistsError:  # another process's, perhaps not yet whole
                time.sleep(0.1)
    finally:
        for left in (aside, f"{aside}-journal"):
            if os.path.exists(left):
                os.unlink(left)


def metric_batches(rows: Iterable[tuple]) -> Iterator[list]:
    """MLflow's metrics of (key, value, time in ms, step[, model id]), in parts that one log_batch call takes."""
    from mlflow.entities import Metric

    metrics = [Metric(key, float(value), at_ms, step, model_id=model[0] if model else None)
               for key, value, at_ms, step, *model in rows]
    for i in range(0, len(metrics), METRICS):
        yield metrics[i:i + METRICS]


def refused(e: Exception) -> bool:
    """True for an answer that stays the same when asked again; False for a server that does not answer."""
    from mlflow.exceptions import MlflowException

    codes = (*REFUSED, "PERMISSION_DENIED", "UNAUTHENTICATED")
    return not isinstance(e, (MlflowException, OSError)) or getattr(e, "error_code", "") in codes
