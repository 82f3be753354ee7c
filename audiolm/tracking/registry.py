"""The registered model of a training, `{run name}-{step}`, and its versions, one a checkpoint: made, found, pruned."""

from __future__ import annotations

import hashlib
import json
import math
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from audiolm import store
from audiolm.config.base import flatten
from audiolm.store import get_json, hide_credentials, join, names
from audiolm.tracking.outbox import TrackedRun, key

MODEL = "audiolm.model"
ASK = ("To evaluate it within its run's system, set the tag `evaluate` to `requested` (and `evaluate.suites` to some of "
       "the suites, where not all are wanted) while `python workflows/evaluate.py watch` runs.")
PRUNED = ("**Pruned:** its weights were removed from the store when later checkpoints came (`train.keep`), so it can be "
          "neither loaded nor evaluated.")


def name_of(run_name: str, step: str | None = None) -> str:
    """Of a run's whole system, or of one of its steps."""
    return re.sub("[/:']", "_", f"{run_name}-{step}" if step else run_name)  # what MLflow does not take


def search(client: Any, text: str) -> list:
    """All versions that a filter finds."""
    found, token = [], None
    while True:
        page = client.search_model_versions(text, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def by_model(client: Any, name: str) -> dict[str, str]:
    """The versions of a registered model by the id of the LoggedModel that each is of (a tag: a server's answer has no id)."""
    return {v.tags[MODEL]: str(v.version) for v in search(client, f"name = '{name}'") if MODEL in v.tags}


def create(client: Any, name: str, run_id: str, model: Any, tags: dict[str, str]) -> str:
    """Registers a LoggedModel; returns its version."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as e:
        if e.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # not models:/ID, which an SQLite client looks up in the MLflow of this process's global state
    made = client.create_model_version(name, model.artifact_location, run_id, {**tags, MODEL: model.model_id},
                                       description=about(tags), model_id=model.model_id, await_creation_for=None)
    return str(made.version)


def about(tags: dict[str, str]) -> str:
    """A version's description, Markdown."""
    loss = f", validation loss {float(tags['loss']):.3f}" if "loss" in tags else ""
    head = f"Checkpoint of `{tags['audiolm.step']}` at step {tags['step']}{loss}; in the store: `{tags['uri']}`."
    return f"{head}\n\n{ASK if tags.get('audiolm.export') == 'yes' else ''}".strip()


def prune(client: Any, name: str, version: str) -> None:
    """Says on a version that its weights are gone; what an evaluation wrote there stays."""
    found = client.get_model_version(name, version)
    if not (found.description or "").startswith(PRUNED):
        client.update_model_version(name, version, f"{PRUNED}\n\n{(found.description or '').replace(ASK, '').strip()}")
    client.set_model_version_tag(name, version, "pruned", "true")


@dataclass
class ShownCheckpoints:
    """What the server has: by a commit's file (model, version, whether both say pruned), and where `best` points."""

    commits: dict[str, tuple[Any, str | None, bool]] = field(default_factory=dict)
    best: str | None = None


def deliver_checkpoints(client: Any, experiment_id: str, run: TrackedRun, owner: tuple[str, str], shown: ShownCheckpoints,
            log: Callable[[TrackedRun, list[tuple]], None]) -> None:
    """Tells an MlflowClient of commits that it does not know yet and of those that were pruned; `owner`: the pipeline run's
    name and index; `log` sends metrics (key, value, time in ms, step, model id). `shown` is this function's memory; raises
    when the server does not answer."""
    if run.build is None:
        return
    there = names(join(run.build, "commits"))
    if set(there) == shown.commits.keys() and run.status is None:
        return  # checkpoints are pruned when another was committed
    name = name_of(owner[0], run.name)
    try:
        known = {} if shown.commits else _known(client, experiment_id, run)
        registered = by_model(client, name) if known else {}
        for file in there:
            model, version, pruned = shown.commits.get(file, (known.get(file), None, False))
            commit = None if pruned else get_json(join(run.build, "commits", file))
            if commit is None:
                continue
            model = model or _make(client, experiment_id, run, commit, log)
            version = version or registered.get(model.model_id)
            if commit.get("pruned"):
                client.set_logged_model_tags(model.model_id, {"pruned": "true"})
                if version:  # one that was gone before anybody heard of it has none
                    prune(client, name, version)
            elif version is None:
                version = create(client, name, run.run_id, model, _tags(run, owner[1], commit))
            shown.commits[file] = model, version, bool(commit.get("pruned"))
        _point(client, name, run, shown)
    except Exception:
        shown.commits.clear()  # it may have arrived: ask again
        shown.best = None
        raise


def _known(client: Any, experiment_id: str, run: TrackedRun) -> dict[str, Any]:
    """The server's models of this build by their commits' files."""
    found, token = {}, None
    while True:
        page = client.search_logged_models([experiment_id], f"tags.`audiolm.build` = '{hide_credentials(run.build)}'", page_token=token)
        for model in page:
            if str(model.status) == "READY":
                found[f"{int(model.params['step']):08d}.json"] = model
            else:  # made, and nothing more
                client.delete_logged_model(model.model_id)
        token = page.token
        if not token:
            return found


def _make(client: Any, experiment_id: str, run: TrackedRun, commit: dict, log: Callable[[TrackedRun, list[tuple]], None]) -> Any:
    step, validation = commit["step"], commit["validation"]
    uri = join(run.build, "checkpoints", commit["folder"])
    tags = {"uri": uri, "audiolm.build": run.build, **({"export": join(uri, "export")} if "export" in commit else {})}
    config = (get_json(join(run.build.rsplit("/", 1)[0], "recipe.json")) or {}).get("config", {})
    params = {key(k): hide_credentials(v)[:5000] for k, v in flatten(config).items()}
    model = client.create_logged_model(experiment_id, f"{run.name}-{step}", run.run_id, {k: hide_credentials(v) for k, v in tags.items()},
                                       {**params, "step": str(step)}, "checkpoint")
    if validation.get("step") == step and commit.get("validated"):
        at_ms = round(commit["validated"] * 1000)  # the time stamp of the metrics file's row: so a curve has it once
        log(run, [(key(f"val.{k}"), v, at_ms, step, model.model_id) for k, v in validation.items()
                  if k != "step" and isinstance(v, (int, float)) and math.isfinite(v)])
    return client.finalize_logged_model(model.model_id, "READY")


def _tags(run: TrackedRun, index: str, commit: dict) -> dict[str, str]:
    """A version's tags, all that evaluating it needs."""
    uri, validation = join(run.build, "checkpoints", commit["folder"]), commit["validation"]
    loss = validation.get("loss") if validation.get("step") == commit["step"] else None
    tags = {"uri": uri, "step": commit["step"], "fingerprint": run.build.split("/")[-2], "loss": loss, "audiolm.step": run.name,
            "audiolm.build": run.build, "audiolm.index": index, "audiolm.export": "yes" if "export" in commit else "no"}
    return {k: hide_credentials(v) for k, v in tags.items() if v is not None}


def _point(client: Any, name: str, run: TrackedRun, shown: ShownCheckpoints) -> None:
    there = {file: version for file, (_, version, pruned) in shown.commits.items() if not pruned}
    newest = get_json(join(run.build, "commits", max(there))) if there else None
    best = newest and there.get(f"{newest.get('best_step') or 0:08d}.json")
    if best and shown.best != best:
        client.set_registered_model_alias(name, "best", best)
        shown.best = best


SYSTEM_TAG = "audiolm.system"


def deliver_system(client: Any, experiment_id: str, run: TrackedRun) -> None:
    """Registers `run.system`, unless it is there. Raises when the server does not answer."""
    from mlflow.exceptions import MlflowException

    name = name_of(run.name)
    digest = hashlib.sha256(json.dumps([name, run.system["steps"]], sort_keys=True).encode()).hexdigest()[:16]
    if client.search_model_versions(f"name = '{name}' and tags.`{SYSTEM_TAG}` = '{digest}'"):
        return
    model = _logged(client, experiment_id, run, digest)
    try:
        client.create_registered_model(name)
    except MlflowException as e:
        if e.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # not models:/ID, which an SQLite client looks up in the MLflow of this process's global state
    client.create_model_version(name, model.artifact_location, run.run_id, {SYSTEM_TAG: digest}, model_id=model.model_id,
                                await_creation_for=None)


def _logged(client: Any, experiment_id: str, run: TrackedRun, digest: str) -> Any:
    """The server's LoggedModel of this system, made where there is none."""
    for model in client.search_logged_models([experiment_id], f"tags.`{SYSTEM_TAG}` = '{digest}'"):
        if str(model.status) == "READY":
            return model
        client.delete_logged_model(model.model_id)  # made, and nothing more
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
