"""Detection of generated audio (paper 2209.03143, IV-D: 98.6 %): a classifier of 1 s crops, real speech or continuation.

Crops come from the audio after the prompt, of the originals over the same span.  Test originals have been through the codec, so
that its traces are no cue; training originals come with it and without, so that the detector can score any file.  Crops of both
classes are paired by position and by share of silence.  Test speakers are not in the training.
wav_T: float32 mono at 16 kHz.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from audiolm import rng, store
from audiolm.data.audio import start_of
from audiolm.data.audio_check import audio_errors, check_audio
from audiolm.eval.generated import Sample, of_mode
from audiolm.eval.metrics.stats import bootstrap_interval
from audiolm.eval.models.convnet import Settings, load_net, log_probs, trained
from audiolm.eval.results import Progress, Result, no_progress, not_measured
from audiolm.eval.suites.base import SuiteContext, continuations, sibling_folder
from audiolm.tokenizers.base import SAMPLE_RATE

PLAN = {"original": 1, "resynthesis": 1, "continuation": 1}  # samples of each mode a clip
CLASSES = ("original", "generated")
SETTINGS = Settings(crop_s=1.0, steps=400)
TEST_SHARE = 0.3  # of the speakers
SILENT = 10 ** (-30 / 20)  # a frame 30 dB below the loud ones (95th percentile); our choice
FRAME = 160  # samples, 10 ms
BINS = (0.1, 0.3, 0.6)  # bounds of a crop's share of silence, within which crops are paired
PAPER = 98.6
ACCURACY = "accuracy %"
TRAINED = "detector.json"  # beside the suite's rows: {"net": the folder's name}


@dataclass(frozen=True)
class Crop:
    """A second of a sample, the `position`th after the prompt."""

    wav_T: np.ndarray
    speaker: str
    clip: str
    position: int
    silence: int  # number of its bin


def detector(samples: Sequence[Sample], folder: str, settings: Settings = SETTINGS, device: str = "cpu", seed: int = 0,
             progress: Progress = no_progress) -> tuple[list[Result], str | None]:
    """(rows, folder of the trained detector for `score_windows`), None where there are too few speakers or seconds."""
    began = time.monotonic()
    speakers = sorted({s.spec.speaker for s in samples})
    order = [speakers[i] for i in rng.generator(seed, "detector speakers").permutation(len(speakers))]
    test_speakers = set(order[:max(1, round(TEST_SHARE * len(order)))])
    real, fake = (crops(of_mode(samples, mode)) for mode in ("resynthesis", "continuation"))
    train, test = (pairs([c for c in real if (c.speaker in test_speakers) == is_test],
                         [c for c in fake if (c.speaker in test_speakers) == is_test], seed) for is_test in (False, True))
    if not (train and test):
        return [not_measured("detector", "original or continuation", ACCURACY, f"{len(train)} and {len(test)} pairs of "
                             f"seconds for training and test, of {len(speakers)} speakers: give more clips, of two at least",
                             PAPER)], None

    # Crops alternate between the classes; every real one of the training comes as recorded too.
    recorded = {(c.clip, c.position): c for c in crops(of_mode(samples, "original"))}
    train_crops, test_crops = [c for pair in train for c in pair], [c for pair in test for c in pair]
    labelled = [(c, i % 2) for i, c in enumerate(train_crops)]
    labelled += [(recorded[c.clip, c.position], 0) for c in train_crops[::2] if (c.clip, c.position) in recorded]
    net, path = trained(folder, [c.wav_T for c, _ in labelled], [label for _, label in labelled], CLASSES, settings, device,
                        progress)
    right = [100.0 * (log_probs(net, c.wav_T).argmax() == i % 2) for i, c in enumerate(test_crops)]
    note = (f"{len(train_crops)} crops of {len(speakers) - len(test_speakers)} speakers taught it, {len(test_speakers)} others "
            "are judged")
    rows = []
    for item, crops_of, paper in (("original or continuation", slice(None), PAPER),
                                  ("originals, through the codec", slice(0, None, 2), None),
                                  ("continuations", slice(1, None, 2), None)):
        interval = bootstrap_interval(right[crops_of], [c.speaker for c in test_crops[crops_of]], seed)
        rows.append(Result("detector", item, ACCURACY, *interval, len(right[crops_of]), "crops", paper=paper, note=note))
    rows[0] = replace(rows[0], seconds=time.monotonic() - began)  # the first row has the time of all
    return [*rows, Result("detector", "chance", ACCURACY, 50.0, n=len(test_crops), of="crops", role="floor", paper=50.0)], path


def of_run(steps: Mapping[str, str]) -> str:
    """The folder of the detector that a run's step `tables` trained. Raises ValueError where there is none."""
    suites = store.join(steps["tables"], "suites") if "tables" in steps else None
    for name in store.names(suites) if suites else ():
        if name.startswith("detector-") and (about := store.get_json(store.join(suites, name, TRAINED))):
            return store.join(suites, "nets", about["net"])
    raise ValueError("the run has no trained detector: run its step `tables` with detector among tables.suites, or name a "
                     "detector's folder with --detector")


