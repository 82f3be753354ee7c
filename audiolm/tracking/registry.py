"""Registered models: a training, `{run name}-{step}`, with a version for each checkpoint, and a run's whole system.

Everything here may be interrupted and called again: what the server has already is found and not made twice.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from audiolm import store
from audiolm.config.base import flatten
from audiolm.config.serve import ServeConfig
from audiolm.store import get_json, hide_credentials, join, names
from audiolm.tracking.outbox import TrackedRun, key

MODEL = "audiolm.model"  # tag of a version: the id of its LoggedModel, which a server's answer lacks
SYSTEM_TAG = "audiolm.system"
MODEL_PARAM_CHARS = 5000  # of a LoggedModel, below those of a run
TEMPERATURES = (("semantic", 0.6), ("coarse", 0.8), ("fine", 0.6))  # paper III-D
ASK = ("To evaluate it, set the tag `evaluate` to `requested` (and `evaluate.suites` to some of the suites, where not all "
       "are wanted) while `python workflows/evaluate.py watch` runs.")
PRUNED = ("**Pruned:** its weights were removed from the store when later checkpoints came (`train.keep`), so it can be "
          "neither loaded nor evaluated.")

Log = Callable[[TrackedRun, list[tuple]], None]  # sends metrics (key, value, time in ms, step, model id)


@dataclass
class ShownCheckpoints:
    """The server's checkpoints as last seen, so that a pass without news sends nothing."""

    commits: dict[str, tuple[Any, str | None, bool]] = field(default_factory=dict)  # by file: model, version, both pruned
    best: str | None = None  # the version with this alias


# ---- registered models and their versions

def name_of(run_name: str, step: str | None = None) -> str:
    """The registered model of a run's whole system, or of one of its steps."""
    return re.sub("[/:']", "_", f"{run_name}-{step}" if step else run_name)  # MLflow takes none of these


def search(client: Any, text: str) -> list:
    """All versions that a filter finds."""
    return list(_pages(lambda token: client.search_model_versions(text, page_token=token)))


def _pages(call: Callable[[str | None], Any]) -> Iterator[Any]:
    token = None
    while True:
        page = call(token)
        yield from page
        token = page.token
        if not token:
            return


def create_version(client: Any, name: str, run_id: str, model: Any, tags: dict[str, str],
                   description: str | None = None) -> str:
    """Registers a LoggedModel; returns its version."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as e:
        if e.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # not models:/ID, which an SQLite client looks up in the MLflow of this process's global state
    version = client.create_model_version(name, model.artifact_location, run_id, tags, description=description,
                                          model_id=model.model_id, await_creation_for=None)
    return str(version.version)


def _ready_models(client: Any, experiment_id: str, text: str) -> list[Any]:
    """The finished LoggedModels that a filter finds; a driver that was killed between two calls left the others."""
    found = list(_pages(lambda token: client.search_logged_models([experiment_id], text, page_token=token)))
    for model in found:
        if str(model.status) != "READY":
            client.delete_logged_model(model.model_id)
    return [model for model in found if str(model.status) == "READY"]


# ---- checkpoints of a training

def deliver_checkpoints(client: Any, experiment_id: str, run: TrackedRun, owner: tuple[str, str], shown: ShownCheckpoints,
                        log: Log) -> None:
    """Registers a build's new commits and marks the pruned ones. `owner`: the pipeline run's name and index; `shown` is
    this function's memory. Raises when the server does not answer."""
    if run.build is None:
        return
    files = names(join(run.build, "commits"))
    if set(files) == shown.commits.keys() and run.status is None:
        return  # checkpoints are pruned only when another is committed
    name = name_of(owner[0], run.name)
    try:
        models, versions = ({}, {}) if shown.commits else _server_state(client, experiment_id, run, name)
        for file in files:
            model, version, pruned = shown.commits.get(file, (models.get(file), None, False))
            commit = None if pruned else get_json(join(run.build, "commits", file))
            if commit is None:
                continue
            model = model or _log_model(client, experiment_id, run, commit, log)
            version = version or versions.get(model.model_id)
            if commit.get("pruned"):
                _mark_pruned(client, name, model, version)
            elif version is None:
                tags = _version_tags(run, owner[1], commit)
                version = create_version(client, name, run.run_id, model, {**tags, MODEL: model.model_id}, _description(tags))
            shown.commits[file] = model, version, bool(commit.get("pruned"))
        _point_best(client, name, run, shown)
    except Exception:
        shown.commits.clear()  # it may have arrived: ask again
        shown.best = None
        raise


