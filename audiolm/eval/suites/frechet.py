"""Fréchet audio distance (1812.08466) between sets of sounds: how far their embeddings' Gaussians lie apart.

No embedding network comes inside a package, so the embedder at hand is plain: of each second its log-mels' means and
standard deviations over time (64 bands), which hear loudness, colour and liveliness, not harmony.  So our figures compare
with each other alone.  It is fixed, thus comparable between checkpoints and runs.  wav_T float32 mono at 16 kHz.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from audiolm import rng
from audiolm.eval import generated
from audiolm.eval.metrics.frechet import EMBEDDER, embed_logmel, frechet
from audiolm.eval.metrics.stats import RESAMPLES, interval
from audiolm.eval.results import Result
from audiolm.eval.suites import detector as told
from audiolm.eval.suites.base import clips_to_continue, samples_for

if TYPE_CHECKING:
    from audiolm.eval.suites.base import SuiteContext

HALVES = "held-out clips, one half against the other"
RESAMPLED = RESAMPLES // 10  # each wants eigenvalues


def frechet_results(held_out: Sequence[np.ndarray], sounds: Mapping[str, Sequence[np.ndarray]], seed: int = 0) -> list[Result]:
    """Of each set of sounds by name against held-out clips; sets whose name begins with codec are the ceiling, as are the
    clips' two halves against each other, which says what their number allows. Intervals by bootstrap over a set's clips."""
    against = np.concatenate([embed_logmel(w) for w in held_out])
    compared = {name: (wavs, against) for name, wavs in sounds.items()}
    if len(held_out) > 3:
        compared = {HALVES: (held_out[::2], np.concatenate([embed_logmel(w) for w in held_out[1::2]])), **compared}
    rows = []
    for item, (wavs, other) in compared.items():
        began = time.perf_counter()
        parts = [embed_logmel(w) for w in wavs]
        draw = rng.generator(seed, f"fad {item}")
        drawn = [frechet(np.concatenate([parts[i] for i in draw.integers(len(parts), size=len(parts))]), other)
                 for _ in range(RESAMPLED)]
        role = "ceiling" if item.startswith(("codec", HALVES)) else "ours"
        rows.append(Result("FAD", item, f"FAD ({EMBEDDER})", frechet(np.concatenate(parts), other), *interval(drawn),
                        len(wavs), role=role, seconds=time.perf_counter() - began))
    return rows


def frechet_suite(ask: SuiteContext) -> list[Result]:
    """Fréchet audio distance of sounds to held-out clips, the codec's beside them."""
    made = samples_for(ask, "continued", lambda: clips_to_continue(ask), {**told.PLAN, "acoustic": 1})
    by = {mode: [m for m in made if m.wanted.mode == mode] for mode in ("original", "resynthesis", "acoustic", "continuation")}
    # what follows the prompts, of every other clip against the others: no sound is compared with its own original
    held_out = [m.after_T for m in by["original"][::2]]
    return frechet_results(held_out, {generated.LABELS[mode]: [m.after_T for m in by[mode][1::2]] for mode in
                               ("resynthesis", "acoustic", "continuation")}, ask.config.run.seed)
