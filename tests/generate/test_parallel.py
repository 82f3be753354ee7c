"""Sampling from the parallel decoder: more passes are never worse, and what is given or kept is never masked again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from audiolm.generate.parallel import OVERLAP, PASSES, ParallelSampler
from audiolm.generate.params import SamplingParams
from audiolm.lm.parallel import frame_ids
from tests.worlds.voices import LEVELS, STAGE, VOCAB, K, sound, trained, untrained

WARM, GREEDY = SamplingParams(0.8), SamplingParams(0)
CROP = 2 * STAGE.crop_frames


@pytest.fixture(scope="module")
def model():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield trained()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sounds():
    draw = np.random.default_rng(1)
    return [sound(draw) for _ in range(24)]


def test_more_passes_are_never_worse(model, sounds):
    """One pass cannot agree on a voice; a fault in what is masked again would show in level 2, or in fewer agreements."""
    z, shares = [z_T for z_T, _ in sounds], []
    for passes in (1, 4, 16):
        codes = ParallelSampler(model, STAGE)(z, range(len(z)), passes=passes)
        voice = np.mean([np.bincount(c[:, 0] // K).max() / len(c) for c in codes])
        content = np.mean([(c[:, 0] % K == np.repeat(z_T, 2)).mean() for c, z_T in zip(codes, z, strict=True)])
        finer = np.mean([((c[:, 1] - c[:, 0]) % VOCAB == 3).mean() for c in codes])
        shares.append((voice, finer))
        assert content > 0.95
    (voice_1, finer_1), (voice_4, finer_4), (voice_16, finer_16) = shares
    assert voice_1 + 0.15 < voice_4 < voice_16 and voice_16 > 0.9
    assert finer_1 < finer_4 < finer_16 and finer_16 > 0.93


def test_the_voice_of_a_prompt_goes_on_and_its_codes_come_back(model, sounds):
    known = [codes_TQ[:16] for _, codes_TQ in sounds]
    codes = ParallelSampler(model, STAGE)([z_T for z_T, _ in sounds], range(len(sounds)), known, WARM, WARM)
    for new_TQ, (_, true_TQ), given_TQ in zip(codes, sounds, known, strict=True):
        np.testing.assert_array_equal(new_TQ[:16], given_TQ)
        assert len(new_TQ) == len(true_TQ)
    assert np.mean([(new_TQ == true_TQ).mean() for new_TQ, (_, true_TQ) in zip(codes, sounds, strict=True)]) > 0.95


def test_what_was_kept_is_never_masked_again(model, sounds):
    seen, (z_T, codes_TQ) = [], sounds[0]
    sampler = ParallelSampler(model, STAGE)
    scores = sampler._scores
    sampler._scores = lambda ids_BTC, doc_BT, level, guidance: (
        seen.append((level, ids_BTC[0].clone().numpy())), scores(ids_BTC, doc_BT, level, guidance))[1]
    (out_TQ,) = sampler([z_T], [3], [codes_TQ[:6]], WARM, WARM)
    assert [level for level, _ in seen] == [0] * PASSES + list(range(1, LEVELS))
    masked = [ids_TC[:, 1:] > STAGE.no_cond for _, ids_TC in seen]
    left = [int(m[:, 0].sum()) for m in masked[:PASSES]]
    assert left[0] == len(out_TQ) - 6 and all(a > b for a, b in zip(left, left[1:], strict=False)) and masked[-1][6:, 1].all()
    for m in masked[:PASSES]:
        assert not m[:6].any() and m[6:, 1:].all()  # the prompt is known, finer levels wait
    final_TC = frame_ids(STAGE, z_T, out_TQ, np.zeros(out_TQ.shape, bool))
    for (_, ids_TC), m in zip(seen, masked, strict=True):
        np.testing.assert_array_equal(ids_TC[:, 1:][~m], final_TC[:, 1:][~m])
        np.testing.assert_array_equal(ids_TC[:, 0], final_TC[:, 0])


def test_a_sample_depends_on_its_seed_and_not_on_its_batch(model):
    draw = np.random.default_rng(2)
    z = [sound(draw, n)[0] for n in (24, 25, 40, 7)]
    sampler = ParallelSampler(model, STAGE)
    batch = sampler(z, [1, 2, 3, 4], None, WARM, WARM)
    for i in range(4):
        np.testing.assert_array_equal(sampler([z[i]], [i + 1], None, WARM, WARM)[0], batch[i])
    voices = {int(sampler([z[3]], [seed], None, WARM, WARM)[0][0, 0]) // K for seed in range(8)}
    assert len(voices) > 1  # without a prompt the voice is drawn
    greedy = [sampler([z[0]], [seed], None, GREEDY, GREEDY)[0] for seed in (1, 2)]
    np.testing.assert_array_equal(*greedy)


def test_a_padded_batch_draws_what_each_row_draws_alone(model):
    """On a GPU rows run together; the padding of the shorter ones must not show."""
    draw = np.random.default_rng(2)
    z = [sound(draw, n)[0] for n in (24, 25, 40, 7)]
    alone, together = ParallelSampler(model, STAGE), ParallelSampler(model, STAGE)
    turn = [windows[0] for windows in (together._windows(i, 2 * len(z_T), 0) for i, z_T in enumerate(z))]
    sounds = [np.zeros((2 * len(z_T), LEVELS), np.int64) for z_T in z]
    with torch.inference_mode():
        together._draw(turn, z, sounds, [1, 2, 3, 4], (WARM, WARM), 4)
    for i, codes_TQ in enumerate(alone(z, [1, 2, 3, 4], None, WARM, WARM, 4)):
        assert (codes_TQ[:CROP] == sounds[i][:CROP]).mean() > 0.98  # up to rounding, which may turn a draw


def test_long_sounds_go_on_from_window_to_window(model):
    z_T = sound(np.random.default_rng(3), 4 * STAGE.crop_frames + 3)[0]
    sampler = ParallelSampler(model, STAGE)
    windows = sampler._windows(0, 2 * len(z_T), 10)
    assert windows[0].a == 0 and windows[0].known == 10 and windows[-1].b == 2 * len(z_T)
    assert all(w.b - w.a == CROP for w in windows)
    for before, after in zip(windows, windows[1:], strict=False):
        assert after.known == before.b and after.known - after.a >= 2 * int(OVERLAP * STAGE.crop_frames)
    (codes_TQ,) = sampler([z_T], [5], None, WARM, WARM)
    assert len(codes_TQ) == 2 * len(z_T)
    assert np.bincount(codes_TQ[:, 0] // K).max() / len(codes_TQ) > 0.9  # one voice all along
    assert [w.known for w in sampler._windows(0, 300, 120)][0] == 120 and sampler._windows(0, 20, 20) == []


def test_guidance_and_its_refusals(model, sounds):
    z = [z_T for z_T, _ in sounds[:4]]
    plain, strong = (ParallelSampler(model, STAGE)(z, range(4), None, SamplingParams(1.0, guidance=g), WARM, 1) for g in (1, 3))
    right = [np.mean([(c[:, 0] % K == np.repeat(z_T, 2)).mean() for c, z_T in zip(codes, z, strict=True)])
             for codes in (plain, strong)]
    assert right[1] >= right[0] and any(not np.array_equal(a, b) for a, b in zip(plain, strong, strict=True))
    with pytest.raises(ValueError, match="lm.condition_dropout above 0"):
        ParallelSampler(model, replace(STAGE, dropped=0.0))(z, range(4), None, SamplingParams(guidance=2))
    with pytest.raises(ValueError, match="window 8"):
        ParallelSampler(model, STAGE)(z, range(4), None, SamplingParams(window=8))


def test_a_call_may_be_ended_before_any_pass():
    sampler, passes = ParallelSampler(untrained(), STAGE), []
    sampler.check = lambda: passes.append(1)
    sampler([np.zeros(4, np.int64)], [0])
    assert len(passes) == PASSES + LEVELS - 1


def test_codes_are_legal_before_any_training():
    (codes_TQ,) = ParallelSampler(untrained(), STAGE)([np.zeros(1, np.int64)], [0])
    assert codes_TQ.shape == (2, LEVELS) and 0 <= codes_TQ.min() and codes_TQ.max() < VOCAB
    assert ParallelSampler(untrained(), STAGE)([], []) == []
    assert ParallelSampler(untrained(), STAGE)([np.zeros(0, np.int64)], [0])[0].shape == (0, LEVELS)
