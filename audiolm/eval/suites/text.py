"""Text of continuations (GSLM, 2102.01192, section 4.2): perplexity and self-repetition of their transcripts.

The audio after the prompt is transcribed by `eval.models.asr`, originals alike, so that both carry the recogniser's errors.
Perplexity a token comes from a causal text model of transformers, by path.  It is low for sense, but also for one phrase over
and over, which auto-BLEU exposes: the geometric mean of the shares of an utterance's words, and of its word pairs, that occur
again in it.  Originals are the ceiling; their words in random order are perplexity's floor.  Utterances of fewer than two words
are left out, so a model that seldom speaks is scored on its best: words a second and a note show that.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from audiolm import rng
from audiolm.eval.generated import LABELS, Sample, by_item
from audiolm.eval.metrics.stats import bootstrap_interval
from audiolm.eval.models import asr as recognisers
from audiolm.eval.models import text_model as models
from audiolm.eval.results import Progress, Result, no_progress, not_measured
from audiolm.eval.suites.base import SuiteContext, continuations, score_items
from audiolm.tokenizers.base import SAMPLE_RATE

ROLES = {"original": "ceiling", "continuation": "ours"}
PLAN = dict.fromkeys(ROLES, 1)  # samples of each mode a clip
SHUFFLED, AGAIN = "original, its words in random order", "one word over and over"
RATE, PERPLEXITY, BLEU = "words a second", "perplexity a token", "auto-BLEU-2 %"
NO_WORDS = "no two words were heard"

Texts = dict[str, list[tuple[str, str]]]  # by item: (clip, text)


def text_results(samples: Sequence[Sample], text_model: str | None = None, asr: str | None = None, device: str = "cpu",
                 seed: int = 0, progress: Progress = no_progress) -> list[Result]:
    """Rows of the three metrics. `asr` as in `asr.recogniser`; without its packages, or without a text model, rows say so."""
    if why := recognisers.missing_dependency(asr):
        return [not_measured("Text", LABELS[mode], metric, why) for metric in (RATE, PERPLEXITY, BLEU) for mode in ROLES]
    recognise, texts, notes, rows = recognisers.recogniser(asr, device), {}, {}, []

    def transcribe(sample: Sample) -> str:
        return recognisers.normalise(recognise(sample.after_T))

    for scored in score_items(by_item(samples, ROLES), transcribe, progress, "transcripts"):
        n = len(scored.samples)
        if not n:
            continue
        texts[scored.item] = [(clip, text) for clip, text in zip(scored.clips, scored.values, strict=True)
                              if len(text.split()) > 1]
        if silent := n - len(texts[scored.item]):
            notes[scored.item] = f"{silent} of {n} said fewer than two words"
        rates = [len(text.split()) * SAMPLE_RATE / len(s.after_T)
                 for s, text in zip(scored.samples, scored.values, strict=True)]
        rows.append(Result("Text", scored.item, RATE, *bootstrap_interval(rates, scored.clips, seed), n, "sounds", scored.role,
                           seconds=scored.seconds))
    rows += [*perplexities(texts, text_model, device, seed), *repetition(texts, seed)]
    return [replace(r, note="; ".join(n for n in (r.note, notes.get(r.item)) if n)) for r in rows]


def perplexities(texts: Texts, text_model: str | None, device: str = "cpu", seed: int = 0) -> list[Result]:
    """Perplexity of each item, and of the originals' words in random order; utterances weigh by their tokens."""
    if why := models.missing_dependency(text_model):
        return [not_measured("Text", item, PERPLEXITY, why) for item in texts]
    shuffled = [(clip, mix(text, seed, clip)) for clip, text in texts.get(LABELS["original"], ())]
    score, rows = models.scorer(text_model, device), []
    for item, utterances in {**texts, SHUFFLED: shuffled}.items():
        began, scores = time.monotonic(), [score(text) for _, text in utterances]  # (nats, tokens)
        if not scores:
            rows.append(not_measured("Text", item, PERPLEXITY, NO_WORDS))
            continue
        clips, tokens = [clip for clip, _ in utterances], [n for _, n in scores]
        interval = bootstrap_interval([nats / n for nats, n in scores], clips, seed, tokens)
        rows.append(Result("Text", item, PERPLEXITY, *(float(np.exp(x)) for x in interval), len(clips), "utterances",
                           _role(item), seconds=time.monotonic() - began, note=f"by {text_model}"))
    return rows


def repetition(texts: Texts, seed: int = 0) -> list[Result]:
    """auto-BLEU-2 of each item."""
    rows = []
    for item, utterances in texts.items():
        values, clips = [100 * auto_bleu(text) for _, text in utterances], [clip for clip, _ in utterances]
        rows.append(Result("Text", item, BLEU, *bootstrap_interval(values, clips, seed), len(clips), "utterances", _role(item))
                    if clips else not_measured("Text", item, BLEU, NO_WORDS))
    return [*rows, Result("Text", AGAIN, BLEU, 100.0, n=1, of="utterances", role="floor")]


def auto_bleu(text: str, most: int = 2) -> float:
    """Geometric mean over n = 1 to most of the share of n-grams that occur again in the text (0 to 1)."""
    words, shares = text.split(), []
    for n in range(1, most + 1):
        counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
        shares.append(sum(c for c in counts.values() if c > 1) / max(1, counts.total()))
    return float(np.prod(shares) ** (1 / most))


def mix(text: str, seed: int, clip: str) -> str:
    """The words of a clip's text in random order."""
    words = text.split()
    return " ".join(words[i] for i in rng.generator(seed, f"shuffled words {clip}").permutation(len(words)))


def _role(item: str) -> str:
    """The role of an item; the floors are no mode of ROLES."""
    return next((role for mode, role in ROLES.items() if LABELS[mode] == item), "floor")


def text_suite(context: SuiteContext) -> list[Result]:
    """Transcripts of continuations beside those of the originals."""
    tables = context.config.tables
    return text_results(continuations(context, PLAN), tables.text_model, tables.asr, context.device, context.seed,
                        context.progress)
