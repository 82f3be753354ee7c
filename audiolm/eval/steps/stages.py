"""The step `evaluate`: losses beside baselines, use of the conditioning, token statistics, and the stage ladder.

Parts run in parallel as tasks, each from the artifacts' paths.  `{out.path}/evaluate.json` holds the tables (levels
count from 1, losses in nats per token, mel distances in nats), `{out.path}/wav/` the ladder's audio.
Held-out means: dev for the stages' losses, test (dev where there is none) for the ladder.
"""

from __future__ import annotations

import time
from collections.abc import Container
from typing import Any

from audiolm import store
from audiolm.config.corpus import ClipFilter
from audiolm.config.lm import LMConfig
from audiolm.data.parallel import cluster_device, parallel_map
from audiolm.data.sources import roots
from audiolm.eval.ladder import held_out, ladder, seconds_within
from audiolm.eval.metrics import likelihood, token_statistics
from audiolm.generate.load import load
from audiolm.generate.params import params_from_config

STAGES = ("lm_semantic", "lm_coarse", "lm_fine", "lm_parallel")
BASELINES = ("unigram", "bigram", "fivegram", "previous", "below")


def run_evaluate(config: dict[str, Any], inputs: dict[str, Any], out: Any) -> dict[str, Any]:
    """Step function. config: evaluate, samples, lm (its `where`s; without it all clips), corpus, cluster, seed; inputs:
    manifest, kmeans, codec, both token stores and the stages' artifacts (lm_fine where there is one). Writes
    evaluate.json; returns its main figures, flat.

    Raises ValueError where nothing is held out.
    """
    began = time.monotonic()
    paths = {name: artifact.path for name, artifact in inputs.items()}
    cluster = config["cluster"]
    settings = {"lm": LMConfig(), **{k: v for k, v in config.items() if k != "cluster"}}
    stages = [s for s in STAGES if s in paths]
    parts = ["ladder", *stages[::-1], "tokens"]  # the longest first
    device = cluster_device(cluster, out.inline)
    items = [(part, settings, paths, out.path, device) for part in parts]
    results = parallel_map(evaluate_part, items, out=out, cluster=cluster, unit="parts", gpu=device == "cuda")
    tables = dict(zip(parts, results, strict=True))
    losses = {s: tables[s]["figures"] for s in stages}
    table = {"stages": losses, "tokens": tables["tokens"], "ladder": tables["ladder"],
             "not_under": likelihood.above_baseline(losses),
             "conditioning": {s: tables[s]["conditioning"] for s in stages if tables[s]["conditioning"]}}
    store.put_json(store.join(out.path, "evaluate.json"), table)
    return {**flat_facts(table), "seconds": round(time.monotonic() - began, 3)}


def evaluate_part(part: str, config: dict[str, Any], paths: dict[str, str], folder: str, device: str) -> Any:
    """One task: a part's table, as plain JSON values."""
    if part == "tokens":
        return token_statistics.sampled_statistics(paths["semantic_tokens"])
    if part in STAGES:
        where = getattr(config["lm"], part.removeprefix("lm_")).where
        return likelihood.measure_stage(part, paths, where, config["evaluate"].rows, config["seed"], device)
    evaluate, samples = config["evaluate"], config["samples"]
    system = load(paths, device, sampling=params_from_config(samples))
    clips = held_out(paths["manifest"], roots(config["corpus"]), evaluate.clips, seconds_within(system, evaluate.clip_s),
                     ladder_filter(config["lm"], paths))
    return ladder(system, clips, samples.prompt_s, config["seed"], folder)


def ladder_filter(lm: LMConfig, steps: Container[str]) -> ClipFilter:
    """The clips that the last acoustic stage may learn from; the ladder's are held-out ones of these."""
    return next(getattr(lm, name).where for name in ("parallel", "fine", "coarse") if f"lm_{name}" in steps)


def flat_facts(table: dict[str, Any]) -> dict[str, float]:
    """The main figures by dotted name."""
    facts: dict[str, float] = {}
    for name, figures in table["stages"].items():
        facts |= {f"{name}.{k}": figures[k] for k in ("loss", *BASELINES, "baseline", "difference_percent")
                  if figures.get(k) is not None}
    for row in table["not_under"]:  # a fact of its own, so that a run's page shows the failure
        facts[f"over_baseline.{row['stage']}" + (f".level{row['level']}" if row["level"] else "")] = row["percent"]
    for name, losses in table["conditioning"].items():
        facts |= {f"{name}.conditioning.{k}": v for k, v in losses.items()}
    facts |= {f"tokens.{k}": v for k, v in table["tokens"].items()}
    facts |= {f"ladder.{row['rung'].replace(', ', ' ').replace(' ', '_')}.mel": row["mel"] for row in table["ladder"]}
    return {k: round(float(v), 6) for k, v in facts.items()}
