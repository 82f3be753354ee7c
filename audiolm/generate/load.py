"""A run's trained system: from the folders of its steps, or its run index, to an AudioLM that generates.

A run's index (dag/run_index.py) names the folder of each step's finished build.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from audiolm import store
from audiolm.dag.ancestry import check_one_run
from audiolm.dag.outputs import build_of
from audiolm.dag.run_index import GENERATION_STEPS, SYSTEM_STEPS, left_out, missing_of, no_step, steps_of

if TYPE_CHECKING:
    from audiolm.generate.audiolm import AudioLM
    from audiolm.generate.params import SamplingParams


def system_steps(index_path: str) -> dict[str, str]:
    """Folders by step that a system is loaded from. Raises ValueError that names the steps which are not finished, or were
    made of other builds than the run has now."""
    steps = steps_of(index_path)
    others = left_out(index_path)  # a decoder that may be missing may not be of another codec
    missing = [name for name in GENERATION_STEPS if name in others or name in missing_of(SYSTEM_STEPS, steps)]
    if not missing and "lm_coarse" in steps and "lm_fine" not in steps and _needs_fine(steps):
        missing = ["lm_fine"]
    if missing:
        raise ValueError(f"--run: {no_step(index_path, missing)}; the command that began the run goes on with it: "
                         "python workflows/full_pipeline.py CONFIG.yaml")
    return {name: steps[name] for name in GENERATION_STEPS if name in steps}


def sampling_of(index_path: str) -> dict[str, SamplingParams]:
    """The sampling parameters by stage of a run's config, `samples`; the paper's where its index has none."""
    from audiolm.config.lm import SamplesConfig
    from audiolm.generate.params import params_from_config

    config = (store.get_json(index_path) or {}).get("config", {})
    return params_from_config(SamplesConfig(**config.get("samples", {})))


def _needs_fine(steps: Mapping[str, str]) -> bool:
    """True where the codec has more levels than the coarse stage predicts."""
    from audiolm.tokenizers.acoustic import load_codec

    export = store.get_json(store.join(steps["lm_coarse"], "export", "config.json"))
    return export is not None and export["stage"]["levels"][1] < load_codec(steps["codec"]).spec.n_q


@lru_cache(maxsize=1)
def load_system(steps: tuple[tuple[str, str], ...], device: str,
                sampling: tuple[tuple[str, SamplingParams], ...] | None) -> AudioLM:
    """`load`, once a process: a worker keeps the models from task to task. Tuples, as the cache's key must be hashable."""
    return load(dict(steps), device, sampling=dict(sampling) if sampling else None)


def load(paths: Mapping[str, str], device: str = "cpu", mean_run: float | None = None,
         sampling: Mapping[str, SamplingParams] | None = None) -> AudioLM:
    """The system from the steps' output folders: kmeans, codec, lm_semantic, lm_coarse and (where Q' < Q) lm_fine, or
    lm_parallel in their place; lm_decoder where it was trained.

    `mean_run` defaults to the fact of that name of the `semantic_tokens` folder. The tokenizer computes as it did for that
    store, in float32 without one. The stages run in bfloat16 on a GPU.
    Raises ValueError for a missing step and for stages that were trained on another tokenizer's tokens.
    """
    from audiolm.data.tokens import tokenizer_dtype
    from audiolm.generate.audiolm import AudioLM
    from audiolm.generate.params import PAPER_PARAMS, STAGES
    from audiolm.lm.model import load_lm
    from audiolm.tokenizers.acoustic import load_codec
    from audiolm.tokenizers.hearing import load_hearing
    from audiolm.tokenizers.semantic import load_semantic

    if missing := missing_of(("kmeans", "codec", "lm_semantic", "lm_coarse"), paths):
        raise ValueError(f"step {missing[0]} is missing, there are {sorted(paths)}: run the pipeline up to it")
    check_one_run(paths)
    if mean_run is None:
        mean_run = _mean_run(paths)
    models = {name: load_lm(paths[f"lm_{name}"], device) for name in (*STAGES, "parallel")
              if f"lm_{name}" in paths}
    if device != "cpu":
        models = {name: (model.bfloat16(), stage) for name, (model, stage) in models.items()}
    dtype = tokenizer_dtype(paths["semantic_tokens"]) if "semantic_tokens" in paths else "float32"
    codec = load_codec(paths["codec"], device)
    hearing = load_hearing(paths["lm_decoder"], codec, device) if "lm_decoder" in paths else None
    return AudioLM(load_semantic(paths["kmeans"], device, dtype), codec, models, float(mean_run),
                   dict(sampling or PAPER_PARAMS), hearing, device)


def _mean_run(paths: Mapping[str, str]) -> float:
    """Semantic frames per deduplicated token, as the finished semantic_tokens step counted them."""
    if "semantic_tokens" not in paths:
        raise ValueError("pass mean_run, or the semantic_tokens step's folder in paths")
    done = store.get_json(store.join(build_of(paths["semantic_tokens"]), "done.json"))
    if done is None:
        raise ValueError(f"{paths['semantic_tokens']} holds no finished semantic_tokens step: run it")
    return done["facts"]["mean_run"]
