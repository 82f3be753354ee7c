"""Losses of the stages on held-out rows beside counting baselines, and the cost of another clip's prefix.

Nats per token, levels from 1.  A stage that does not beat its baselines has learned no more than frequencies; one whose loss
does not rise with another clip's prefix ignores its conditioning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from audiolm.eval.results import BASELINE_TITLES, STAGE_TITLES, Result, not_measured
from audiolm.eval.steps.stages import STAGES
from audiolm.eval.suites.base import SuiteContext, missing_steps

METRIC = "nats per token"


def losses_suite(context: SuiteContext) -> list[Result]:
    """Tables losses, conditioning and levels of the finished stages, in this order."""
    losses = [not_measured("losses", STAGE_TITLES[stage], METRIC, why) for stage in STAGES[:2]
              if (why := missing_steps(context, [stage]))]
    conditioning, levels = [], []
    finished = [stage for stage in STAGES if stage in context.steps]
    for stage, table in zip(finished, context.measure_parts(finished), strict=True):
        title = STAGE_TITLES[stage]
        losses += _loss_rows("losses", title, table["figures"])
        for figures in table["figures"].get("levels") or ():
            levels += _loss_rows("levels", f"{title}, level {figures['level']}", figures)
        if prefix := table["conditioning"]:
            n = prefix.get("rows", 0)
            conditioning += [Result("conditioning", title, METRIC, prefix["true"], n=n, of="rows"),
                             Result("conditioning", f"{title}: another clip's prefix", METRIC, prefix["shuffled"], n=n,
                                    of="rows", role="floor")]
    return [*losses, *conditioning, *levels]


def _loss_rows(table: str, item: str, figures: Mapping[str, Any]) -> list[Result]:
    """A loss and the baselines on the same tokens."""
    n = figures.get("tokens", 0)
    baselines = {title: figures.get(name) for name, title in BASELINE_TITLES.items() if name != "baseline"}
    return [Result(table, item, METRIC, figures["loss"], n=n, of="tokens"),
            *(Result(table, f"{item}: {title}", METRIC, loss, n=n, of="tokens", role="baseline")
              for title, loss in baselines.items() if loss is not None)]
