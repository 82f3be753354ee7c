"""Kaldi's log-mels against transformers', and the silence that has no variance."""

from __future__ import annotations

import pytest
import torch

from audiolm import rng
from audiolm.models.kaldi_fbank import scaled_log_mel

LENGTHS = [640, 1280, 6400, 16_640, 64_000]


@pytest.mark.parametrize("n_mels", [80, 40])
def test_the_mels_are_those_of_transformers(n_mels):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.SeamlessM4TFeatureExtractor(num_mel_bins=n_mels)
    wav_BT = torch.zeros(len(LENGTHS), max(LENGTHS) + 240)
    for row, n in enumerate(LENGTHS):
        g = rng.generator(0, "test-kaldi", row)
        loudness = torch.from_numpy(g.uniform(0, 1, n // 640) ** 3).repeat_interleave(640)
        wav_BT[row, 120:120 + n] = torch.from_numpy(g.standard_normal(n)) * loudness * 10.0 ** -row + 0.05
    mel_BTF = scaled_log_mel(wav_BT, torch.tensor(LENGTHS) // 160, n_mels)
    for row, n in enumerate(LENGTHS):
        want_TF = theirs(wav_BT[row, :n + 240].numpy(), sampling_rate=16_000, return_tensors="pt").input_features[0]
        assert want_TF.abs().max() > 1
        assert torch.allclose(mel_BTF[row, :n // 160].reshape(want_TF.shape), want_TF, atol=1e-4, rtol=0)
        assert not mel_BTF[row, n // 160:].any()


def test_every_frame_of_silence_is_nought():
    for level in (0.0, 0.3):
        assert scaled_log_mel(torch.full((1, 16_240), level), torch.tensor([100])).abs().max() < 1e-4