def _server_state(client: Any, experiment_id: str, run: TrackedRun, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The server's models of this build by their commits' files, and the versions by their models' ids."""
    models = _ready_models(client, experiment_id, f"tags.`audiolm.build` = '{hide_credentials(run.build)}'")
    versions = search(client, f"name = '{name}'") if models else []
    return ({f"{int(m.params['step']):08d}.json": m for m in models},
            {v.tags[MODEL]: str(v.version) for v in versions if MODEL in v.tags})


def _log_model(client: Any, experiment_id: str, run: TrackedRun, commit: dict, log: Log) -> Any:
    """A LoggedModel of a checkpoint, with its config as parameters and its validation as metrics."""
    step, validation = commit["step"], commit["validation"]
    uri = join(run.build, "checkpoints", commit["folder"])
    tags = {"uri": uri, "audiolm.build": run.build, **({"export": join(uri, "export")} if "export" in commit else {})}
    config = (get_json(join(run.build.rsplit("/", 1)[0], "recipe.json")) or {}).get("config", {})
    params = {key(k): hide_credentials(v)[:MODEL_PARAM_CHARS] for k, v in flatten(config).items()}
    model = client.create_logged_model(experiment_id, f"{run.name}-{step}", run.run_id,
                                       {k: hide_credentials(v) for k, v in tags.items()},
                                       {**params, "step": str(step)}, "checkpoint")
    if validation.get("step") == step and commit.get("validated"):
        at_ms = round(commit["validated"] * 1000)  # the time stamp of the metrics file's row: so a curve has it once
        log(run, [(key(f"val.{k}"), v, at_ms, step, model.model_id) for k, v in validation.items()
                  if k != "step" and isinstance(v, (int, float)) and math.isfinite(v)])
    return client.finalize_logged_model(model.model_id, "READY")


def _version_tags(run: TrackedRun, index: str, commit: dict) -> dict[str, str]:
    """All that evaluating a version needs."""
    uri, validation = join(run.build, "checkpoints", commit["folder"]), commit["validation"]
    loss = validation.get("loss") if validation.get("step") == commit["step"] else None
    tags = {"uri": uri, "step": commit["step"], "fingerprint": run.build.split("/")[-2], "loss": loss, "audiolm.step": run.name,
            "audiolm.build": run.build, "audiolm.index": index, "audiolm.export": "yes" if "export" in commit else "no"}
    return {k: hide_credentials(v) for k, v in tags.items() if v is not None}


def alone(step: str) -> str | None:
    """codec or masked_model, for such a step or a later iteration of one: its checkpoints are measured without a system, and
    an export is made of what the training saved. None for other steps."""
    return (found := re.fullmatch(r"(codec|masked_model)(?:_\d+)?", step)) and found[1]


def can_be_evaluated(tags: Mapping[str, str]) -> bool:
    """Whether a checkpoint with these tags holds an export, or one can be made of it."""
    return tags.get("audiolm.export") == "yes" or alone(tags["audiolm.step"]) is not None


def _description(tags: dict[str, str]) -> str:
    """A version's description, Markdown."""
    loss = f", validation loss {float(tags['loss']):.3f}" if "loss" in tags else ""
    head = f"Checkpoint of `{tags['audiolm.step']}` at step {tags['step']}{loss}; in the store: `{tags['uri']}`."
    return f"{head}\n\n{ASK if can_be_evaluated(tags) else ''}".strip()


def _mark_pruned(client: Any, name: str, model: Any, version: str | None) -> None:
    """Marks model and version as pruned; the results that an evaluation wrote there stay."""
    client.set_logged_model_tags(model.model_id, {"pruned": "true"})
    if version is None:
        return  # pruned before it was registered
    text = client.get_model_version(name, version).description or ""
    if not text.startswith(PRUNED):
        client.update_model_version(name, version, f"{PRUNED}\n\n{text.replace(ASK, '').strip()}")
    client.set_model_version_tag(name, version, "pruned", "true")


def _point_best(client: Any, name: str, run: TrackedRun, shown: ShownCheckpoints) -> None:
    """Moves the alias `best` to the version with the lowest validation loss, as the newest commit names it."""
    versions = {file: version for file, (_, version, pruned) in shown.commits.items() if not pruned}
    newest = get_json(join(run.build, "commits", max(versions))) if versions else None
    best = newest and versions.get(f"{newest.get('best_step') or 0:08d}.json")
    if best and shown.best != best:
        client.set_registered_model_alias(name, "best", best)
        shown.best = best


# ---- whole systems

def deliver_system(client: Any, experiment_id: str, run: TrackedRun) -> None:
    """Registers `run.system`, unless it is there. Raises when the server does not answer."""
    name = name_of(run.name)
    digest = hashlib.sha256(json.dumps([name, run.system["steps"]], sort_keys=True).encode()).hexdigest()[:16]
    if client.search_model_versions(f"name = '{name}' and tags.`{SYSTEM_TAG}` = '{digest}'"):
        return
    models = _ready_models(client, experiment_id, f"tags.`{SYSTEM_TAG}` = '{digest}'")
    model = models[0] if models else _log_system(client, experiment_id, run, digest)
    create_version(client, name, run.run_id, model, {SYSTEM_TAG: digest})


def _log_system(client: Any, experiment_id: str, run: TrackedRun, digest: str) -> Any:
    model = client.create_logged_model(experiment_id, "system", run.run_id, {SYSTEM_TAG: digest}, model_type="audiolm")
    with tempfile.TemporaryDirectory() as aside:
        save(f"{aside}/model", run.system)
        client.log_model_artifacts(model.model_id, f"{aside}/model")
    return client.finalize_logged_model(model.model_id, "READY")


def save(path: str, system: Mapping[str, Any]) -> None:
    """Writes MLflow's folder of a system to a new local folder; `mlflow models serve -m PATH` takes it."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

    request = {"audio": "string", "seconds": "double", "seed": "long", "samples": "long", "mode": "string"}
    reply = {"audio": "string", "seconds": "double", "prompt_s": "double", "ended": "boolean", "sample": "long", "seed": "long"}
    signature = ModelSignature(
        Schema([ColSpec(kind, name, required=False) for name, kind in request.items()]),
        Schema([ColSpec(kind, name) for name, kind in reply.items()]),
        ParamSchema([ParamSpec(f"temperature_{stage}", "double", value) for stage, value in TEMPERATURES]))
    with tempfile.TemporaryDirectory() as aside:
        store.put_json(f"{aside}/system.json", system)
        # audiolm is no requirement: it is not published, and whatever took its name on an index would be installed
        mlflow.pyfunc.save_model(path, python_model=str(Path(__file__).with_name("serve.py")), signature=signature,
                                 artifacts={"system": f"{aside}/system.json"}, model_config=ServeConfig().model_dump(),
                                 pip_requirements=[f"mlflow=={mlflow.__version__}"])