def score_file(path: str, file: str) -> np.ndarray:
    """p_S of an audio file of any rate, as `score_windows`. Raises ValueError for a file that cannot be read."""
    check_audio(file)
    with audio_errors(file):
        wav_T = start_of(file, None)
    return score_windows(path, wav_T)


def score_windows(path: str, wav_T: np.ndarray, device: str = "cpu") -> np.ndarray:
    """p_S: the probability of each whole second of wav_T that the models which the detector at `path` was trained on generated
    it. It says nothing about other models. Raises ValueError for less than a second."""
    net, names = load_net(path, device)
    if tuple(names) != CLASSES:
        raise ValueError(f"{path} tells {', '.join(names[:3])} apart, not {' and '.join(CLASSES)}: give a detector's folder")
    if len(wav_T) < SAMPLE_RATE:
        raise ValueError(f"the sound lasts {len(wav_T) / SAMPLE_RATE:.2f} s at 16 kHz: give at least 1 s")
    starts = range(0, len(wav_T) - SAMPLE_RATE + 1, SAMPLE_RATE)
    return np.array([np.exp(log_probs(net, wav_T[a:a + SAMPLE_RATE])[1]) for a in starts])


def crops(samples: Sequence[Sample]) -> list[Crop]:
    """Every whole second after the prompt."""
    frames = SAMPLE_RATE // FRAME
    result = []
    for sample in samples:
        wav_T = sample.after_T
        rms = np.sqrt(np.square(wav_T[:len(wav_T) // FRAME * FRAME].reshape(-1, FRAME)).mean(1) + 1e-12)
        silent = rms < SILENT * np.quantile(rms, 0.95) if len(rms) else rms
        for k in range(len(wav_T) // SAMPLE_RATE):
            share = float(np.mean(silent[frames * k:frames * (k + 1)]))
            result.append(Crop(wav_T[k * SAMPLE_RATE:(k + 1) * SAMPLE_RATE], sample.spec.speaker, sample.spec.clip, k,
                               int(np.searchsorted(BINS, share, side="right"))))
    return result


def pairs(originals: Sequence[Crop], generated: Sequence[Crop], seed: int) -> list[tuple[Crop, Crop]]:
    """As many pairs of both classes as share position and silence; a random choice where one class has more."""
    cells: dict[tuple[int, int], tuple[list[Crop], list[Crop]]] = defaultdict(lambda: ([], []))
    for label, members in enumerate((originals, generated)):
        for crop in members:
            cells[crop.position, crop.silence][label].append(crop)
    result = []
    for cell in sorted(cells):
        shuffled = [[members[i] for i in rng.generator(seed, "detector pairs", *cell, label).permutation(len(members))]
                    for label, members in enumerate(cells[cell])]
        result += list(zip(*shuffled, strict=False))
    return result


def detector_suite(context: SuiteContext) -> list[Result]:
    """Accuracy of a classifier that is trained to tell continuations from real speech."""
    settings = replace(SETTINGS, steps=context.config.tables.net_steps)
    rows, path = detector(continuations(context, PLAN), sibling_folder(context, "nets"), settings, context.device, context.seed,
                          context.progress)
    if path:
        store.put_json(store.join(context.folder, TRAINED), {"net": path.rsplit("/", 1)[-1]})
    return rows
