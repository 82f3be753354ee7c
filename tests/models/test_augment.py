"""Augmentation: pitch moves the spectrum and nothing else, noise has its power, reverberation keeps frames in place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from audiolm import rng
from audiolm.models.augment import Augmentation, augment, draw_augmentation, reverberated, with_noise
from audiolm.models.mel import filterbank, log_mel, warped_filterbank

RATE = 16_000


def tone(hz: float, seconds: float = 1.0) -> torch.Tensor:
    return 0.3 * torch.sin(2 * torch.pi * hz * torch.arange(int(seconds * RATE)) / RATE)


def speech_like(seed: int, n: int = RATE) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(n, generator=g) * (torch.sin(torch.arange(n) / 1500.0) > 0)


@pytest.mark.parametrize("cents", [-300, -200, 200, 300])
def test_a_shift_moves_a_tone_to_where_a_tone_of_that_pitch_lies(cents):
    ratio = 2 ** (cents / 1200)
    shifted = log_mel(tone(3000.0)[None], ratio_B=torch.tensor([ratio]))[0].mean(0)
    there, here = log_mel(tone(3000.0 * ratio)[None])[0].mean(0), log_mel(tone(3000.0)[None])[0].mean(0)
    assert abs(int(shifted.argmax()) - int(there.argmax())) <= 1 < abs(int(here.argmax()) - int(there.argmax()))
    assert abs(float(shifted.max() - there.max())) < 0.5  # as loud


def test_no_shift_is_the_plain_filterbank_and_no_band_falls_empty():
    plain = filterbank(RATE, 400, 80)
    assert torch.allclose(warped_filterbank(torch.tensor([1.0]), RATE, 400, 80)[0], plain, atol=1e-6)
    ratio_B = torch.tensor([2 ** (c / 1200) for c in (-300, -50, 50, 300)])
    assert (warped_filterbank(ratio_B, RATE, 400, 80).sum(1)[:, 3:] > 0.1).all()


@pytest.mark.parametrize("colour", [0.0, 1.0])
def test_noise_has_the_asked_power(colour):
    wav = speech_like(1)
    noise = with_noise(wav, 10.0, colour, RATE, torch.Generator().manual_seed(3)) - wav
    assert 10 * float(torch.log10(wav.square().mean() / noise.square().mean())) == pytest.approx(10.0, abs=0.01)
    low, high = (torch.fft.rfft(noise).abs()[a:b].square().mean() for a, b in ((100, 1000), (6000, 8000)))
    assert (low / high > 4) == bool(colour)


def test_sounds_of_a_second_share_an_fft():
    """Their noise is the same up to its scale, which it would not be had each length a transform of its own."""
    wav = speech_like(1)
    long, short = (with_noise(wav[:n], 10.0, 1.0, RATE, torch.Generator().manual_seed(3)) - wav[:n] for n in (15_998, 9_601))
    scale = long[:9_601].norm() / short.norm()
    assert torch.allclose(long[:9_601], scale * short, atol=1e-5)


def test_a_room_smears_forward_only_and_stays_as_loud():
    click = torch.zeros(RATE)
    click[8000] = 1.0
    wet = reverberated(click, 0.3, 0.5, RATE, torch.Generator().manual_seed(0))
    assert wet[:8000].abs().max() < 1e-5 and int(wet.abs().argmax()) == 8000 and wet[8200:].abs().max() > 0.001
    assert float(wet.square().sum()) == pytest.approx(1.0, rel=1e-4)
    tail = wet[8001:8001 + int(0.3 * RATE)].square()
    assert tail[-480:].mean() < 1e-4 * tail[:480].mean()


def test_rows_do_not_see_each_other_nor_padding_and_frames_stay():
    wavs, lengths = [speech_like(i, n) for i, n in enumerate((16_000, 9_600))], torch.tensor([16_000, 9_600])
    draws = [Augmentation(200.0, 10.0, 0.5, 0.2, 0.5, seed=7), Augmentation(-150.0, 15.0, 0.0, 0.3, 0.5, seed=8)]
    wav_BT = torch.zeros(2, 16_000)
    for row, wav in zip(wav_BT, wavs, strict=True):
        row[:len(wav)] = wav
    both = augment(wav_BT, lengths, draws)
    alone = augment(wavs[1][None], lengths[1:], draws[1:])
    assert torch.allclose(both[1, :60], alone[0], atol=1e-4)
    assert both[1, 62:].max() < -11  # silence after the row's end
    nothing = augment(wav_BT, lengths, [Augmentation(), Augmentation()])
    assert torch.equal(nothing, log_mel(wav_BT))


def test_draws_have_their_chances_and_ranges():
    draws = [draw_augmentation((0.5, 0.25, 0.25), 300.0, (5.0, 25.0), (0.1, 0.5), rng.generator(1, "augment", 0, i))
             for i in range(2000)]
    assert 0.45 < np.mean([d.cents != 0 for d in draws]) < 0.55
    assert 0.2 < np.mean([d.snr_db is not None for d in draws]) < 0.3
    assert 0.2 < np.mean([d.reverb_s is not None for d in draws]) < 0.3
    assert max(abs(d.cents) for d in draws) <= 300 and min(d.snr_db for d in draws if d.snr_db is not None) >= 5
    assert len({d.seed for d in draws}) == 2000
