"""Log-mels by clip: what no longer shows in features and MFCC targets, padding, and warps of the spectrum."""

from __future__ import annotations

import math

import torch

from audiolm.models.conformer import Encoder, EncoderSizes
from audiolm.models.mel import log_mel, warp_matrix
from audiolm.tokenizers.extractor import extractor_mel
from audiolm.train.objectives.mfcc_targets import target_features
from tests.worlds.syllables import RATE, syllables


def test_normalised_by_clip_neither_level_nor_channel_nor_inaudible_noise_shows():
    """A channel of fixed gains a band, a gain, and noise 70 dB below the sound: what MFCC targets and features lose by clip."""
    wav = syllables(1, 2.0)
    mel_BTF, frames_B = extractor_mel(wav[None], torch.tensor([len(wav)]))
    noisy_BTF, _ = extractor_mel((wav + 3e-5 * torch.randn(wav.shape, generator=torch.Generator().manual_seed(0)))[None],
                                 torch.tensor([len(wav)]))

    @torch.no_grad()
    def moved(other_BTF: torch.Tensor) -> dict[str, tuple[float, float]]:
        """Share of the variance that differs, of (features, targets), by normalisation."""
        shares = {}
        for normalise in ("corpus", "clip"):
            torch.manual_seed(0)
            encoder = Encoder(EncoderSizes(32, 2, 2, 48, normalise=normalise)).eval()
            pairs = zip(*((encoder(x, frames_B), target_features(x, frames_B, normalise)) for x in (mel_BTF, other_BTF)),
                        strict=True)
            shares[normalise] = tuple(float((a - b).square().mean() / a.var()) for a, b in pairs)
        return shares

    louder, tilted, noisy = (moved(x) for x in (mel_BTF + 1.0, mel_BTF + torch.linspace(-0.5, 0.5, 80), noisy_BTF))
    assert max(louder["clip"]) < 1e-6 and louder["corpus"][0] > 1e-3  # 9 dB
    assert tilted["clip"][0] < 0.5 * tilted["corpus"][0]
    assert max(noisy["clip"]) < 0.01 and min(noisy["corpus"]) > 0.05


def test_a_warp_of_log_mels_is_that_of_the_filterbank():
    wav = syllables(1, 1.0)[None] + 0.01 * torch.randn(1, RATE, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(warp_matrix(1.0), torch.eye(80), atol=1e-5)
    for ratio in (0.85, 1.15):
        warped, plain = log_mel(wav, ratio_B=torch.tensor([ratio])), log_mel(wav)
        assert (plain @ warp_matrix(ratio) - warped).square().mean() < 0.5 * (plain - warped).square().mean()


def test_normalised_by_clip_a_row_is_the_same_alone_and_padded_in_a_batch():
    torch.manual_seed(0)
    encoder = Encoder(EncoderSizes(32, 2, 2, 48, normalise="clip")).eval()
    a, b = syllables(1, 1.5), syllables(2, 0.8)
    wav_BT = torch.full((2, 24_000), 0.7)  # what lies beyond a row's length must not matter
    wav_BT[0], wav_BT[1, :len(b)] = a, b
    mel_BTF, frames_B = extractor_mel(wav_BT, torch.tensor([len(a), len(b)]))
    alone = extractor_mel(b[None], torch.tensor([len(b)]))
    assert (encoder(mel_BTF, frames_B)[1, :20] - encoder(*alone)[0]).abs().max() < 1e-4
    targets = target_features(mel_BTF, frames_B, "clip")[1, :20]
    assert (targets - target_features(*alone, "clip")[0]).abs().max() < 1e-4
    assert torch.isfinite(encoder(torch.full((1, 8, 80), math.log(1e-5)), torch.tensor([2]))).all()  # silence


def test_an_export_names_the_normalisation_only_where_it_is_by_clip():
    assert "normalise" not in EncoderSizes(32, 2, 2, 48).to_json()
    assert EncoderSizes(**EncoderSizes(32, 2, 2, 48, normalise="clip").to_json()).normalise == "clip"
