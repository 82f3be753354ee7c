"""The paper's tables and what stands beside them, as suites of `eval.suites.run`: choose items, make the sounds, judge them.

Sounds are made once for all suites, as tasks, in `sounds/` beside the suites' folders; the items of each are frozen in its
folder.  Counts and places are the config's section `tables`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from audiolm import store
from audiolm.config.pipeline import Pipeline
from audiolm.data.audio import wav_bytes
from audiolm.data.parallel import parallel_map
from audiolm.data.sources import roots
from audiolm.eval import generated, test_sets
from audiolm.eval.results import Result
from audiolm.eval.steps.stages import evaluate_part
from audiolm.generate.params import params_from_config
from audiolm.tokenizers.base import SAMPLE_RATE

if TYPE_CHECKING:
    from audiolm.generate.audiolm import AudioLM

@dataclass(frozen=True)
class SuiteContext:
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
        return parallel_map(evaluate_part, items, out=self.out, cluster=cfg.cluster, unit="parts", gpu=self.device == "cuda")


@dataclass(frozen=True)
class SuiteReport:
    rows: list[Result]
    sounds: list[dict]  # file: whole path
    folder: str


PLAYED = 2  # clips of each mode that can be heard
LEAST_S = 2.0  # of a clip that is continued


def longest_clip_s(ask: SuiteContext) -> float:
    return min(test_sets.MOST_S, generated.longest_s(ask.steps))


def clips_to_continue(ask: SuiteContext) -> list:
    cfg, most_s = ask.config, longest_clip_s(ask)
    least_s = min(cfg.samples.prompt_s + LEAST_S, most_s)
    return test_sets.to_continue(ask.steps["manifest"], cfg.tables.continued, cfg.run.seed, least_s)


def samples_for(ask: SuiteContext, name: str, choose: Callable[[], Sequence], modes: Mapping[str, int]) -> list[generated.Sample]:
    """The sounds of some modes of the clips, which `name` keeps by id."""
    cfg, folder = ask.config, sibling_folder(ask, "sounds")
    chosen = test_sets.frozen(store.join(ask.folder, f"{name}.json"), ask.steps["manifest"], choose)
    clips = test_sets.read(chosen, roots(cfg.corpus), longest_clip_s(ask))
    if "lm_fine" not in ask.steps:  # all levels are coarse: nothing stands between codec and coarse stage
        modes = {mode: n for mode, n in modes.items() if mode not in ("levels", "fine")}
    wanted, draws = generated.plan_samples(clips, modes, cfg.samples.prompt_s), params_from_config(cfg.samples)
    how = (folder, cfg.run.seed, ask.device, draws)
    tasks = generated.missing_batches(ask.steps, clips, wanted, folder, cfg.run.seed, draws)
    if tasks:
        parallel_map(generated.make_sample_batch, [(dict(ask.steps), *task, *how) for task in tasks], out=ask.out, cluster=cfg.cluster,
                unit="batches of sounds", gpu=ask.device == "cuda")
    return generated.make_samples(ask.steps, clips, wanted, *how)


def save_players(ask: SuiteContext, made: Sequence[generated.Sample]) -> None:
    """Leaves some clips' sounds to listen to."""
    heard = list(dict.fromkeys(m.wanted.clip for m in made))[:PLAYED]
    entries = []
    for m in made:
        if m.wanted.clip in heard:
            mode, file = m.wanted.mode, f"wav/{len(entries)}.wav"
            store.put(store.join(ask.folder, file), wav_bytes(np.asarray(m.wav_T)))
            prompt_s = m.wanted.prompt / SAMPLE_RATE if mode == "continuation" else None
            entries.append({"group": generated.LABELS[mode], "title": f"{m.wanted.clip} {m.wanted.number + 1}", "file": file,
                            "prompt_s": prompt_s})
    store.put_json(store.join(ask.folder, "sounds.json"), entries)


def sibling_folder(ask: SuiteContext, name: str) -> str:
    return store.join(ask.folder.rsplit("/", 1)[0], name)


def load_audiolm(ask: SuiteContext) -> AudioLM:
    from audiolm.generate.load import load

    return load(ask.steps, ask.device, sampling=params_from_config(ask.config.samples))


def ladder_clips(ask: SuiteContext) -> list:
    from audiolm.eval.ladder import held_out

    cfg = ask.config
    where = cfg.lm.fine.where if "lm_fine" in ask.steps else cfg.lm.coarse.where
    return held_out(ask.steps["manifest"], roots(cfg.corpus), cfg.evaluate.clips, min(cfg.evaluate.clip_s, longest_clip_s(ask)), where)
