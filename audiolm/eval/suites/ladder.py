"""Named suites of an evaluation: each a function of an `Ask` that gives rows and, for what can be heard, `sounds.json`.

`run_suites` runs some on a system and leaves report.html and rows.json in a folder.  What a suite found is kept in `cache` by
the steps' folders, its name and the data (manifest, seed, config of the evaluation), and not computed again; rows that
were not measured are.  sounds.json: [{"group", "title", "file" (below the suite's folder), "prompt_s"}].
"""

from __future__ import annotations

from audiolm import store
from audiolm.dag.run_index import SYSTEM_STEPS
from audiolm.eval.results import Result, not_measured
from audiolm.eval.suites.base import SuiteContext


def ladder_suite(ask: SuiteContext) -> list[Result]:
    """The stage ladder's mel distances, and its sound."""
    metric = "mel distance, nats"
    if missing := [s for s in SYSTEM_STEPS if s not in ask.steps]:
        return [not_measured("ladder", "stage ladder", metric, f"the run has not finished {', '.join(missing)} yet")]
    (rungs,) = ask.parts(["ladder"])
    sounds = [{"group": r["rung"], "title": f["clip"], "file": f["file"], "prompt_s": None} for r in rungs for f in r["files"]]
    store.put_json(store.join(ask.folder, "sounds.json"), sounds)
    return [Result("ladder", r["rung"], metric, r["mel"], n=len(r["files"]),
                role="ceiling" if r["rung"].startswith("codec") else "ours") for r in rungs if r["rung"] != "original"]
