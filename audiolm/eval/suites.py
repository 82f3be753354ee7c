"""Named suites of an evaluation: each a function of an `Ask` that gives rows and, for what can be heard, `sounds.json`.

`run_suites` runs some on a system and leaves report.html and rows.json in a folder.  What a suite found is kept in `cache` by
the steps' folders, its name and the data (manifest, seed, config of the evaluation), and not computed again; rows that
were not measured are.  sounds.json: [{"group", "title", "file" (below the suite's folder), "prompt_s"}].
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from audiolm import store
from audiolm.config import Pipeline
from audiolm.data.shards import device_of, fan_out
from audiolm.eval import figures_page, table_suites
from audiolm.eval.evaluate import STAGES, evaluate_part
from audiolm.eval.figures import Row, not_measured
from audiolm.eval.report import BASELINES, NAMES


@dataclass(frozen=True)
class Ask:
    """What a suite is asked: the system's steps (folders), the run's config, where it may write, the device, and `out`, which
    fan_out reports to."""

    steps: Mapping[str, str]
    config: Pipeline
    folder: str
    device: str
    out: Any

    def parts(self, names: Sequence[str]) -> list[Any]:
        """evaluate.py's parts, as tasks."""
        cfg = self.config
        settings = {"evaluate": cfg.evaluate, "samples": cfg.samples, "lm": cfg.lm, "corpus": cfg.corpus, "seed": cfg.run.seed}
        items = [(part, settings, dict(self.steps), self.folder, self.device) for part in names]
        return fan_out(evaluate_part, items, out=self.out, cluster=cfg.cluster, unit="parts", gpu=self.device == "cuda")


@dataclass(frozen=True)
class Report:
    rows: list[Row]
    sounds: list[dict]  # file: whole path
    folder: str


def stages(ask: Ask) -> list[Row]:
    """Losses beside baselines, and what another clip's prefix costs."""
    there = [s for s in STAGES if s in ask.steps]
    rows = [not_measured("losses", NAMES[s], "nats per token", f"the run has not finished {s} yet")
            for s in STAGES[:2] if s not in there]
    levels = []
    for name, found in zip(there, ask.parts(there), strict=True):
        rows += _beside("losses", NAMES[name], found["figures"])
        for figures in found["figures"].get("levels") or ():
            levels += _beside("levels", f"{NAMES[name]}, level {figures['level']}", figures)
        if used := found["conditioning"]:
            rows += [Row("conditioning", NAMES[name], "nats per token", used["true"], n=used.get("rows", 0), of="rows"),
                     Row("conditioning", f"{NAMES[name]}: another clip's prefix", "nats per token", used["shuffled"],
                         n=used.get("rows", 0), of="rows", role="floor")]
    return [*(r for r in rows if r.table == "losses"), *(r for r in rows if r.table != "losses"), *levels]


def _beside(table: str, item: str, figures: Mapping[str, Any]) -> list[Row]:
    """A loss and what counting tells of the same tokens."""
    n = figures.get("tokens", 0)
    return [Row(table, item, "nats per token", figures["loss"], n=n, of="tokens"),
            *(Row(table, f"{item}: {title}", "nats per token", figures[base], n=n, of="tokens", role="baseline")
              for base, title in BASELINES.items() if base != "baseline" and figures.get(base) is not None)]


def ladder(ask: Ask) -> list[Row]:
    """The stage ladder's mel distances, and its sound."""
    metric = "mel distance, nats"
    if missing := [s for s in ("kmeans", "codec", "semantic_tokens", "lm_semantic", "lm_coarse") if s not in ask.steps]:
        return [not_measured("ladder", "stage ladder", metric, f"the run has not finished {', '.join(missing)} yet")]
    (rungs,) = ask.parts(["ladder"])
    sounds = [{"group": r["rung"], "title": f["clip"], "file": f["file"], "prompt_s": None} for r in rungs for f in r["files"]]
    store.put_json(store.join(ask.folder, "sounds.json"), sounds)
    return [Row("ladder", r["rung"], metric, r["mel"], n=len(r["files"]),
                role="ceiling" if r["rung"].startswith("codec") else "ours") for r in rungs if r["rung"] != "original"]


