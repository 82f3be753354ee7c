"""Table III (paper IV-C): is the voice of a generated sound the voice of its prompt?

A classifier learns its speakers from some utterances, as recorded and through the codec, and is asked about sounds of others:
of a continuation only what follows the prompt, of original and codec the same stretch.  Acoustic generation, which hears
semantic tokens alone, should be at chance.  Beside it the cosine of speaker embeddings of that stretch and the real prompt,
which needs no training.  Intervals by bootstrap over speakers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from audiolm import rng
from audiolm.eval import test_sets
from audiolm.eval.generated import LABELS, Progress, Sample
from audiolm.eval.metrics.stats import bootstrap_interval
from audiolm.eval.models import speaker as embedding
from audiolm.eval.models.convnet import Settings, log_probs, trained
from audiolm.eval.results import Result, not_measured
from audiolm.eval.suites.base import longest_clip_s, samples_for, save_players, sibling_folder
from audiolm.tokenizers.base import SAMPLE_RATE

if TYPE_CHECKING:
    from audiolm.eval.suites.base import SuiteContext

LEARN = {"original": 1, "resynthesis": 1}  # for `generated.plan`, of the training utterances
PLAN = {"original": 1, "resynthesis": 1, "levels": 1, "fine": 1, "acoustic": 1, "continuation": 1}  # of the tested ones
ROLES = {"original": "ceiling", "resynthesis": "ceiling", "levels": "ceiling", "fine": "ours", "acoustic": "ours",
         "continuation": "ours"}
PAPER = {"resynthesis": 100.0, "acoustic": 3.2, "continuation": 92.6}
PAPER_CHANCE = 100 / 291
SETTINGS = Settings(crop_s=1.5, steps=600)
LEAST_S = 0.5  # a shorter stretch tells nobody
ACCURACY, COSINE = "speaker accuracy %", "speaker cosine to the prompt"


def table3(learn: Sequence[Sample], made: Sequence[Sample], folder: str, settings: Settings = SETTINGS, device: str = "cpu",
           seed: int = 0, progress: Progress | None = None) -> list[Result]:
    """`learn`: the classifier's sounds; `made`: the judged ones, with the original of each clip; `folder`: where classifiers
    are kept. Raises ValueError for a judged speaker who is not learned and an utterance that is in both."""
    return [*accuracy(learn, made, folder, settings, device, seed, progress), *similarity(made, device, seed)]


def accuracy(learn: Sequence[Sample], made: Sequence[Sample], folder: str, settings: Settings = SETTINGS, device: str = "cpu",
             seed: int = 0, progress: Progress | None = None) -> list[Result]:
    """The classifier's rows, chance last."""
    names = sorted({m.wanted.speaker for m in learn})
    if unknown := sorted({m.wanted.speaker for m in made} - set(names)):
        raise ValueError(f"speakers {', '.join(unknown[:3])} are judged, not learned: give the classifier utterances of them")
    if both := sorted({m.wanted.clip for m in learn} & {m.wanted.clip for m in made}):
        raise ValueError(f"{both[0]} is both learned and judged: keep the utterances apart")
    number = {name: i for i, name in enumerate(names)}
    began = time.monotonic()
    net, _ = trained(folder, [m.wav_T for m in learn], [number[m.wanted.speaker] for m in learn], names, settings, device,
                     progress)
    spent = time.monotonic() - began
    table = []
    for mode, role in ROLES.items():
        own = _judged(made, mode)
        if not own:
            continue
        began = time.monotonic()
        right = [100.0 * (log_probs(net, m.after_T).argmax() == number[m.wanted.speaker]) for m in own]
        seconds, spent = spent + time.monotonic() - began, 0.0  # the first row has the training
        value, low, high = bootstrap_interval(right, [m.wanted.speaker for m in own], seed)
        table.append(Result("III", LABELS[mode], ACCURACY, value, low, high, len(own), "sounds", role, PAPER.get(mode), seconds,
                         f"{len(names)} speakers, {len({m.wanted.speaker for m in own})} of them judged"))
    return [*table, Result("III", "chance", ACCURACY, 100 / len(names), n=len(names), of="speakers", role="floor",
                        paper=PAPER_CHANCE)]


def similarity(made: Sequence[Sample], device: str = "cpu", seed: int = 0) -> list[Result]:
    """Mean cosine of the judged stretch and the prompt as recorded; the floor is another speaker's original."""
    if why := embedding.missing_dependency():
        return [not_measured("III", LABELS[mode], COSINE, why) for mode in ROLES]
    embed, table = embedding.embedder(device), []
    originals = _judged(made, "original")
    prompt = {m.wanted.clip: embed(m.wav_T[:m.wanted.prompt]) for m in originals}
    if silent := sorted({m.wanted.clip for m in made} - prompt.keys()):
        raise ValueError(f"the original of {silent[0]} is not among the sounds: plan it too")
    voices = {m.wanted.clip: (m.wanted.speaker, embed(m.after_T)) for m in originals}
    for mode, role in ROLES.items():
        own, began = _judged(made, mode), time.monotonic()
        if own:
            values = [float(prompt[m.wanted.clip] @ (voices[m.wanted.clip][1] if mode == "original" else embed(m.after_T)))
                      for m in own]
            table.append(_cosine(LABELS[mode], values, [m.wanted.speaker for m in own], role, seed, time.monotonic() - began))
    pairs, speakers = [], []
    for i, m in enumerate(originals):
        others = [v for speaker, v in voices.values() if speaker != m.wanted.speaker]
        if others:
            pairs.append(float(prompt[m.wanted.clip] @ others[rng.generator(seed, "another speaker", i).integers(len(others))]))
            speakers.append(m.wanted.speaker)
    return [*table, _cosine("another speaker", pairs, speakers, "floor", seed, 0.0)] if pairs else table


def _judged(made: Sequence[Sample], mode: str) -> list[Sample]:
    return [m for m in made if m.wanted.mode == mode and len(m.after_T) >= LEAST_S * SAMPLE_RATE]


def _cosine(item: str, values: Sequence[float], speakers: Sequence[str], role: str, seed: int, seconds: float) -> Result:
    value, low, high = bootstrap_interval(np.asarray(values), speakers, seed)
    return Result("III", item, COSINE, value, low, high, len(values), "sounds", role, seconds=seconds, note="by Resemblyzer")


def speakers_suite(ask: SuiteContext) -> list[Result]:
    """Whether a continuation keeps its prompt's voice."""
    cfg, t = ask.config, ask.config.tables
    most_s = longest_clip_s(ask)
    learn, test = test_sets.of_speakers(ask.steps["manifest"], t.learned, t.judged, cfg.run.seed, min(test_sets.LEAST_S, most_s))
    made = samples_for(ask, "judged", lambda: test, PLAN)
    save_players(ask, made)
    known = samples_for(ask, "learned", lambda: learn, LEARN)
    return table3(known, made, sibling_folder(ask, "nets"), replace(SETTINGS, steps=t.net_steps), ask.device,
                           cfg.run.seed, ask.out.progress)
