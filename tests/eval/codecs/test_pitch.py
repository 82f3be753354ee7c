"""YIN on glides of known pitch, on noise and on silence, and the correlation of two pitches."""

from __future__ import annotations

import numpy as np
import pytest

from audiolm import rng
from audiolm.eval.metrics.pitch import HOP, WINDOW, f0_correlation, f0_hz

T = np.arange(2 * 16_000) / 16_000


def glide(hz: float, breath: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """(a voice of seven harmonics whose pitch moves by 5 %, its pitch in Hz at each frame's middle)."""
    hz_T = hz * (1 + 0.05 * np.sin(2 * np.pi * 2 * T))
    phase = 2 * np.pi * np.cumsum(hz_T) / 16_000
    wav_T = sum(np.sin(k * phase) / k for k in range(1, 8)) + breath * rng.generator(0, "breath").standard_normal(len(T))
    middles = np.arange(len(T) // HOP) * HOP + (WINDOW + 16_000 / hz) / 2
    return wav_T.astype(np.float32), np.interp(middles / 16_000, T, hz_T)


@pytest.mark.parametrize("hz", [75, 120, 220, 400])
def test_a_glide_is_found_within_a_percent_and_with_breath_too(hz):
    wav_T, true_N = glide(hz)
    found_N = f0_hz(wav_T)
    assert len(found_N) == 200 and np.isfinite(found_N[2:-5]).all()
    assert np.abs(found_N / true_N - 1)[2:-5].max() < 0.01
    assert f0_correlation(found_N, f0_hz(0.3 * wav_T)) == pytest.approx(1, abs=1e-9)  # loudness does not count
    with_breath_N = f0_hz(glide(hz, 0.2)[0])
    assert np.isfinite(with_breath_N).mean() > 0.9 and f0_correlation(found_N, with_breath_N) > 0.95


def test_noise_and_silence_have_no_pitch_and_a_correlation_says_why_it_has_no_value():
    noise_T = rng.generator(0, "noise").standard_normal(16_000).astype(np.float32)
    voice_N = f0_hz(glide(120)[0])[:100]
    for wav_T in (noise_T, np.zeros(16_000, np.float32)):
        assert np.isfinite(f0_hz(wav_T)).mean() < 0.02
        assert f0_correlation(voice_N, f0_hz(wav_T)) == "fewer than 10 frames are voiced in both"
    assert len(f0_hz(noise_T[:100])) == 0 and len(f0_hz(noise_T[:HOP])) == 1
    assert f0_correlation(voice_N, np.full(100, 120.0)) == "the pitch does not move"
    assert f0_correlation(voice_N, 400 - voice_N) == pytest.approx(-1)  # a mirrored melody