SUITES: dict[str, Callable[[Ask], list[Row]]] = {"stages": stages, "ladder": ladder, **table_suites.SUITES}
DEFAULT = tuple(name for name in SUITES if name not in table_suites.OPTIONAL)
HEARD = SUITES.keys() - {"stages", "abx", "likelihood"}  # those that choose clips of a manifest


def run_suites(steps: Mapping[str, str], names: Sequence[str], folder: str, config: Pipeline, out: Any, *, cache: str,
               title: str, manifest: str | None = None) -> Report:
    """Runs suites (those of DEFAULT where none is named) on a system; writes report.html and rows.json into `folder`.
    `manifest`: whose held-out clips are heard, its own by default. Raises ValueError for an unknown suite and where nothing
    could be measured."""
    report = find(steps, names, folder, config, out, cache=cache, manifest=manifest)
    if all(r.value is None for r in report.rows):
        raise ValueError("nothing could be measured: " + "; ".join(dict.fromkeys(r.note for r in report.rows)))
    store.put(store.join(folder, "report.html"), figures_page.build(title, [("ours", report.rows, report.sounds)]).encode())
    return report


def find(steps: Mapping[str, str], names: Sequence[str], folder: str, config: Pipeline, out: Any, *, cache: str,
         manifest: str | None = None) -> Report:
    """The same without the page."""
    names = check_names(names) or DEFAULT
    device, rows, sounds = device_of(config.cluster, out.inline), [], []
    ask = Ask(steps, config, "", device, out)
    for name in names:
        its = {**steps, "manifest": manifest} if manifest and name in HEARD else steps
        where = store.join(cache, f"{name}-{_digest(name, its, config)}")
        found, heard = _cached(name, replace(ask, steps=its, folder=where))
        rows += found
        sounds += [{**s, "file": store.join(where, s["file"])} for s in heard]
    store.put_json(store.join(folder, "rows.json"), [r.to_json() for r in rows])
    return Report(rows, sounds, folder)


def check_names(names: Sequence[str]) -> list[str]:
    """The names, once each. Raises ValueError for one that is no suite."""
    if unknown := [n for n in names if n not in SUITES]:
        raise ValueError(f"no suite {', '.join(unknown)}: there are {', '.join(SUITES)}")
    return list(dict.fromkeys(names))


def _digest(name: str, steps: Mapping[str, str], config: Pipeline) -> str:
    told = {"evaluate": config.evaluate, "samples": config.samples, "lm": config.lm, "corpus": config.corpus,
            "tables": config.tables}
    what = {"suite": name, "steps": dict(steps), "seed": config.run.seed,
            "abx": config.semantic.abx and config.semantic.abx.model_dump(mode="json"),
            **{k: v.model_dump(mode="json") for k, v in told.items()}}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _cached(name: str, ask: Ask) -> tuple[list[Row], list[dict]]:
    if missing := [s for s in table_suites.NEEDS.get(name, ()) if s not in ask.steps]:
        return [not_measured(name, name, "–", f"the run has not finished {', '.join(missing)} yet")], []
    kept = store.get_json(store.join(ask.folder, "rows.json"))
    if kept is None:
        began = time.monotonic()
        try:
            rows = SUITES[name](ask)
        except ValueError as e:  # data that it needs are not there: the other suites go on, and this one's row says why
            return [not_measured(name, name, "–", str(e))], []
        spent = round((time.monotonic() - began) / max(1, len(rows)), 3)
        rows = [r if r.seconds else replace(r, seconds=spent) for r in rows]
        if all(r.value is not None for r in rows):
            store.put_json(store.join(ask.folder, "rows.json"), [r.to_json() for r in rows])  # last
    else:
        rows = [Row(**r) for r in kept]
    return rows, store.get_json(store.join(ask.folder, "sounds.json")) or []
