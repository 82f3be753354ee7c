"""What continuations say, as text (GSLM, 2102.01192, section 4.2): is it likely English, and does it repeat itself?

What follows the prompt is transcribed by `eval.models.asr`, originals alike, so that both have the recogniser's errors.  Perplexity a
token by a causal text model of transformers, by path: low for sense, but also for one phrase over and over, which auto-BLEU
gives away: the share of an utterance's words that come again in it, and of its word pairs, their geometric mean.  Originals
are the ceiling; their words in random order are perplexity's floor.  Utterances of fewer than two words are left out, so
figures of a model that seldom speaks are of its best: words a second and a note tell.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from audiolm import rng
from audiolm.eval.generated import LABELS, Sample
from audiolm.eval.metrics.stats import bootstrap_interval
from audiolm.eval.models import asr as recognisers
from audiolm.eval.models import text_model as models
from audiolm.eval.results import Progress, Result, no_progress, not_measured
from audiolm.eval.suites.base import clips_to_continue, samples_for
from audiolm.tokenizers.base import SAMPLE_RATE

if TYPE_CHECKING:
    from audiolm.eval.suites.base import SuiteContext

PLAN = {"original": 1, "continuation": 1}  # for `generated.plan`
ROLES = {"original": "ceiling", "continuation": "ours"}
SHUFFLED, AGAIN = "original, its words in random order", "one word over and over"
RATE, PERPLEXITY, BLEU = "words a second", "perplexity a token", "auto-BLEU-2 %"

Texts = dict[str, list[tuple[str, str]]]  # by item: (clip, text)


def text_results(made: Sequence[Sample], text_model: str | None = None, asr: str | None = None, device: str = "cpu", seed: int = 0,
              progress: Progress = no_progress) -> list[Result]:
    """`asr` as in `asr.recogniser`; without its packages, or without a text model, rows say so."""
    if why := recognisers.missing_dependency(asr):
        return [not_measured("Text", LABELS[mode], metric, why) for metric in (RATE, PERPLEXITY, BLEU) for mode in ROLES]
    recognise, texts, notes, rows = recognisers.recogniser(asr, device), {}, {}, []
    done, total = 0, sum(m.wanted.mode in ROLES for m in made)
    for mode, role in ROLES.items():
        began, own, rates = time.monotonic(), [m for m in made if m.wanted.mode == mode], []
        if not own:
            continue
        heard = texts[LABELS[mode]] = []
        for m in own:
            said = recognisers.normalise(recognise(m.after_T))
            rates.append(len(said.split()) * SAMPLE_RATE / len(m.after_T))
            heard += [(m.wanted.clip, said)] if len(said.split()) > 1 else []
            progress(done := done + 1, total, "transcripts")
        notes[LABELS[mode]] = f"{len(own) - len(heard)} of {len(own)} said fewer than two words" if len(heard) < len(own) else ""
        rows.append(Result("Text", LABELS[mode], RATE, *bootstrap_interval(rates, [m.wanted.clip for m in own], seed), len(own), "sounds",
                        role, seconds=time.monotonic() - began))
    rows += [*perplexities(texts, text_model, device, seed), *repetition(texts, seed)]
    return [replace(r, note="; ".join(n for n in (r.note, notes.get(r.item)) if n)) for r in rows]


def perplexities(texts: Texts, text_model: str | None, device: str = "cpu", seed: int = 0) -> list[Result]:
    """Of each item, and of the originals' words in random order."""
    if why := models.missing_dependency(text_model):
        return [not_measured("Text", item, PERPLEXITY, why) for item in texts]
    mixed = [(clip, mix(text, seed, clip)) for clip, text in texts.get(LABELS["original"], ())]
    score, rows = models.scorer(text_model, device), []
    for item, own in {**texts, SHUFFLED: mixed}.items():
        began, found = time.monotonic(), [score(text) for _, text in own]
        if not found:
            rows.append(not_measured("Text", item, PERPLEXITY, "no two words were heard"))
            continue
        a_token, tokens = [nats / n for nats, n in found], [n for _, n in found]
        value, low, high = (float(np.exp(x)) for x in bootstrap_interval(a_token, [clip for clip, _ in own], seed, tokens))
        rows.append(Result("Text", item, PERPLEXITY, value, low, high, len(own), "utterances", _role(item),
                        seconds=time.monotonic() - began, note=f"by {text_model}"))
    return rows


def repetition(texts: Texts, seed: int = 0) -> list[Result]:
    """auto-BLEU-2 of each item."""
    rows = [Result("Text", item, BLEU, *bootstrap_interval([100 * auto_bleu(text) for _, text in own], [clip for clip, _ in own], seed),
                len(own), "utterances", _role(item)) if own else not_measured("Text", item, BLEU, "no two words were heard")
            for item, own in texts.items()]
    return [*rows, Result("Text", AGAIN, BLEU, 100.0, n=1, of="utterances", role="floor")]


def auto_bleu(text: str, most: int = 2) -> float:
    """Geometric mean over n = 1 to most of the share of n-grams that occur again in the text (0 to 1)."""
    words, shares = text.split(), []
    for n in range(1, most + 1):
        counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
        shares.append(sum(c for c in counts.values() if c > 1) / max(1, counts.total()))
    return float(np.prod(shares) ** (1 / most))


def mix(text: str, seed: int, clip: str) -> str:
    words = text.split()
    return " ".join(words[i] for i in rng.generator(seed, f"shuffled words {clip}").permutation(len(words)))


def _role(item: str) -> str:
    return next((role for mode, role in ROLES.items() if LABELS[mode] == item), "floor")


def text_suite(ask: SuiteContext) -> list[Result]:
    """Whether what continuations say is likely and does not repeat itself."""

    t = ask.config.tables
    made = samples_for(ask, "continued", lambda: clips_to_continue(ask), PLAN)
    return text_results(made, t.text_model, t.asr, ask.device, ask.config.run.seed, ask.out.progress)
