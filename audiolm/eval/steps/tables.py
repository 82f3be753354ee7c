"""The step `tables`: the paper's tables (2209.03143, IV) of the trained system, as far as its data allow.

Leaves rows.json (eval.results.Result) and heard.json ([{"group", "title", "file", "prompt_s"}], files below the build).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from audiolm import store
from audiolm.config.pipeline import Pipeline
from audiolm.config.run import RunConfig
from audiolm.config.semantic import SemanticConfig
from audiolm.eval.suites.run import run_suites


def measure_tables(config: Mapping[str, Any], inputs: Mapping[str, Any], out: Any) -> dict[str, Any]:
    """Step function. config: tables, samples, evaluate, lm, abx, corpus, seed, cluster; inputs: manifest, kmeans,
    codec, both token stores, the stages and, where there are, residual and semantic_vocoder. Returns our values by name."""
    suites_config = Pipeline(run=RunConfig(seed=config["seed"]), semantic=SemanticConfig(abx=config["abx"]),
                             **{k: config[k] for k in ("cluster", "corpus", "samples", "evaluate", "lm", "tables")})
    steps = {name: artifact.path for name, artifact in inputs.items()}
    rows, sounds = [], []
    if names := suites_config.tables.suites:  # none named means none here, not the default ones
        report = run_suites(steps, names, out.path, suites_config, out, cache=store.join(out.path, "suites"))
        rows, sounds = report.rows, report.sounds
    out.check()
    home = f"{out.path.rstrip('/')}/"
    store.put_json(store.join(out.path, "heard.json"), [{**s, "file": s["file"].removeprefix(home)} for s in sounds])
    ours = {f"{r.table}/{r.item}/{r.metric}": r.value for r in rows if r.value is not None and r.role == "ours"}
    missing = sorted({r.table for r in rows if r.value is None})
    return {**ours, "rows": len(rows), "notes": [f"not measured: {', '.join(missing)}"] if missing else []}
