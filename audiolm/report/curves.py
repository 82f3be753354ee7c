"""Training curves of the report: pictures from the metrics files of a step's build.

Losses are in nats per token; the codec's training loss is a weighted sum, its validation the mel distance in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from audiolm.dag.outputs import build_of
from audiolm.eval.results import BASELINE_TITLES, STAGE_TITLES
from audiolm.metrics_log import read_build
from audiolm.render import plots
from audiolm.render.html import Section

TRAINED = ("masked_model", "codec", "lm_semantic", "lm_coarse", "lm_fine", "lm_parallel", "lm_decoder")
POINTS = 1000  # training points of a curve: about twice the picture's pixels

Add = Callable[[str, bytes, str], Any]


@dataclass(frozen=True)
class Curve:
    """A picture: its file, its title, what it plots, the metric of each line, and level lines."""

    file: str
    title: str
    y: str
    metrics: Mapping[str, str]
    baselines: Mapping[str, float] = field(default_factory=dict)

    def draw(self, rows: Sequence[Mapping[str, Any]], add: Add) -> list[Any]:
        """The picture as a list of one, empty where no row has one of the metrics."""
        values = {label: [r["metrics"].get(metric) for r in rows] for label, metric in self.metrics.items()}
        values = {label: v for label, v in values.items() if any(x is not None for x in v)}
        if not values:
            return []
        png = plots.curves([r["step"] for r in rows], values, self.title, self.y, self.baselines)
        return [add(self.file, png, f"{self.y} over the training of the {self.title}")]


def title_of(step: str) -> str:
    """masked_model_2 -> its name on the page."""
    _, _, iteration = step.partition("masked_model_")
    title = STAGE_TITLES.get(step, "masked audio model")
    return f"{title}, iteration {iteration}" if iteration else title


def training_rows(path: str, wanted: Callable[[str], bool]) -> list[dict[str, Any]]:
    """Rows of a training's metrics, given its outputs, that have a wanted one: all validations, at most POINTS of training."""
    rows = [r for r in read_build(build_of(path)) if any(map(wanted, r["metrics"]))]
    keep = set(np.linspace(0, len(rows) - 1, min(len(rows), POINTS)).round().astype(int).tolist())
    return [r for i, r in enumerate(rows) if i in keep or any(m.startswith("val.") for m in r["metrics"])]


def curves_section(paths: Mapping[str, str], stages: Mapping[str, Any], mean_spectrum: float | None, add: Add) -> Section:
    """Losses of every training step. `stages`: evaluate.json's losses with their baselines, drawn as level lines."""
    pictures, without = [], []
    iterations = [n for n in paths if n.startswith("masked_model_")]
    for name in (n for n in (TRAINED[0], *iterations, *TRAINED[1:]) if n in paths):
        rows = training_rows(paths[name], lambda m: m == "loss" or m.startswith("val."))
        if not rows:
            without.append(title_of(name))
            continue
        # the parallel decoder trains on levels that are masked in part, and is validated on whole ones
        training = "training, masked in part" if name == "lm_parallel" else "training"
        curves = _codec_curves(rows, mean_spectrum) if name == "codec" else [
            Curve(f"loss-{name}", title_of(name), "loss", {training: "loss", "validation": "val.loss"},
                  _baselines(stages.get(name, {})))]
        pictures += [picture for curve in curves for picture in curve.draw(rows, add)]
    return Section("curves", "Training", "curves.html", {"pictures": pictures, "without": without})


def _baselines(stage: Mapping[str, Any]) -> dict[str, float]:
    # `baseline` is the mean of each level's better one, so without levels it repeats another line
    return {title: stage[key] for key, title in BASELINE_TITLES.items()
            if stage.get(key) is not None and (key != "baseline" or stage.get("levels"))}


def _codec_curves(rows: Sequence[Mapping[str, Any]], mean_spectrum: float | None) -> list[Curve]:
    """The codec's training and validation loss apart, as they are not one quantity, and PESQ."""
    levels = sorted({k for r in rows for k in r["metrics"] if k.startswith("val.mel/q")})
    # 1, 2 and 4 levels and all of them: more lines are not told apart
    mel = {f"{i + 1} level{'s' * (i > 0)}": k for i, k in enumerate(levels) if i in (0, 1, 3, len(levels) - 1)}
    mel["not quantized"] = "val.mel/unquantized"
    baselines = {} if mean_spectrum is None else {"mean spectrum": mean_spectrum}
    return [Curve("loss-codec-training", "codec, training", "loss", {"training": "loss"}),
            Curve("loss-codec-validation", "codec, held-out crops", "mel distance", mel, baselines),
            Curve("codec-pesq", "codec, held-out crops", "PESQ", {"1 level": "val.pesq/q00", "all": "val.pesq"})]


def masked_model_curves(name: str, path: str, add: Add) -> list[Any]:
    """Accuracies and perplexities of one masked model, by all their parts; its loss is in `curves_section`."""
    rows = training_rows(path, lambda m: "accuracy" in m or "perplexity" in m)
    metrics = sorted({m for r in rows for m in r["metrics"]})
    curves = [Curve(f"{y}-{name}", title_of(name), y, {_label(m, y): m for m in metrics if y in m})
              for y in ("accuracy", "perplexity")]
    return [picture for curve in curves for picture in curve.draw(rows, add)]


def _label(metric: str, y: str) -> str:
    """val.prediction_perplexity -> prediction, validation."""
    part = metric.removeprefix("val.").replace(y, "").replace("_", " ").replace("/", " ").strip()
    return ", ".join(x for x in (part, "validation" if metric.startswith("val.") else "training") if x)
