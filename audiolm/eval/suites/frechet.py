"""Fréchet distance (1812.08466) between sets of audio: the distance of the Gaussians of their embeddings.

No embedding network comes inside a package, so the embedder is plain: means and standard deviations over time of each second's
64 log-mels.  They capture loudness, colour and liveliness, not harmony, so figures compare only with each other.  The
embedder is fixed, so they compare between checkpoints and runs.  wav_T: float32 mono at 16 kHz.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from audiolm import rng
from audiolm.eval.generated import LABELS, of_mode
from audiolm.eval.metrics.frechet import EMBEDDER, embed_logmel, frechet
from audiolm.eval.metrics.stats import RESAMPLES, interval
from audiolm.eval.results import Result
from audiolm.eval.suites.base import SuiteContext, continuations

HALVES = "held-out clips, one half against the other"
RESAMPLED = RESAMPLES // 10  # fewer than other intervals: each draw needs eigenvalues
SCORED = ("resynthesis", "acoustic", "continuation")
PLAN = dict.fromkeys(("original", *SCORED), 1)  # samples of each mode a clip


def frechet_results(held_out: Sequence[np.ndarray], sets: Mapping[str, Sequence[np.ndarray]], seed: int = 0) -> list[Result]:
    """Distance of each set of audio {name: wavs} to held-out clips, with intervals by bootstrap over the set's clips.

    Ceiling: sets whose name begins with codec, and the clips' two halves against each other, which show the error that so few
    clips allow."""
    reference = np.concatenate([embed_logmel(w) for w in held_out])
    compared = {name: (wavs, reference) for name, wavs in sets.items()}
    if len(held_out) > 3:
        compared = {HALVES: (held_out[::2], np.concatenate([embed_logmel(w) for w in held_out[1::2]])), **compared}
    rows = []
    for item, (wavs, other) in compared.items():
        began = time.perf_counter()
        parts = [embed_logmel(w) for w in wavs]
        draw = rng.generator(seed, f"fad {item}")
        resampled = [frechet(np.concatenate([parts[i] for i in draw.integers(len(parts), size=len(parts))]), other)
                     for _ in range(RESAMPLED)]
        role = "ceiling" if item.startswith(("codec", HALVES)) else "ours"
        rows.append(Result("FAD", item, f"FAD ({EMBEDDER})", frechet(np.concatenate(parts), other), *interval(resampled),
                           len(wavs), role=role, seconds=time.perf_counter() - began))
    return rows


def frechet_suite(context: SuiteContext) -> list[Result]:
    """Distance of the audio after the prompts to held-out clips, beside the codec's."""
    samples = continuations(context, PLAN)
    # Every other clip against the others: no sample is compared with its own original.
    held_out = [s.after_T for s in of_mode(samples, "original")[::2]]
    sets = {LABELS[mode]: [s.after_T for s in of_mode(samples, mode)[1::2]] for mode in SCORED}
    return frechet_results(held_out, sets, context.seed)
