"""A run's trained system: from a run's name, index or MLflow id to an AudioLM that generates.

A run's index is `{store}/runs/{name}.json`: of each step the folder of its finished build.
"""

from __future__ import annotations

from audiolm import store
from audiolm.config.pipeline import Pipeline
from audiolm.store import hide_credentials_in, join, put_json

OUTPUTS = "./outputs"
SYSTEM_STEPS = ("kmeans", "codec", "semantic_tokens", "lm_semantic", "lm_coarse")


def steps_of(index_path: str) -> dict[str, str]:
    """The folder of every finished step that a run's index names. Raises ValueError where there is no index."""
    try:
        index = store.get_json(index_path)
    except ValueError:  # no JSON
        index = {}
    if index is None:
        raise ValueError(f"--run: there is no run index {index_path}; train with `python workflows/full_pipeline.py`, or name "
                         "a run, its OUTPUTS/runs/NAME.json or its MLflow run id")
    if "steps" not in index:
        raise ValueError(f"--run: {index_path} is not a run's index (OUTPUTS/runs/NAME.json)")
    return {name: entry["path"] for name, entry in index["steps"].items()}


def index_path(cfg: Pipeline) -> str:
    return join(cfg.store, "runs", f"{cfg.run.name}.json")


def write_index(cfg: Pipeline, steps: dict[str, dict]) -> None:
    """runs/{run}.json: the human index, step -> path (DESIGN 4), and the config, without credentials, for evaluations."""
    put_json(index_path(cfg), {"run": cfg.run.name, "corpus": cfg.corpus.name, "steps": steps,
                               "config": hide_credentials_in(cfg.model_dump(mode="json"))})
