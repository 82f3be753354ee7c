"""Suites: named parts of an evaluation, each from a trained system to rows of a table.

A suite is a function `NAME_suite(context: SuiteContext) -> list[Result]` in a module of this folder and one line of `SUITES`
in run.py.  It may leave audio or pictures for the page with `save_sounds`.  run.py also names the steps that a suite needs
(`NEEDS`) and the suites that run only where they are named, as they are slow or fit some corpora only (`OPTIONAL`).
Missing packages or data become a row without a value (`not_measured`), and so does a ValueError.

Suites share their samples: clips are chosen once and kept by id, samples are made once, in `sounds/` beside the suites'
folders.  Counts and paths come from the config's section `tables`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np

from audiolm import store
from audiolm.config.pipeline import Pipeline
from audiolm.dag.run_index import missing_of
from audiolm.data.audio import wav_bytes
from audiolm.data.clips import Clip
from audiolm.data.parallel import parallel_map
from audiolm.data.sources import roots
from audiolm.eval import generated, ladder, test_sets
from audiolm.eval.generated import Sample
from audiolm.eval.results import Progress, Result, no_progress
from audiolm.eval.steps.stages import evaluate_part, ladder_filter
from audiolm.generate.params import params_from_config
from audiolm.tokenizers.base import SAMPLE_RATE

if TYPE_CHECKING:
    from audiolm.generate.audiolm import AudioLM

MAX_PLAYED = 2  # clips of each mode with a player on the page
MIN_CONTINUED_S = 2.0  # after the prompt, of a clip that is continued


@dataclass(frozen=True)
class SuiteContext:
    """The input of a suite: the system's steps (name to folder), the run's config, the folder to write to, the device, and
    `out` of the running step, which parallel_map reports to."""

    steps: Mapping[str, str]
    config: Pipeline
    folder: str
    device: str
    out: Any

    @property
    def seed(self) -> int:
        return self.config.run.seed

    @property
    def progress(self) -> Progress:
        return self.out.progress

    def map(self, task: Callable, items: Sequence[tuple], unit: str) -> list[Any]:
        """Runs a task for each tuple of arguments, on the cluster where there is one."""
        return parallel_map(task, items, out=self.out, cluster=self.config.cluster, unit=unit, gpu=self.device == "cuda")

    def measure_parts(self, names: Sequence[str]) -> list[Any]:
        """Tables of parts of the step `evaluate`: a stage's name, or ladder."""
        cfg = self.config
        settings = {"evaluate": cfg.evaluate, "samples": cfg.samples, "lm": cfg.lm, "corpus": cfg.corpus, "seed": self.seed}
        items = [(part, settings, dict(self.steps), self.folder, self.device) for part in names]
        return self.map(evaluate_part, items, "parts")


@dataclass(frozen=True)
class SuiteReport:
    rows: list[Result]
    sounds: list[dict]  # as sounds.json, with whole paths
    folder: str


def missing_steps(context: SuiteContext, needed: Sequence[str]) -> str | None:
    """The note of a row that cannot be measured yet, None where all needed steps have finished."""
    missing = missing_of(needed, context.steps)
    published = "; a published system has no manifest: evaluate a run on it" if "manifest" in missing else ""
    return f"the run has not finished {', '.join(missing)} yet{published}" if missing else None


def max_clip_s(context: SuiteContext) -> float:
    """The longest clip that the trained crops of the stages allow."""
    return min(test_sets.MAX_S, generated.longest_s(context.steps))


def continuations(context: SuiteContext, modes: Mapping[str, int]) -> list[Sample]:
    """Samples of the clips that all suites of continuations share."""
    cfg, longest_s = context.config, max_clip_s(context)
    shortest_s = min(cfg.samples.prompt_s + MIN_CONTINUED_S, longest_s)
    return samples_for(context, "continued", modes, lambda: test_sets.to_continue(
        context.steps["manifest"], cfg.tables.n_continuations, context.seed, shortest_s))


