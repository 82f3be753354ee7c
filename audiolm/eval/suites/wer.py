"""Table II of the paper (2209.03143, IV-B): CER and WER of a recogniser on codec resyntheses and acoustic generation.

Acoustic generation from true semantic tokens shows what the tokens hold; the floor is the same from shuffled tokens.  Errors
are summed over utterances (weighted by words, or characters), intervals come from a bootstrap over speakers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from audiolm.eval import test_sets
from audiolm.eval.generated import LABELS, Sample, SampleSpec
from audiolm.eval.metrics.stats import bootstrap_interval
from audiolm.eval.models import asr as recognisers
from audiolm.eval.results import Progress, Result, no_progress, not_measured
from audiolm.eval.suites.base import SuiteContext, groups_of, max_clip_s, samples_for, save_players

# Samples of each mode a clip; acoustic generation alone is random enough to need three.
PLAN = {"original": 1, "resynthesis": 1, "levels": 1, "fine": 1, "acoustic": 3, "shuffled": 1}
ROLES = {"original": "ceiling", "resynthesis": "ceiling", "levels": "ceiling", "fine": "ours", "acoustic": "ours",
         "shuffled": "floor"}
PAPER = {"original": (0.8, 2.5), "resynthesis": (0.9, 2.6), "acoustic": (3.4, 6.0)}  # CER, WER
NO_PAPER = (None, None)


@dataclass(frozen=True)
class Said:
    """A transcript beside the clip's text, both normalised."""

    spec: SampleSpec
    text: str
    said: str
    seconds: float


def table2(samples: Sequence[Sample], asr: str | None = None, device: str = "cpu", seed: int = 0,
           progress: Progress = no_progress) -> list[Result]:
    """CER and WER of each mode; `asr` as in `asr.recogniser`. Rows without values where its packages are missing."""
    if why := recognisers.missing_dependency(asr):
        return [not_measured("II", LABELS[mode], metric, why, paper) for mode in ROLES
                for metric, paper in zip(("CER %", "WER %"), PAPER.get(mode, NO_PAPER), strict=True)]
    transcripts = transcribed(samples, asr, device, progress)
    return rows(transcripts, f"by {asr or f'Whisper {recognisers.DEFAULT}'}", seed)


def transcribed(samples: Sequence[Sample], asr: str | None = None, device: str = "cpu",
                progress: Progress = no_progress) -> list[Said]:
    """Transcripts of all samples whose clip has a text. Raises ValueError where none has."""
    with_text = [s for s in samples if s.spec.mode in ROLES and s.spec.text and recognisers.normalise(s.spec.text)]
    if not with_text:
        raise ValueError("none of the clips has a text to compare with: give clips with transcripts")
    recognise, transcripts = recognisers.recogniser(asr, device), []
    for done, sample in enumerate(with_text, 1):
        began = time.monotonic()
        said = recognisers.normalise(recognise(sample.wav_T))
        transcripts.append(Said(sample.spec, recognisers.normalise(sample.spec.text), said, time.monotonic() - began))
        progress(done, len(with_text), "transcripts")
    return transcripts


def rows(transcripts: Sequence[Said], note: str = "", seed: int = 0) -> list[Result]:
    """The table in the order of ROLES; modes without samples are left out."""
    table = []
    for mode, role in ROLES.items():
        of_mode = [t for t in transcripts if t.spec.mode == mode]
        if not of_mode:
            continue
        word_errors, words, char_errors, chars = zip(*(recognisers.errors(t.text, t.said) for t in of_mode), strict=True)
        groups, seconds = groups_of(of_mode), sum(t.seconds for t in of_mode)
        cer_paper, wer_paper = PAPER.get(mode, NO_PAPER)
        for metric, errors, n, paper in (("CER %", char_errors, chars, cer_paper), ("WER %", word_errors, words, wer_paper)):
            rates = [100 * e / count for e, count in zip(errors, n, strict=True)]
            table.append(Result("II", LABELS[mode], metric, *bootstrap_interval(rates, groups, seed, n), len(of_mode),
                                "utterances", role, paper, seconds, note))
    return table


def wer_suite(context: SuiteContext) -> list[Result]:
    """CER and WER of held-out utterances, of the codec, and of acoustic generation from their semantic tokens."""
    tables = context.config.tables
    samples = samples_for(context, "utterances", PLAN, lambda: test_sets.with_text(
        context.steps["manifest"], tables.utterances, context.seed, most_s=max_clip_s(context)))
    save_players(context, samples)
    return table2(samples, tables.asr, context.device, context.seed, context.progress)
