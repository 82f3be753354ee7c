"""Fréchet distance (1812.08466) between sets of audio: the distance of the Gaussians of their embeddings.

No embedding network comes inside a package, so the embedder is plain: means and standard deviations over time of each second's
64 log-mels.  They capture loudness, colour and liveliness, not harmony, so figures compare only with each other.  The
embedder is fixed, so they compare between checkpoints and runs.  wav_T: float32 mono at 16 kHz.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from audiolm.eval.generated import LABELS, of_mode
from audiolm.eval.metrics.frechet import EMBEDDER, embed_logmel, unbiased_frechet
from audiolm.eval.metrics.stats import bootstrap_interval
from audiolm.eval.results import Result
from audiolm.eval.suites.base import SuiteContext, continuations, groups_of

HALVES = "held-out clips, one half against the other"
SCORED = ("resynthesis", "acoustic", "continuation")
PLAN = dict.fromkeys(("original", *SCORED), 1)  # samples of each mode a clip


def frechet_results(held_out: Sequence[np.ndarray], sets: Mapping[str, Sequence[np.ndarray]], seed: int = 0,
                    groups: Sequence[str] | None = None) -> list[Result]:
    """Distance of each set of audio {name: wavs} to held-out clips, with intervals by bootstrap over the clips, or over
    `groups` of the sets' clips.

    All sets are cut to the size of the smallest, so that the distances compare.  Ceiling: sets whose name begins with codec,
    and the set HALVES, whose distance is 0 but for the error that so few clips allow."""
    n = min(map(len, (held_out, *sets.values())))
    reference, rows = [embed_logmel(w) for w in held_out[:n]], []
    for item, wavs in sets.items():
        began = time.perf_counter()
        values_N = unbiased_frechet([embed_logmel(w) for w in wavs[:n]], reference)
        interval = bootstrap_interval(values_N, groups[:n] if groups else range(n), seed)
        role = "ceiling" if item.startswith(("codec", HALVES)) else "ours"
        rows.append(Result("FAD", item, f"FAD ({EMBEDDER})", *interval, n, role=role,
                           seconds=time.perf_counter() - began))
    return rows


def frechet_suite(context: SuiteContext) -> list[Result]:
    """Distance of the audio after the prompts to held-out clips, beside the codec's and the originals' own."""
    samples = continuations(context, PLAN)
    # Every other clip against the others: no sample is compared with its own original.
    held_out, others = (of_mode(samples, "original")[half::2] for half in (0, 1))
    scored = {HALVES: others, **{LABELS[mode]: of_mode(samples, mode)[1::2] for mode in SCORED}}
    sets = {name: [s.after_T for s in chosen] for name, chosen in scored.items()}
    return frechet_results([s.after_T for s in held_out], sets, context.seed, groups_of(others))
