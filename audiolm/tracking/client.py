"""How this project comes to MLflow: quietly, and with an answer or an error within seconds rather than minutes."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

QUIET = (("MLFLOW_LOGGING_LEVEL", "WARNING"), ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
         ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"), ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"),
         ("MLFLOW_HTTP_REQUEST_TIMEOUT", "20"))


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


def metrics(values: Mapping[str, float], at_ms: int, step: int, model_id: str | None, most: int = 1000) -> list[list]:
    """MLflow's metrics of a run and a model, in parts that one call takes."""
    from mlflow.entities import Metric

    items = [Metric(k, v, at_ms, step, model_id=model_id) for k, v in values.items()]
    return [items[i:i + most] for i in range(0, len(items), most)]


def refused(e: Exception) -> bool:
    """True for an answer that stays the same when it is asked again; False for a server that does not answer."""
    from mlflow.exceptions import MlflowException

    return not isinstance(e, (MlflowException, OSError)) or getattr(e, "error_code", "") in (
        "INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "ENDPOINT_NOT_FOUND",
        "PERMISSION_DENIED", "UNAUTHENTICATED")
