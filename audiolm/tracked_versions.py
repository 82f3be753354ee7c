"""The registered model of a training, `{run name}-{step}`, and its versions, one a checkpoint: made, found, pruned."""

from __future__ import annotations

import re
from typing import Any

MODEL = "audiolm.model"
ASK = ("To evaluate it within its run's system, set the tag `evaluate` to `requested` (and `evaluate.suites` to some of "
       "the suites, where not all are wanted) while `python workflows/evaluate.py --watch` runs.")
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
