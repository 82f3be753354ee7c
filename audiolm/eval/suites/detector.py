"""Told from generated: a classifier of 1 s crops, real speech against continuations (paper IV-D: 98.6 %).

Only generated seconds count, those after the prompt, and of the originals the same seconds.  Tested originals have been through
the codec, so that its traces are no cue; in training they come with it and without, so that the detector can judge any file.
Crops of both kinds are paired by position and by share of silence.  Speakers of the test are not in the training.
wav_T: float32 mono at 16 kHz.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from audiolm import rng, store
from audiolm.data.audio import start_of
from audiolm.data.audio_check import audio_errors, check_audio
from audiolm.eval.generated import Progress, Sample
from audiolm.eval.metrics.stats import bootstrap_interval
from audiolm.eval.models.convnet import Settings, load_net, log_probs, trained
from audiolm.eval.results import Result, not_measured
from audiolm.eval.suites.base import clips_to_continue, samples_for, sibling_folder
from audiolm.tokenizers.base import SAMPLE_RATE

if TYPE_CHECKING:
    from audiolm.eval.suites.base import SuiteContext

PLAN = {"original": 1, "resynthesis": 1, "continuation": 1}  # for `generated.plan`
CLASSES = ("original", "generated")
SETTINGS = Settings(crop_s=1.0, steps=400)
TEST = 0.3  # of the speakers
SILENT = 10 ** (-30 / 20)  # of a sound's loud frames (95th percentile): below it, silence
BINS = (0.1, 0.3, 0.6)  # of the share of silence: crops of a kind are paired
PAPER = 98.6
ACCURACY = "accuracy %"
TRAINED = "detector.json"  # beside the suite's rows: {"net": the folder's name}


@dataclass(frozen=True)
class Crop:
    """A second of a sound, the `position`th after the prompt."""

    wav_T: np.ndarray
    speaker: str
    clip: str
    position: int
    silence: int  # its bin


def detector(made: Sequence[Sample], folder: str, settings: Settings = SETTINGS, device: str = "cpu", seed: int = 0,
             progress: Progress | None = None) -> tuple[list[Result], str | None]:
    """(rows, the folder of the trained detector, for `judge`); without a folder where there are too few speakers or seconds."""
    began = time.monotonic()
    speakers = sorted({m.wanted.speaker for m in made})
    order = [speakers[i] for i in rng.generator(seed, "detector speakers").permutation(len(speakers))]
    tested = set(order[:max(1, round(TEST * len(order)))])
    kinds = {mode: crops([m for m in made if m.wanted.mode == mode]) for mode in PLAN}
    sets = [pairs([c for c in kinds["resynthesis"] if (c.speaker in tested) == test],
                  [c for c in kinds["continuation"] if (c.speaker in tested) == test], seed) for test in (False, True)]
    if not (sets[0] and sets[1]):
        return [not_measured("detector", "original or continuation", ACCURACY, f"{len(sets[0])} and {len(sets[1])} pairs of "
                             f"seconds for training and test, of {len(speakers)} speakers: give more clips, of two at least",
                             PAPER)], None
    raw = {(c.clip, c.position): c for c in kinds["original"]}
    known, asked = [c for pair in sets[0] for c in pair], [c for pair in sets[1] for c in pair]
    learned = [(c, i % 2) for i, c in enumerate(known)]
    learned += [(raw[c.clip, c.position], 0) for c in known[::2] if (c.clip, c.position) in raw]
    net, path = trained(folder, [c.wav_T for c, _ in learned], [label for _, label in learned], CLASSES, settings, device,
                        progress)
    right = [100.0 * (log_probs(net, c.wav_T).argmax() == i % 2) for i, c in enumerate(asked)]
    note = f"{len(known)} crops of {len(speakers) - len(tested)} speakers taught it, {len(tested)} others are judged"
    spent, table = time.monotonic() - began, []
    shares = (("original or continuation", slice(None), PAPER), ("originals, through the codec", slice(0, None, 2), None),
              ("continuations", slice(1, None, 2), None))
    for item, which, paper in shares:
        own = right[which]
        table.append(Result("detector", item, ACCURACY, *bootstrap_interval(own, [c.speaker for c in asked[which]], seed), len(own), "crops",
                         paper=paper, seconds=spent, note=note))
        spent = 0.0
    return [*table, Result("detector", "chance", ACCURACY, 50.0, n=len(asked), of="crops", role="floor", paper=50.0)], path


def of_run(steps: Mapping[str, str]) -> str:
    """The folder of the detector that a run's step `tables` trained. Raises ValueError where there is none."""
    suites = store.join(steps["tables"], "suites") if "tables" in steps else None
    for name in store.names(suites) if suites else ():
        if name.startswith("detector-") and (found := store.get_json(store.join(suites, name, TRAINED))):
            return store.join(suites, "nets", found["net"])
    raise ValueError("the run has no trained detector: run its step `tables` with detector among tables.suites, or name a "
                     "detector's folder with --detector")


