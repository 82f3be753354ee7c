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
from dataclasses import replace
from typing import Any

from audiolm import store
from audiolm.config.pipeline import Pipeline
from audiolm.dag.run_index import SYSTEM_STEPS
from audiolm.data.parallel import cluster_device
from audiolm.eval.results import Result, not_measured
from audiolm.eval.suites.attention import attention_suite
from audiolm.eval.suites.base import SuiteContext, SuiteReport
from audiolm.eval.suites.detector import detector_suite
from audiolm.eval.suites.dnsmos import dnsmos_suite
from audiolm.eval.suites.frechet import frechet_suite
from audiolm.eval.suites.ladder import ladder_suite
from audiolm.eval.suites.losses import losses_suite
from audiolm.eval.suites.notes import notes_suite
from audiolm.eval.suites.speakers import speakers_suite
from audiolm.eval.suites.temperatures import temperatures_suite
from audiolm.eval.suites.text import text_suite
from audiolm.eval.suites.tokens import tokens_suite
from audiolm.eval.suites.wer import wer_suite
from audiolm.eval.suites.zerospeech import zerospeech_suite

TABLE_SUITES: dict[str, Callable[[Any], list[Result]]] = {
    "abx": tokens_suite, "wer": wer_suite, "speakers": speakers_suite, "detector": detector_suite, "likelihood": zerospeech_suite,
    "attention": attention_suite, "temperatures": temperatures_suite, "fad": frechet_suite, "dnsmos": dnsmos_suite, "text": text_suite, "notes": notes_suite}
OPTIONAL = ("dnsmos", "text", "notes")  # slow, or for some corpora: run where they are named
NEEDS = {**dict.fromkeys(TABLE_SUITES, SYSTEM_STEPS), "abx": ("kmeans", "codec"),
         "likelihood": ("kmeans", "semantic_tokens", "lm_semantic")}
SUITES: dict[str, Callable[[SuiteContext], list[Result]]] = {"stages": losses_suite, "ladder": ladder_suite, **TABLE_SUITES}
DEFAULT = tuple(name for name in SUITES if name not in OPTIONAL)
HEARD = SUITES.keys() - {"stages", "abx", "likelihood"}  # those that choose clips of a manifest


def run_suites(steps: Mapping[str, str], names: Sequence[str], folder: str, config: Pipeline, out: Any, *, cache: str,
         manifest: str | None = None) -> SuiteReport:
    """The same without the page."""
    names = check_names(names) or DEFAULT
    device, rows, sounds = cluster_device(config.cluster, out.inline), [], []
    ask = SuiteContext(steps, config, "", device, out)
    for name in names:
        its = {**steps, "manifest": manifest} if manifest and name in HEARD else steps
        where = store.join(cache, f"{name}-{_digest(name, its, config)}")
        found, heard = _cached(name, replace(ask, steps=its, folder=where))
        rows += found
        sounds += [{**s, "file": store.join(where, s["file"])} for s in heard]
    store.put_json(store.join(folder, "rows.json"), [r.to_json() for r in rows])
    return SuiteReport(rows, sounds, folder)


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


def _cached(name: str, ask: SuiteContext) -> tuple[list[Result], list[dict]]:
    if missing := [s for s in NEEDS.get(name, ()) if s not in ask.steps]:
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
        rows = [Result(**r) for r in kept]
    return rows, store.get_json(store.join(ask.folder, "sounds.json")) or []
