"""Named suites of an evaluation: each a function of an `Ask` that gives rows and, for what can be heard, `sounds.json`.

`run_suites` runs some on a system and leaves report.html and rows.json in a folder.  What a suite found is kept in `cache` by
the steps' folders, its name and the data (manifest, seed, config of the evaluation), and not computed again; rows that
were not measured are.  sounds.json: [{"group", "title", "file" (below the suite's folder), "prompt_s"}].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from audiolm.eval.results import BASELINE_TITLES, STAGE_TITLES, Result, not_measured
from audiolm.eval.steps.stages import STAGES
from audiolm.eval.suites.base import SuiteContext


def losses_suite(ask: SuiteContext) -> list[Result]:
    """Losses beside baselines, and what another clip's prefix costs."""
    there = [s for s in STAGES if s in ask.steps]
    rows = [not_measured("losses", STAGE_TITLES[s], "nats per token", f"the run has not finished {s} yet")
            for s in STAGES[:2] if s not in there]
    levels = []
    for name, found in zip(there, ask.parts(there), strict=True):
        rows += _loss_rows("losses", STAGE_TITLES[name], found["figures"])
        for figures in found["figures"].get("levels") or ():
            levels += _loss_rows("levels", f"{STAGE_TITLES[name]}, level {figures['level']}", figures)
        if used := found["conditioning"]:
            rows += [Result("conditioning", STAGE_TITLES[name], "nats per token", used["true"], n=used.get("rows", 0), of="rows"),
                     Result("conditioning", f"{STAGE_TITLES[name]}: another clip's prefix", "nats per token", used["shuffled"],
                         n=used.get("rows", 0), of="rows", role="floor")]
    return [*(r for r in rows if r.table == "losses"), *(r for r in rows if r.table != "losses"), *levels]


def _loss_rows(table: str, item: str, figures: Mapping[str, Any]) -> list[Result]:
    """A loss and what counting tells of the same tokens."""
    n = figures.get("tokens", 0)
    return [Result(table, item, "nats per token", figures["loss"], n=n, of="tokens"),
            *(Result(table, f"{item}: {title}", "nats per token", figures[base], n=n, of="tokens", role="baseline")
              for base, title in BASELINE_TITLES.items() if base != "baseline" and figures.get(base) is not None)]
