"""MlflowClients of this project: quiet, and with an answer or an error within seconds rather than minutes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

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
    """An MlflowClient of `uri`; touches no global state of MLflow's."""
    quiet_import(uri)
    from mlflow import MlflowClient

    return MlflowClient(uri)


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
