"""The list of suites, and running some of them on a system.

`run_suites` writes rows.json to a folder.  Each suite works in a folder of `cache`, named by the suite and a digest of the
steps' folders and the config, so that nothing is measured twice: neither a second time, nor for another checkpoint what does
not depend on it.  A suite with a row that could not be measured runs again.
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
from audiolm.eval.suites.base import SuiteContext, SuiteReport, missing_steps
from audiolm.eval.suites.detector import detector_suite
from audiolm.eval.suites.dnsmos import dnsmos_suite
from audiolm.eval.suites.frechet import frechet_suite
from audiolm.eval.suites.ladder import ladder_suite
from audiolm.eval.suites.losses import losses_suite
from audiolm.eval.suites.mos import mos_suite
from audiolm.eval.suites.notes import notes_suite
from audiolm.eval.suites.salmon import salmon_suite
from audiolm.eval.suites.speakers import speakers_suite, voice_suite
from audiolm.eval.suites.temperatures import temperatures_suite
from audiolm.eval.suites.text import text_suite
from audiolm.eval.suites.tokenizers.codec import codec_suite
from audiolm.eval.suites.tokenizers.masked import masked_suite
from audiolm.eval.suites.tokens import tokens_suite
from audiolm.eval.suites.wer import wer_suite
from audiolm.eval.suites.zerospeech import zerospeech_suite
from audiolm.tokenizers.artifact import identities

SUITES: dict[str, Callable[[SuiteContext], list[Result]]] = {
    "stages": losses_suite,
    "ladder": ladder_suite,
    "abx": tokens_suite,
    "wer": wer_suite,
    "speakers": speakers_suite,
    "detector": detector_suite,
    "likelihood": zerospeech_suite,
    "attention": attention_suite,
    "temperatures": temperatures_suite,
    "fad": frechet_suite,
    "dnsmos": dnsmos_suite,
    "mos": mos_suite,
    "text": text_suite,
    "notes": notes_suite,
    "voice": voice_suite,
    "salmon": salmon_suite,
    "codec": codec_suite,
    "masked": masked_suite,
}
# Slow, or for some corpora only: these run where they are named.
OPTIONAL = ("dnsmos", "mos", "text", "notes", "voice", "salmon", "codec", "masked")
DEFAULT = tuple(name for name in SUITES if name not in OPTIONAL)
# Steps that a suite needs; the first two report unfinished steps in rows of their own.
NEEDS = {**dict.fromkeys(SUITES, SYSTEM_STEPS), "stages": (), "ladder": (), "abx": ("kmeans", "codec"),
         "likelihood": ("kmeans", "semantic_tokens", "lm_semantic"),
         "salmon": ("kmeans", "semantic_tokens", "lm_semantic"), "codec": ("manifest", "codec"),
         "masked": ("manifest", "masked_model")}
# The suite that answers for a checkpoint of a step that no language model is part of, and the config that it alone reads.
OF_CHECKPOINT = {"codec": "codec", "masked_model": "masked"}
OWN_SECTION = {"codec": "codec", "masked": "semantic"}
# Suites that choose clips of a manifest: two systems are compared on the clips of one of them.
CHOOSES_CLIPS = SUITES.keys() - {"stages", "abx", "likelihood", "salmon", "masked"}


def run_suites(steps: Mapping[str, str], names: Sequence[str], folder: str, config: Pipeline, out: Any, *, cache: str,
               manifest: str | None = None) -> SuiteReport:
    """Runs suites (none named: the default ones) on a system's steps {name: folder}; writes rows.json to `folder`.

    `manifest` takes the place of the system's own where clips are chosen."""
    device, rows, sounds = cluster_device(config.cluster, out.inline), [], []
    for name in check_names(names) or DEFAULT:
        suite_steps = {**steps, "manifest": manifest} if manifest and name in CHOOSES_CLIPS else steps
        suite_folder = store.join(cache, f"{name}-{digest(name, suite_steps, config)}")
        suite_rows, suite_sounds = _run_suite(name, SuiteContext(suite_steps, config, suite_folder, device, out))
        rows += suite_rows
        sounds += [{**s, "file": store.join(suite_folder, s["file"])} for s in suite_sounds]
    store.put_json(store.join(folder, "rows.json"), [r.to_json() for r in rows])
    return SuiteReport(rows, sounds, folder)


def check_names(names: Sequence[str], checkpoint_of: str | None = None) -> list[str]:
    """The names, once each; for a checkpoint of a codec or a masked model (a key of OF_CHECKPOINT) its suite, named or not.

    Raises ValueError for one that is no suite, or cannot answer for that checkpoint."""
    if unknown := [n for n in names if n not in SUITES]:
        raise ValueError(f"no suite {', '.join(unknown)}: there are {', '.join(SUITES)}")
    if checkpoint_of is None:
        return list(dict.fromkeys(names))
    own = OF_CHECKPOINT[checkpoint_of]
    if others := [n for n in names if n != own]:
        raise ValueError(f"{', '.join(others)} need{'s' * (len(others) < 2)} a whole system, and this is a checkpoint of "
                         f"{checkpoint_of}: name {own}, or none")
    return [own]


def digest(name: str, steps: Mapping[str, str], config: Pipeline) -> str:
    """A hash of all that a suite's rows, or sounds, depend on."""
    sections = {"evaluate": config.evaluate, "samples": config.samples, "lm": config.lm, "corpus": config.corpus,
                "tables": config.tables}
    depends = {"suite": name, "steps": identities(steps), "seed": config.run.seed,
               "abx": config.semantic.abx and config.semantic.abx.model_dump(mode="json"),
               **{k: v.model_dump(mode="json") for k, v in sections.items()}}
    if section := OWN_SECTION.get(name):
        depends[section] = getattr(config, section).model_dump(mode="json")
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]


def _run_suite(name: str, context: SuiteContext) -> tuple[list[Result], list[dict]]:
    """(rows, sounds) of a suite, from its folder where it has run before."""
    needed = (*NEEDS[name], "manifest") if name in CHOOSES_CLIPS or name == "stages" else NEEDS[name]
    if why := missing_steps(context, needed):
        return [not_measured(name, name, "–", why)], []
    cached = store.join(context.folder, "rows.json")
    if (saved := store.get_json(cached)) is not None:
        rows = [Result(**r) for r in saved]
    else:
        began = time.monotonic()
        try:
            rows = SUITES[name](context)
        except ValueError as e:  # its data are missing: the other suites run, and this row names the reason
            return [not_measured(name, name, "–", str(e))], []
        # A suite that does not time its rows has its time shared out evenly.
        share_s = round((time.monotonic() - began) / max(1, len(rows)), 3)
        rows = [r if r.seconds else replace(r, seconds=share_s) for r in rows]
        if all(r.value is not None for r in rows):
            store.put_json(cached, [r.to_json() for r in rows])  # last: it marks the folder as complete
    return rows, store.get_json(store.join(context.folder, "sounds.json")) or []
