"""Table II (paper IV-B): what a recogniser hears in originals, codec resyntheses and acoustic generation, against the text.

Acoustic generation from true semantic tokens says what the tokens hold; the floor is the same from shuffled tokens.  Errors
are summed over utterances (weighted by words, or characters), intervals by bootstrap over speakers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from audiolm.eval import test_sets
from audiolm.eval.generated import LABELS, Progress, Sample, SampleSpec
from audiolm.eval.metrics.stats import bootstrap_interval
from audiolm.eval.models import asr as recognisers
from audiolm.eval.results import Result, not_measured
from audiolm.eval.suites.base import longest_clip_s, samples_for, save_players

if TYPE_CHECKING:
    from audiolm.eval.suites.base import SuiteContext

PLAN = {"original": 1, "resynthesis": 1, "levels": 1, "fine": 1, "acoustic": 3, "shuffled": 1}  # for `generated.plan`
ROLES = {"original": "ceiling", "resynthesis": "ceiling", "levels": "ceiling", "fine": "ours", "acoustic": "ours",
         "shuffled": "floor"}
PAPER = {"original": (0.8, 2.5), "resynthesis": (0.9, 2.6), "acoustic": (3.4, 6.0)}  # CER, WER


@dataclass(frozen=True)
class Said:
    """What was heard, beside the text, both normalised."""

    wanted: SampleSpec
    text: str
    said: str
    seconds: float


def table2(made: Sequence[Sample], asr: str | None = None, device: str = "cpu", seed: int = 0,
           progress: Progress | None = None) -> list[Result]:
    """CER and WER of each mode; `asr` as in `asr.recogniser`. Without its packages the rows say so."""
    if why := recognisers.missing_dependency(asr):
        return [not_measured("II", LABELS[mode], metric, why, paper) for mode in ROLES
                for metric, paper in zip(("CER %", "WER %"), PAPER.get(mode, (None, None)), strict=True)]
    return rows(transcribed(made, asr, device, progress), f"by {asr or f'Whisper {recognisers.DEFAULT}'}", seed)


def transcribed(made: Sequence[Sample], asr: str | None = None, device: str = "cpu",
                progress: Progress | None = None) -> list[Said]:
    """Every sound whose clip has a text, as the recogniser hears it. Raises ValueError where none has."""
    judged = [m for m in made if m.wanted.mode in ROLES and m.wanted.text and recognisers.normalise(m.wanted.text)]
    if not judged:
        raise ValueError("none of the clips has a text to compare with: give clips with transcripts")
    recognise, found = recognisers.recogniser(asr, device), []
    for i, m in enumerate(judged):
        began = time.monotonic()
        said = recognisers.normalise(recognise(m.wav_T))
        found.append(Said(m.wanted, recognisers.normalise(m.wanted.text), said, time.monotonic() - began))
        if progress:
            progress(i + 1, len(judged), "transcripts")
    return found


def rows(found: Sequence[Said], note: str = "", seed: int = 0) -> list[Result]:
    """The table, in the order of ROLES; modes of which there is no sound are left out."""
    table = []
    for mode, role in ROLES.items():
        own = [s for s in found if s.wanted.mode == mode]
        if not own:
            continue
        counts = list(zip(*(recognisers.errors(s.text, s.said) for s in own), strict=True))
        spent, papers = sum(s.seconds for s in own), PAPER.get(mode, (None, None))
        for metric, wrong, of, paper in (("CER %", *counts[2:], papers[0]), ("WER %", *counts[:2], papers[1])):
            value, low, high = bootstrap_interval([100 * w / n for w, n in zip(wrong, of, strict=True)],
                                        [s.wanted.speaker for s in own], seed, of)
            table.append(Result("II", LABELS[mode], metric, value, low, high, len(own), "utterances", role, paper, spent, note))
    return table


def wer_suite(ask: SuiteContext) -> list[Result]:
    """CER and WER of held-out utterances, of the codec, and of what is said from their semantic tokens."""
    cfg = ask.config
    made = samples_for(ask, "utterances", lambda: test_sets.with_text(ask.steps["manifest"], cfg.tables.utterances, cfg.run.seed,
                                                            most_s=longest_clip_s(ask)), PLAN)
    save_players(ask, made)
    return table2(made, cfg.tables.asr, ask.device, cfg.run.seed, ask.out.progress)
