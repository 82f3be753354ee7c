"""Fréchet audio distance: against its formula, and it orders planted sounds."""

from __future__ import annotations

import numpy as np
import pytest

from audiolm.eval.metrics import frechet
from audiolm.eval.suites import frechet as frechet_suites


def test_gaussians_of_known_distance():
    draw = np.random.default_rng(0)
    x, y = draw.standard_normal((50_000, 3)), 2 * draw.standard_normal((50_000, 3)) + 1
    assert frechet.frechet(x, y) == pytest.approx(3 + 3 * (2 - 1) ** 2, rel=0.03)
    assert frechet.frechet(x, x) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="at least two seconds"):
        frechet.frechet(x[:1], y)


def notes(seed: int, hiss: float) -> np.ndarray:
    """Three seconds of plucked tones in noise."""
    draw, t = np.random.default_rng(seed), np.arange(8_000) / 16_000
    tones = [0.3 * np.exp(-4 * t) * np.sin(2 * np.pi * 220 * 2 ** (draw.integers(0, 24) / 12) * t) for _ in range(6)]
    return (np.concatenate(tones) + hiss * draw.standard_normal(48_000)).astype(np.float32)


@pytest.mark.parametrize("clips", [6, 20])
def test_equal_distributions_are_nought_apart_whatever_the_number_of_clips(clips):
    held_out, halves, ours = ([notes(100 * k + i, 0.001) for i in range(clips)] for k in range(3))
    biased = frechet.frechet(*(np.concatenate([frechet.embed_logmel(w) for w in wavs]) for wavs in (held_out, ours)))
    floor, row = frechet_suites.frechet_results(held_out, {frechet_suites.HALVES: halves, "ours": [*ours, *ours]})
    for r in (floor, row):
        assert r.n == clips and r.low < r.value < r.high
        assert r.low < 0 < r.high and abs(r.value) < biased / 2
    assert frechet_suites.frechet_results(held_out, {"ours": ours})[0].value == row.value
    with pytest.raises(ValueError, match="at least 2"):
        frechet_suites.frechet_results(held_out, {"ours": ours[:1]})


def test_what_is_nearer_scores_lower():
    held_out = [notes(i, 0.001) for i in range(12)]
    sets = {frechet_suites.HALVES: [notes(i, 0.001) for i in range(40, 52)],
            "codec": [notes(i, 0.0011) for i in range(20, 32)], "hissing": [notes(i, 0.01) for i in range(20, 32)],
            "noise": [np.random.default_rng(i).standard_normal(48_000).astype(np.float32) for i in range(12)]}
    rows = {row.item: row for row in frechet_suites.frechet_results(held_out, sets)}
    assert rows[frechet_suites.HALVES].high < rows["hissing"].low
    assert rows["codec"].value < rows["hissing"].value < rows["noise"].value
    assert rows["codec"].role == rows[frechet_suites.HALVES].role == "ceiling" and rows["noise"].role == "ours"
    assert all(row.low <= row.value <= row.high and row.n == 12 for row in rows.values())
    with pytest.raises(ValueError, match="at least 1 s"):
        frechet.embed_logmel(held_out[0][:8_000])
