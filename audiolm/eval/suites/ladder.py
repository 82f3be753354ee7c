"""The stage ladder: mel distance to the original with one more stage of the system at each rung, and its audio."""

from __future__ import annotations

from audiolm.dag.run_index import SYSTEM_STEPS
from audiolm.eval.results import Result, not_measured
from audiolm.eval.suites.base import SuiteContext, missing_steps, save_rungs

METRIC = "mel distance, nats"


def ladder_suite(context: SuiteContext) -> list[Result]:
    """Rows of all rungs but the original, whose distance is 0."""
    if why := missing_steps(context, SYSTEM_STEPS):
        return [not_measured("ladder", "stage ladder", METRIC, why)]
    (rungs,) = context.measure_parts(["ladder"])
    save_rungs(context, rungs)
    return [Result("ladder", r["rung"], METRIC, r["mel"], n=len(r["files"]),
                   role="ceiling" if r["rung"].startswith("codec") else "ours") for r in rungs if r["rung"] != "original"]
