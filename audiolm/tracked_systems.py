"""A whole trained system as a model that `mlflow models serve` serves: version N of the registered model `{run name}`.

A model is MLflow's folder of audiolm/serve.py and system.json = {"index": a run's index, "steps": {step: its folder}}; the
weights stay in the store. There is one version for each set of folders.  Everything may be sent again: what the server has
is asked for first.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from audiolm import store
from audiolm.lm.system import NEEDED
from audiolm.outbox import Run
from audiolm.tracked_versions import name_of

SYSTEM = (*NEEDED, "lm_fine")  # the steps that generating reads
TAG = "audiolm.system"


def deliver(client: Any, experiment_id: str, run: Run) -> None:
    """Registers `run.system`, unless it is there. Raises when the server does not answer."""
    from mlflow.exceptions import MlflowException

    name = name_of(run.name)
    digest = hashlib.sha256(json.dumps([name, run.system["steps"]], sort_keys=True).encode()).hexdigest()[:16]
    if client.search_model_versions(f"name = '{name}' and tags.`{TAG}` = '{digest}'"):
        return
    model = _logged(client, experiment_id, run, digest)
    try:
        client.create_registered_model(name)
    except MlflowException as e:
        if e.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # not models:/ID, which an SQLite client looks up in the MLflow of this process's global state
    client.create_model_version(name, model.artifact_location, run.run_id, {TAG: digest}, model_id=model.model_id,
                                await_creation_for=None)


def _logged(client: Any, experiment_id: str, run: Run, digest: str) -> Any:
    """The server's LoggedModel of this system, made where there is none."""
    for model in client.search_logged_models([experiment_id], f"tags.`{TAG}` = '{digest}'"):
        if str(model.status) == "READY":
            return model
        client.delete_logged_model(model.model_id)  # made, and nothing more
    model = client.create_logged_model(experiment_id, "system", run.run_id, {TAG: digest}, model_type="audiolm")
    with tempfile.TemporaryDirectory() as aside:
        save(f"{aside}/model", run.system)
        client.log_model_artifacts(model.model_id, f"{aside}/model")
    return client.finalize_logged_model(model.model_id, "READY")


def save(path: str, system: Mapping[str, Any]) -> None:
    """Writes MLflow's folder of a system to a new local folder; `mlflow models serve -m PATH` takes it."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

    asked = {"audio": "string", "seconds": "double", "seed": "long", "samples": "long", "mode": "string"}
    told = {"audio": "string", "seconds": "double", "prompt_s": "double", "ended": "boolean", "sample": "long", "seed": "long"}
    signature = ModelSignature(
        Schema([ColSpec(kind, name, required=False) for name, kind in asked.items()]),
        Schema([ColSpec(kind, name) for name, kind in told.items()]),
        ParamSchema([ParamSpec(f"temperature_{stage}", "double", value)  # paper III-D
                     for stage, value in (("semantic", 0.6), ("coarse", 0.8), ("fine", 0.6))]))
    with tempfile.TemporaryDirectory() as aside:
        store.put_json(f"{aside}/system.json", system)
        # audiolm is no requirement: it is not published, and whatever took its name on an index would be installed
        mlflow.pyfunc.save_model(path, python_model=str(Path(__file__).with_name("serve.py")), signature=signature,
                                 artifacts={"system": f"{aside}/system.json"},
                                 pip_requirements=[f"mlflow=={mlflow.__version__}"])
