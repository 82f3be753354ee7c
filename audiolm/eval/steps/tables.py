"""Step `tables`: the paper's tables of the trained system, all that its data allow (paper IV).

Leaves rows.json (eval.results.Row) and heard.json ([{"group", "title", "file", "prompt_s"}], files below the build).
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
    codec, both token stores, the stages and, where there are, residual and semantic_vocoder. Returns our figures by name."""
    asked = Pipeline(run=RunConfig(seed=config["seed"]), semantic=SemanticConfig(abx=config["abx"]),
                     **{k: config[k] for k in ("cluster", "corpus", "samples", "evaluate", "lm", "tables")})
    steps = {name: artifact.path for name, artifact in inputs.items()}
    cache = store.join(out.path, "suites")
    report = run_suites(steps, asked.tables.suites, out.path, asked, out, cache=cache) if asked.tables.suites else None
    out.check()
    rows = report.rows if report else []
    heard = [{**s, "file": s["file"].removeprefix(f"{out.path.rstrip('/')}/")} for s in report.sounds] if report else []
    store.put_json(store.join(out.path, "heard.json"), heard)
    told = {f"{r.table}/{r.item}/{r.metric}": r.value for r in rows if r.value is not None and r.role == "ours"}
    missing = sorted({r.table for r in rows if r.value is None})
    return {**told, "rows": len(rows), "notes": [f"not measured: {', '.join(missing)}"] if missing else []}
