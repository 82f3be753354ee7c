"""Rows of figures and their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from audiolm.eval.metrics.stats import bootstrap_interval
from audiolm.eval.results import Result, not_measured


def test_intervals_cover_the_mean_about_as_often_as_they_say():
    draw, hit = np.random.default_rng(0), 0
    for i in range(200):
        speaker = draw.standard_normal(40)  # what a speaker's clips share
        values = (speaker[:, None] + 0.1 * draw.standard_normal((40, 5))).ravel()
        mean, low, high = bootstrap_interval(values, np.repeat(np.arange(40), 5), seed=i)
        assert low <= mean <= high
        hit += low <= 0 <= high
    assert 0.88 <= hit / 200 <= 0.99
    _, low, high = bootstrap_interval(values, np.arange(len(values)))  # clips taken for independent: too sure
    grouped = bootstrap_interval(values, np.repeat(np.arange(40), 5))
    assert high - low < 0.6 * (grouped[2] - grouped[1])


def test_weights_and_refusals():
    assert bootstrap_interval([0.0, 1.0], "ab", weights=[3, 1])[0] == 0.25
    assert bootstrap_interval([0.5], "a") == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_interval([], [])
    with pytest.raises(ValueError, match="role 'best'"):
        Result("II", "x", "WER %", 1.0, role="best")
    assert not_measured("II", "x", "WER %", "pip install audiolm[eval]").value is None
