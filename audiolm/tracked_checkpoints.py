"""A training's checkpoints as MLflow's models: one a commit, without copying weights (STACK 5). Found by commits.

A model's tags say where it lies (`uri`) and, once it is so, `pruned`; its parameter is the step, its metrics are those of
the validation at that step.  Everything may be sent again: what the server has is asked for first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from audiolm.outbox import Run, key, mask
from audiolm.store import get_json, join, names

Shown = dict[str, tuple[str, bool]]  # name of a commit's file -> (the model's id, whether it is shown as pruned)


def deliver(client: Any, experiment_id: str, run: Run, shown: Shown, log: Callable[[Run, list[tuple]], None]) -> None:
    """Tells an MlflowClient of commits that it does not know yet and of those that were pruned; `log` sends metrics
    (key, value, time in ms, step, model id). `shown` is this function's memory; raises when the server does not answer."""
    if run.build is None:
        return
    there = names(join(run.build, "commits"))
    if set(there) == shown.keys() and run.status is None:
        return  # checkpoints are pruned when another was committed
    try:
        if not shown:
            shown |= _known(client, experiment_id, run)
        for name in there:
            model, pruned = shown.get(name, (None, False))
            commit = None if pruned else get_json(join(run.build, "commits", name))
            if commit is None:
                continue
            if model is None:
                model = _make(client, experiment_id, run, commit, log)
            if commit.get("pruned"):
                client.set_logged_model_tags(model, {"pruned": "true"})
            shown[name] = model, bool(commit.get("pruned"))
    except Exception:
        shown.clear()  # it may have arrived: ask again
        raise


def _known(client: Any, experiment_id: str, run: Run) -> Shown:
    found, token = {}, None
    while True:
        page = client.search_logged_models([experiment_id], f"tags.`audiolm.build` = '{mask(run.build)}'", page_token=token)
        for model in page:
            if str(model.status) == "READY":
                found[f"{int(model.params['step']):08d}.json"] = model.model_id, "pruned" in model.tags
            else:  # made, and nothing more
                client.delete_logged_model(model.model_id)
        token = page.token
        if not token:
            return found


def _make(client: Any, experiment_id: str, run: Run, commit: dict, log: Callable[[Run, list[tuple]], None]) -> str:
    step, validation = commit["step"], commit["validation"]
    uri = join(run.build, "checkpoints", commit["folder"])
    tags = {"uri": uri, "audiolm.build": run.build, **({"export": join(uri, "export")} if "export" in commit else {})}
    model = client.create_logged_model(experiment_id, f"{run.name}-{step}", run.run_id, {k: mask(v) for k, v in tags.items()},
                                       {"step": str(step)}, "checkpoint").model_id
    if validation.get("step") == step and commit.get("validated"):
        at_ms = round(commit["validated"] * 1000)  # the time stamp of the metrics file's row: so a curve has it once
        log(run, [(key(f"val.{k}"), v, at_ms, step, model) for k, v in validation.items()
                  if k != "step" and isinstance(v, (int, float)) and math.isfinite(v)])
    client.finalize_logged_model(model, "READY")
    return model
