"""Table III of the paper (2209.03143, IV-C): does generated audio keep the voice of its prompt?

A classifier is trained on some utterances of its speakers, as recorded and through the codec, and scores samples of other
utterances.  Of a continuation it scores only the audio after the prompt, of original and codec the same span.  Acoustic
generation has semantic tokens alone and should be at chance.  Beside it stands the cosine between speaker embeddings of that
span and of the real prompt, which needs no training.  Intervals come from a bootstrap over speakers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from audiolm import rng
from audiolm.eval import test_sets
from audiolm.eval.generated import LABELS, Sample, of_mode
from audiolm.eval.metrics.stats import bootstrap_interval
from audiolm.eval.models import speaker as embedding
from audiolm.eval.models.convnet import Settings, log_probs, trained
from audiolm.eval.results import Progress, Result, no_progress, not_measured
from audiolm.eval.suites.base import Scored, SuiteContext, max_clip_s, samples_for, save_players, score_items, sibling_folder
from audiolm.tokenizers.base import SAMPLE_RATE

TRAIN_PLAN = {"original": 1, "resynthesis": 1}  # samples of each mode a training utterance
PLAN = {"original": 1, "resynthesis": 1, "levels": 1, "fine": 1, "acoustic": 1, "continuation": 1}  # and a test utterance
VOICE_PLAN = {"original": 1, "resynthesis": 1, "continuation": 2}
ROLES = {"original": "ceiling", "resynthesis": "ceiling", "levels": "ceiling", "fine": "ours", "acoustic": "ours",
         "continuation": "ours"}
PAPER = {LABELS["resynthesis"]: 100.0, LABELS["acoustic"]: 3.2, LABELS["continuation"]: 92.6}
PAPER_CHANCE = 100 / 291  # of the paper's speakers
SETTINGS = Settings(crop_s=1.5, steps=600)
MIN_S = 0.5  # shorter audio says nothing about a voice
ACCURACY, COSINE = "speaker accuracy %", "speaker cosine to the prompt"


def accuracy(train: Sequence[Sample], test: Sequence[Sample], folder: str, settings: Settings = SETTINGS, device: str = "cpu",
             seed: int = 0, progress: Progress = no_progress) -> list[Result]:
    """Rows of a classifier trained on `train`, kept in `folder`, and scored on `test`; chance last.

    Raises ValueError for a test speaker who is not trained on and for an utterance that is in both."""
    names = sorted({s.spec.speaker for s in train})
    if unknown := sorted({s.spec.speaker for s in test} - set(names)):
        raise ValueError(f"speakers {', '.join(unknown[:3])} are judged, not learned: give the classifier utterances of them")
    if both := sorted({s.spec.clip for s in train} & {s.spec.clip for s in test}):
        raise ValueError(f"{both[0]} is both learned and judged: keep the utterances apart")
    label = {name: i for i, name in enumerate(names)}
    began = time.monotonic()
    labels = [label[s.spec.speaker] for s in train]
    net, _ = trained(folder, [s.wav_T for s in train], labels, names, settings, device, progress)
    training_s, rows = time.monotonic() - began, []

    def right(sample: Sample) -> float:
        return 100.0 * (log_probs(net, sample.after_T).argmax() == label[sample.spec.speaker])

    for scored in score_items(_test_items(test), right):
        if scored.values:
            note = f"{len(names)} speakers, {len({s.spec.speaker for s in scored.samples})} of them judged"
            rows.append(Result("III", scored.item, ACCURACY, *bootstrap_interval(scored.values, scored.groups, seed),
                               len(scored.values), "sounds", scored.role, PAPER.get(scored.item),
                               training_s + scored.seconds, note))
            training_s = 0.0  # counted in the first row alone
    return [*rows, Result("III", "chance", ACCURACY, 100 / len(names), n=len(names), of="speakers", role="floor",
                          paper=PAPER_CHANCE)]


def similarity(samples: Sequence[Sample], model: str | None = None, device: str = "cpu", seed: int = 0) -> list[Result]:
    """Mean cosine between the scored span and the recorded prompt; the floor is another speaker's original.

    `model` as in `speaker.embedder`; one row names the fix where it cannot be used.
    Raises ValueError for a clip whose original is missing."""
    try:
        embed = embedding.embedder(model, device)
    except (ImportError, ValueError) as e:
        return [not_measured("III", LABELS["continuation"], COSINE, str(e))]
    items = _test_items(samples)
    originals = items[LABELS["original"]][1]
    prompts = {s.spec.clip: embed(s.wav_T[:s.spec.prompt]) for s in originals}
    if missing := sorted({s.spec.clip for s in samples} - prompts.keys()):
        raise ValueError(f"the original of {missing[0]} is not among the sounds: plan it too")
    voices = {s.spec.clip: (s.spec.speaker, embed(s.after_T)) for s in originals}

    def cosine(sample: Sample) -> float:
        clip = sample.spec.clip
        return float(prompts[clip] @ (voices[clip][1] if sample.spec.mode == "original" else embed(sample.after_T)))

    scored = [s for s in score_items(items, cosine) if s.values]
    others, values = [], []
    for i, sample in enumerate(originals):
        foreign = [voice for speaker, voice in voices.values() if speaker != sample.spec.speaker]
        if foreign:
            others.append(sample)
            draw = rng.generator(seed, "another speaker", i).integers(len(foreign))
            values.append(float(prompts[sample.spec.clip] @ foreign[draw]))
    if others:
        scored.append(Scored("another speaker", "floor", others, values, 0.0))
    return [Result("III", s.item, COSINE, *bootstrap_interval(s.values, s.groups, seed), len(s.values), "sounds", s.role,
                   seconds=s.seconds, note=f"by {model or 'Resemblyzer'}") for s in scored]


def _test_items(samples: Sequence[Sample]) -> dict[str, tuple[str, list[Sample]]]:
    """Samples by label that are long enough after the prompt."""
    return {LABELS[mode]: (role, [s for s in of_mode(samples, mode) if len(s.after_T) >= MIN_S * SAMPLE_RATE])
            for mode, role in ROLES.items()}


def speakers_suite(context: SuiteContext) -> list[Result]:
    """Accuracy of a speaker classifier, and cosines of speaker embeddings, on held-out speakers where there are two."""
    tables = context.config.tables
    train, test = test_sets.of_speakers(context.steps["manifest"], tables.n_speaker_train, tables.n_speaker_test, context.seed,
                                        min(test_sets.MIN_S, max_clip_s(context)))
    test_samples = samples_for(context, "judged", PLAN, lambda: test)
    save_players(context, test_samples)
    train_samples = samples_for(context, "learned", TRAIN_PLAN, lambda: train)
    settings = replace(SETTINGS, steps=tables.net_steps)
    return [*accuracy(train_samples, test_samples, sibling_folder(context, "nets"), settings, context.device, context.seed,
                      context.progress), *similarity(test_samples, tables.speaker_model, context.device, context.seed)]


def voice_suite(context: SuiteContext) -> list[Result]:
    """Cosines alone, of held-out utterances: for a corpus of one speaker, or of files whose speakers nobody knows."""
    tables = context.config.tables
    samples = samples_for(context, "continued", VOICE_PLAN, lambda: test_sets.to_continue(
        context.steps["manifest"], tables.n_continuations, context.seed, min(6.0, max_clip_s(context))))
    save_players(context, samples)
    return [row for row in similarity(samples, tables.speaker_model, context.device, context.seed) if row.role != "floor"]
