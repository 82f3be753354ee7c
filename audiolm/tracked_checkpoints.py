"""A training's checkpoints as MLflow's models, one a commit, without copying weights (STACK 5). Found by commits.

Each is a LoggedModel (config and step as parameters, the validation at that step as metrics) and a version of the registered
model `{run name}-{step}`, whose tags say where it lies (`uri`) and, once it is so, `pruned`.  The alias `best` follows the
build that was trained last; `latest` is MLflow's own, the highest version.  Everything may be sent again: what the server
has is asked for first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from audiolm import tracked_versions as versions
from audiolm.identity import flatten
from audiolm.outbox import Run, key, mask
from audiolm.store import get_json, join, names


@dataclass
class Shown:
    """What the server has: by a commit's file (model, version, whether both say pruned), and where `best` points."""

    commits: dict[str, tuple[Any, str | None, bool]] = field(default_factory=dict)
    best: str | None = None


def deliver(client: Any, experiment_id: str, run: Run, owner: tuple[str, str], shown: Shown,
            log: Callable[[Run, list[tuple]], None]) -> None:
    """Tells an MlflowClient of commits that it does not know yet and of those that were pruned; `owner`: the pipeline run's
    name and index; `log` sends metrics (key, value, time in ms, step, model id). `shown` is this function's memory; raises
    when the server does not answer."""
    if run.build is None:
        return
    there = names(join(run.build, "commits"))
    if set(there) == shown.commits.keys() and run.status is None:
        return  # checkpoints are pruned when another was committed
    name = versions.name_of(owner[0], run.name)
    try:
        known = {} if shown.commits else _known(client, experiment_id, run)
        registered = versions.by_model(client, name) if known else {}
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
                    versions.prune(client, name, version)
            elif version is None:
                version = versions.create(client, name, run.run_id, model, _tags(run, owner[1], commit))
            shown.commits[file] = model, version, bool(commit.get("pruned"))
        _point(client, name, run, shown)
    except Exception:
        shown.commits.clear()  # it may have arrived: ask again
        shown.best = None
        raise


def _known(client: Any, experiment_id: str, run: Run) -> dict[str, Any]:
    """The server's models of this build by their commits' files."""
    found, token = {}, None
    while True:
        page = client.search_logged_models([experiment_id], f"tags.`audiolm.build` = '{mask(run.build)}'", page_token=token)
        for model in page:
            if str(model.status) == "READY":
                found[f"{int(model.params['step']):08d}.json"] = model
            else:  # made, and nothing more
                client.delete_logged_model(model.model_id)
        token = page.token
        if not token:
            return found


def _make(client: Any, experiment_id: str, run: Run, commit: dict, log: Callable[[Run, list[tuple]], None]) -> Any:
    step, validation = commit["step"], commit["validation"]
    uri = join(run.build, "checkpoints", commit["folder"])
    tags = {"uri": uri, "audiolm.build": run.build, **({"export": join(uri, "export")} if "export" in commit else {})}
    config = (get_json(join(run.build.rsplit("/", 1)[0], "recipe.json")) or {}).get("config", {})
    params = {key(k): mask(v)[:5000] for k, v in flatten(config).items()}
    model = client.create_logged_model(experiment_id, f"{run.name}-{step}", run.run_id, {k: mask(v) for k, v in tags.items()},
                                       {**params, "step": str(step)}, "checkpoint")
    if validation.get("step") == step and commit.get("validated"):
        at_ms = round(commit["validated"] * 1000)  # the time stamp of the metrics file's row: so a curve has it once
        log(run, [(key(f"val.{k}"), v, at_ms, step, model.model_id) for k, v in validation.items()
                  if k != "step" and isinstance(v, (int, float)) and math.isfinite(v)])
    return client.finalize_logged_model(model.model_id, "READY")


def _tags(run: Run, index: str, commit: dict) -> dict[str, str]:
    """A version's tags, all that evaluating it needs."""
    uri, validation = join(run.build, "checkpoints", commit["folder"]), commit["validation"]
    loss = validation.get("loss") if validation.get("step") == commit["step"] else None
    tags = {"uri": uri, "step": commit["step"], "fingerprint": run.build.split("/")[-2], "loss": loss, "audiolm.step": run.name,
            "audiolm.build": run.build, "audiolm.index": index, "audiolm.export": "yes" if "export" in commit else "no"}
    return {k: mask(v) for k, v in tags.items() if v is not None}


def _point(client: Any, name: str, run: Run, shown: Shown) -> None:
    there = {file: version for file, (_, version, pruned) in shown.commits.items() if not pruned}
    newest = get_json(join(run.build, "commits", max(there))) if there else None
    best = newest and there.get(f"{newest.get('best_step') or 0:08d}.json")
    if best and shown.best != best:
        client.set_registered_model_alias(name, "best", best)
        shown.best = best
