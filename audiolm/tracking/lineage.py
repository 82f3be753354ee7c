"""Lineage of a run in MLflow: the script that started it, and the corpus as a dataset input."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from audiolm.store import hide_credentials, is_local

ROOT = Path(__file__).resolve().parents[2]
DIGEST_CHARS = 36  # MLflow's column


def source_tags() -> dict[str, str]:
    """MLflow's tags of the script that runs, named from the checkout where it lies within; JOB within a Ray job."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script
    kind = "JOB" if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else "LOCAL"  # Ray sets it in a job's driver
    return {"mlflow.source.name": str(name), "mlflow.source.type": kind}


def dataset(name: str, digest: str, roots: Sequence[str]) -> dict[str, str]:
    """The fields of MLflow's Dataset for a corpus; `roots` are its folders, kept without credentials."""
    kind = "local" if all(map(is_local, roots)) else roots[0].split("://", 1)[0]
    source = json.dumps({"uri": ", ".join(map(hide_credentials, roots))})
    return {"name": name, "digest": digest[:DIGEST_CHARS], "source_type": kind, "source": source}


def log_dataset(client: Any, run_id: str, fields: dict[str, str]) -> None:
    """Adds a dataset to a run's inputs. MLflow knows one by name and digest, so sending it again adds nothing."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    client.log_inputs(run_id, [DatasetInput(Dataset(**fields), [InputTag("mlflow.data.context", "training")])])
