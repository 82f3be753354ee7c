"""A run's index, `{store}/runs/{name}.json`: the folder of each step's finished build, and the run's config.

Steps are addressed by recipe, runs by name: the index leads from the one to the other.  It holds no credentials.
It is derived from `{store}/runs/{name}/{step}.json`, one file a step, so that two drivers of one run lose no entry: a step is
written whole, and an index that lacks one is written again by the driver that added it.  A step that was made of another
build than the one beside it, as of an earlier config's codec, is left out, and the index says so under `left_out`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

from audiolm import store
from audiolm.config.pipeline import Pipeline
from audiolm.config.run import check_run_name
from audiolm.dag.ancestry import check_one_run, misfits
from audiolm.store import get_json, hide_credentials_in, put_json

OUTPUTS = "./outputs"
# What a system is loaded from: its models, and the tokens whose mean run length turns seconds into tokens.
# A parallel decoder takes the place of the coarse stage; a codec all of whose levels are coarse has no fine stage.  A decoder
# that hears takes the place of the codec's own, where it was trained.
SYSTEM_STEPS = ("kmeans", "codec", "semantic_tokens", "lm_semantic", "lm_coarse")
GENERATION_STEPS = (*SYSTEM_STEPS, "lm_fine", "lm_parallel", "lm_decoder")


def index_path(folder: str, run: str) -> str:
    """The index of a run by its name, in a store. Raises ValueError for a name with slashes."""
    return store.join(folder, "runs", f"{check_run_name(run)}.json")


def missing_of(needed: Iterable[str], steps: Container[str]) -> list[str]:
    """The needed steps that `steps` lacks."""
    return [name for name in needed if name not in steps and not (name == "lm_coarse" and "lm_parallel" in steps)]


def steps_of(index: str) -> dict[str, str]:
    """The folder of every finished step that a run's index names.

    Raises ValueError where there is no index, MixedRun where its steps are no one system.
    """
    steps = paths_of(index)
    check_one_run(steps)
    return steps


def paths_of(index: str) -> dict[str, str]:
    """As `steps_of`, whether the steps are one system or not."""
    try:
        found = get_json(index)
    except ValueError:  # no JSON
        found = {}
    if found is None:
        raise ValueError(f"--run: there is no run index {index}; train with `python workflows/full_pipeline.py`, or name "
                         "a run, its OUTPUTS/runs/NAME.json or its MLflow run id")
    if "steps" not in found:
        raise ValueError(f"--run: {index} is not a run's index (OUTPUTS/runs/NAME.json)")
    return {name: _absolute(entry["path"], index) for name, entry in found["steps"].items()}


def left_out(index: str) -> dict[str, str]:
    """{step: reason} of the steps that a run has built, but of other builds than its index names."""
    return (get_json(index) or {}).get("left_out", {})


def no_step(index: str, missing: Iterable[str]) -> str:
    """The line for steps that an index does not name, with the reason of the first that was left out."""
    missing, others = list(missing), left_out(index)
    why = next((f" ({others[name]})" for name in missing if name in others), "")
    return f"{index} names no finished step {', '.join(missing)}{why}"


def _absolute(path: str, index: str) -> str:
    """A path of an index. A published system's are relative to the index, since it may lie anywhere."""
    return path if path.startswith("/") or "://" in path else store.join(index.rpartition("/")[0], path)


def write_index(cfg: Pipeline, steps: dict[str, dict], order: list[str]) -> str:
    """Adds steps, {name: {path, build, run_id}}, to a run's index; returns its path.

    Entries of an earlier plan stay where they fit those beside them, but for steps that are no part of the run any more.
    """
    path = index_path(cfg.store, cfg.run.name)
    folder = path.removesuffix(".json")
    for name, entry in steps.items():
        put_json(store.join(folder, f"{name}.json"), entry)
    while True:
        put_json(path, {"run": cfg.run.name, "corpus": cfg.corpus.name, **_entries(folder, order),
                        "config": hide_credentials_in(cfg.model_dump(mode="json"))})
        written = (get_json(path) or {}).get("steps", {})
        if all(written.get(name) == entry for name, entry in _entries(folder, order)["steps"].items()):
            return path  # else another driver wrote at the same time, and knew less


def _entries(folder: str, order: list[str]) -> dict[str, dict]:
    found = {name: entry for name in order if (entry := get_json(store.join(folder, f"{name}.json")))}
    others = misfits({name: entry["path"] for name, entry in found.items()})
    return {"steps": {name: entry for name, entry in found.items() if name not in others}, "left_out": others}