def samples_for(context: SuiteContext, name: str, modes: Mapping[str, int],
                choose: Callable[[], Sequence[Clip]]) -> list[Sample]:
    """Samples of some modes (mode to number a clip) of chosen clips, whose ids {name}.json keeps."""
    cfg, folder = context.config, sibling_folder(context, "sounds")
    chosen = test_sets.frozen(store.join(context.folder, f"{name}.json"), context.steps["manifest"], choose)
    clips = test_sets.read(chosen, roots(cfg.corpus), max_clip_s(context))
    if "lm_fine" not in context.steps:  # all levels are coarse, so these two modes equal the codec's resynthesis
        modes = {mode: n for mode, n in modes.items() if mode not in ("levels", "fine")}
    specs, draws = generated.plan_samples(clips, modes, cfg.samples.prompt_s), params_from_config(cfg.samples)
    settings = (folder, context.seed, context.device, draws)
    if batches := generated.missing_batches(context.steps, clips, specs, folder, context.seed, draws):
        context.map(generated.make_sample_batch, [(dict(context.steps), *batch, *settings) for batch in batches],
                    "batches of sounds")
    return generated.make_samples(context.steps, clips, specs, *settings)


def sibling_folder(context: SuiteContext, name: str) -> str:
    """A folder that the suites share."""
    return store.join(context.folder.rsplit("/", 1)[0], name)


def groups_of(samples: Sequence[Any]) -> list[str]:
    """What intervals resample: the samples' speakers, or their clips where there is but one speaker."""
    speakers = [s.spec.speaker for s in samples]
    return speakers if len(set(speakers)) > 1 else [s.spec.clip for s in samples]


@dataclass(frozen=True)
class Scored:
    """Scores of an item's samples, one each, and the seconds that scoring took."""

    item: str
    role: str
    samples: Sequence[Sample]
    values: list[Any]
    seconds: float

    @property
    def clips(self) -> list[str]:
        return [s.spec.clip for s in self.samples]

    @property
    def groups(self) -> list[str]:
        return groups_of(self.samples)


def score_items(items: Mapping[str, tuple[str, Sequence[Sample]]], score: Callable[[Sample], Any],
                progress: Progress = no_progress, unit: str = "sounds") -> Iterator[Scored]:
    """Scores every sample of items {label: (role, samples)}, item by item; items without samples too."""
    done, total = 0, sum(len(samples) for _, samples in items.values())
    for item, (role, samples) in items.items():
        began, values = monotonic(), []
        for sample in samples:
            values.append(score(sample))
            progress(done := done + 1, total, unit)
        yield Scored(item, role, samples, values, monotonic() - began)


def save_sounds(context: SuiteContext, entries: Sequence[tuple[str, str, str, float | None]]) -> None:
    """Writes sounds.json: (group, title, file below the suite's folder, seconds of prompt) of each player or picture."""
    names = ("group", "title", "file", "prompt_s")
    store.put_json(store.join(context.folder, "sounds.json"), [dict(zip(names, e, strict=True)) for e in entries])


def save_players(context: SuiteContext, samples: Sequence[Sample]) -> None:
    """Writes the wavs of the first clips' samples, for the page."""
    played = list(dict.fromkeys(s.spec.clip for s in samples))[:MAX_PLAYED]
    entries = []
    for sample in samples:
        spec = sample.spec
        if spec.clip in played:
            file = f"wav/{len(entries)}.wav"
            store.put(store.join(context.folder, file), wav_bytes(np.asarray(sample.wav_T)))
            prompt_s = spec.prompt / SAMPLE_RATE if spec.mode == "continuation" else None
            entries.append((generated.LABELS[spec.mode], f"{spec.clip} {spec.number + 1}", file, prompt_s))
    save_sounds(context, entries)


def save_rungs(context: SuiteContext, rungs: Sequence[Mapping[str, Any]]) -> None:
    """Players of rungs as eval.ladder returns them."""
    save_sounds(context, [(rung["rung"], file["clip"], file["file"], None) for rung in rungs for file in rung["files"]])


def load_audiolm(context: SuiteContext) -> AudioLM:
    from audiolm.generate.load import load

    return load(context.steps, context.device, sampling=params_from_config(context.config.samples))


def ladder_clips(context: SuiteContext) -> list[tuple[Clip, np.ndarray]]:
    """The stage ladder's clips (clip, wav_T), for suites that load the whole system."""
    cfg = context.config
    seconds = min(cfg.evaluate.clip_s, max_clip_s(context))
    return ladder.held_out(context.steps["manifest"], roots(cfg.corpus), cfg.evaluate.clips, seconds,
                           ladder_filter(cfg.lm, context.steps))
