"""Marks of a MOS predictor in transformers' format (`tables.mos_model`), beside DNSMOS and over the same spans.

Marks are the model's own output, so their scale is the one that it was trained on: only rows of one model compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from audiolm.eval.generated import LABELS, Sample
from audiolm.eval.models.hf_scorers import mos_predictor
from audiolm.eval.results import Progress, Result, no_progress, not_measured
from audiolm.eval.suites.base import SuiteContext, continuations
from audiolm.eval.suites.dnsmos import PLAN, mark_rows

METRIC = "predicted mark"


def mos_results(samples: Sequence[Sample], predict: Callable[[np.ndarray], float], note: str = "", seed: int = 0,
                progress: Progress = no_progress) -> list[Result]:
    """Marks of each mode, and of originals in noise. `predict`: wav_T -> mark."""
    return mark_rows("MOS", (METRIC,), lambda wav_T: (predict(wav_T),), samples, note, seed, progress)


def mos_suite(context: SuiteContext) -> list[Result]:
    """Marks of continuations and acoustic generation beside originals and codec; one row where there is no model."""
    model = context.config.tables.mos_model
    try:
        if model is None:
            raise ValueError("no MOS predictor: name the folder of a ...ForSequenceClassification model with one label, "
                             "tables.mos_model=FOLDER")
        predict = mos_predictor(model, context.device)  # before the sounds, which may take minutes
    except (ImportError, ValueError) as e:
        return [not_measured("MOS", LABELS["continuation"], METRIC, str(e))]
    return mos_results(continuations(context, PLAN), predict, f"by {model}", context.seed, context.progress)