def score_file(path: str, file: str) -> np.ndarray:
    """p_S of an audio file of any rate, as `score_windows`. Raises ValueError for a file that cannot be read."""
    check_audio(file)
    with audio_errors(file):
        wav_T = start_of(file, None)
    return score_windows(path, wav_T)


def score_windows(path: str, wav_T: np.ndarray, device: str = "cpu") -> np.ndarray:
    """p_S: for every whole second of wav_T the probability that it was generated by the models that the detector at `path` was
    trained on; about other models it knows nothing. Raises ValueError for less than a second."""
    net, names = load_net(path, device)
    if tuple(names) != CLASSES:
        raise ValueError(f"{path} tells {', '.join(names[:3])} apart, not {' and '.join(CLASSES)}: give a detector's folder")
    if len(wav_T) < SAMPLE_RATE:
        raise ValueError(f"the sound lasts {len(wav_T) / SAMPLE_RATE:.2f} s at 16 kHz: give at least 1 s")
    starts = range(0, len(wav_T) - SAMPLE_RATE + 1, SAMPLE_RATE)
    return np.array([np.exp(log_probs(net, wav_T[a:a + SAMPLE_RATE])[1]) for a in starts])


def crops(made: Sequence[Sample]) -> list[Crop]:
    """Every whole second after the prompt."""
    found = []
    for m in made:
        wav_T = m.after_T
        rms = np.sqrt(np.square(wav_T[:len(wav_T) // 160 * 160].reshape(-1, 160)).mean(1) + 1e-12)
        silent = rms < SILENT * np.quantile(rms, 0.95) if len(rms) else rms
        for k in range(len(wav_T) // SAMPLE_RATE):
            share = float(np.mean(silent[100 * k:100 * (k + 1)]))
            found.append(Crop(wav_T[k * SAMPLE_RATE:(k + 1) * SAMPLE_RATE], m.wanted.speaker, m.wanted.clip, k,
                              int(np.searchsorted(BINS, share, side="right"))))
    return found


def pairs(originals: Sequence[Crop], generated: Sequence[Crop], seed: int) -> list[tuple[Crop, Crop]]:
    """As many of either kind as can be paired with one of the other of the same position and silence; which, is drawn."""
    cells: dict[tuple[int, int], tuple[list[Crop], list[Crop]]] = defaultdict(lambda: ([], []))
    for kind, members in enumerate((originals, generated)):
        for crop in members:
            cells[crop.position, crop.silence][kind].append(crop)
    found = []
    for cell in sorted(cells):
        drawn = [[own[i] for i in rng.generator(seed, "detector pairs", *cell, kind).permutation(len(own))]
                 for kind, own in enumerate(cells[cell])]
        found += list(zip(*drawn, strict=False))
    return found


def detector_suite(ask: SuiteContext) -> list[Result]:
    """Whether continuations are told from real speech by a network that looks for it."""
    cfg = ask.config
    made = samples_for(ask, "continued", lambda: clips_to_continue(ask), PLAN)
    rows, path = detector(made, sibling_folder(ask, "nets"), replace(SETTINGS, steps=cfg.tables.net_steps), ask.device,
                            cfg.run.seed, ask.out.progress)
    if path:
        store.put_json(store.join(ask.folder, TRAINED), {"net": path.rsplit("/", 1)[-1]})
    return rows
