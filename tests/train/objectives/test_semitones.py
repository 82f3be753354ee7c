"""Semitones: the keys that sound stand out, and targets tell keys apart whatever the level, padding or silence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from audiolm.models.semitones import LOWEST, semitones
from audiolm.train.objectives.semitone_targets import semitone_targets
from tests.worlds.syllables import RATE, tones


@pytest.mark.parametrize("chord", [[60], [48, 64, 67], [57, 72]])
def test_semitones_name_the_keys_that_sound(chord):
    x_K = semitones(tones(chord))[0, 20:80].mean(0)
    harmonics = {m + h for m in chord for h in (0, 12, 19, 24)}
    assert {int(k) + LOWEST for k in x_K.topk(len(chord)).indices} <= harmonics
    assert all(x_K[m - LOWEST] > 3 * x_K.median() for m in chord)


def test_semitone_targets_change_with_the_key_and_not_with_level_or_padding():
    def targets(wav_1T: torch.Tensor, frames: int = 25) -> torch.Tensor:
        return semitone_targets(semitones(wav_1T), torch.tensor([frames]))[0]

    a, b, c = (targets(tones([m]))[5:20].mean(0) for m in (60, 61, 72))
    assert F.cosine_similarity(a, b, 0) < 0.3 < F.cosine_similarity(a, c, 0)  # an octave shares harmonics, a semitone none
    assert (targets(tones([60, 64], gain=0.5)) - targets(tones([60, 64], gain=0.005))).abs().max() < 1e-3
    padded = targets(F.pad(tones([60]), (0, RATE)))
    assert (padded[:20] - targets(tones([60]))[:20]).abs().max() < 1e-4 and not padded[30:].any()
    assert not targets(torch.zeros(1, RATE)).any()
