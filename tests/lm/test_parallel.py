"""Documents of the parallel decoder: what is masked, what carries loss, and that documents of a row do not see each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from audiolm import rng
from audiolm.lm.model import build_parallel
from audiolm.lm.parallel import collate, document, draw_document, frame_ids, inputs_of, whole_level_sums
from audiolm.lm.stages import Stage
from audiolm.models.lm.heads import NO_TARGET
from tests.worlds.voices import GAP, LEVELS, SHAPE, STAGE, VOCAB, sound, untrained

DEEP = Stage("parallel", 4, 16, (0, 4), 4, False, 1.0, dropped=0.25)


def deep(draw: np.random.Generator, frames: int = 20) -> tuple[np.ndarray, np.ndarray]:
    return draw.integers(0, 4, frames), draw.integers(0, 16, (2 * frames, 4))


def masks_of(stage: Stage, ids_TC: np.ndarray) -> np.ndarray:
    """masked_TQ; raises where a masked place has another level's mask."""
    masked_TQ = ids_TC[:, 1:] > stage.no_cond
    assert (ids_TC[:, 1:][masked_TQ] == (stage.no_cond + 1 + np.arange(stage.slots) + 0 * ids_TC[:, 1:])[masked_TQ]).all()
    return masked_TQ


def test_loss_is_on_masked_codes_of_the_drawn_level_after_the_prompt_alone():
    draw, shares, dropped, levels, prompts = np.random.default_rng(0), [], 0, np.zeros(4), 0
    for _ in range(400):
        z_T, codes_TQ = deep(draw)
        d = draw_document(DEEP, z_T, codes_TQ, draw)
        masked_TQ, q, loss_T = masks_of(DEEP, d.ids_TC), d.level, d.label_T != NO_TARGET
        np.testing.assert_array_equal(loss_T, masked_TQ[:, q])
        np.testing.assert_array_equal(d.label_T[loss_T], codes_TQ[loss_T, q])
        assert loss_T.any() and not masked_TQ[:, :q].any()  # coarser levels are known
        # the prompt: up to it nothing is masked, behind it all finer levels are
        first = int(np.argmax(masked_TQ.any(1)))
        if q < 3:
            assert masked_TQ[first:, q + 1:].all() and not masked_TQ[:first].any()
            shares.append(loss_T.sum() / (len(loss_T) - first))
            prompts += first > 0
        known_TQ = ~masked_TQ
        ids_TQ = d.ids_TC[:, 1:] - DEEP.offset - 16 * np.arange(4)
        np.testing.assert_array_equal(ids_TQ[known_TQ], codes_TQ[known_TQ])
        no_condition = d.ids_TC[:, 0] == DEEP.no_cond
        assert no_condition.all() or (d.ids_TC[:, 0] == np.repeat(z_T, 2)).all()
        dropped += no_condition.all()
        levels[q] += 1
    assert levels.min() > 70 and 70 < dropped < 130
    assert np.mean(shares) == pytest.approx(2 / np.pi, abs=0.04)  # the mean of cos over [0, pi / 2]
    assert prompts / len(shares) == pytest.approx(0.5, abs=0.07)


def test_rates_of_condition_and_codec_are_compared():
    z_T, codes_TQ = sound(np.random.default_rng(0), 6)
    for z, codes in ((z_T[:5], codes_TQ), (z_T, codes_TQ[:11]), (np.repeat(z_T, 2), codes_TQ)):
        with pytest.raises(ValueError, match=r"do not match .* \(x 2\)"):
            frame_ids(STAGE, z, codes, np.zeros(codes.shape, bool))
    with pytest.raises(ValueError, match="one codec"):
        frame_ids(STAGE, z_T, codes_TQ + VOCAB, np.zeros(codes_TQ.shape, bool))


def test_masked_codes_are_not_read():
    z_T, codes_TQ = sound(np.random.default_rng(0))
    masked_TQ = np.random.default_rng(1).random(codes_TQ.shape) < 0.5
    other_TQ = np.where(masked_TQ, (codes_TQ + 1) % VOCAB, codes_TQ)
    np.testing.assert_array_equal(frame_ids(STAGE, z_T, codes_TQ, masked_TQ), frame_ids(STAGE, z_T, other_TQ, masked_TQ))


@pytest.mark.parametrize("gap", [GAP, GAP - 1])
def test_documents_of_a_row_and_padding_do_not_leak(gap):
    draw, model = np.random.default_rng(0), untrained()
    rows = [[draw_document(STAGE, *sound(draw, n), rng.generator(0, "test", n)) for n in row]
            for row in ((7, 12, 5), (9,), (3, 4))]
    batch = collate(STAGE, rows, gap)
    with torch.no_grad():
        h_BTD, same = model.hidden(batch["ids_BTC"], batch["doc_BT"]), True
        for b, row in enumerate(rows):
            for n, d in enumerate(row):
                alone = collate(STAGE, [[d]], gap)
                h_TD = model.hidden(alone["ids_BTC"], alone["doc_BT"])[0]
                same &= torch.allclose(h_BTD[b, batch["doc_BT"][b] == n], h_TD, atol=1e-5)
    assert same == (gap >= GAP)  # a convolution reaches across a smaller gap
    # the targets, which a row's places number among B x T, are the documents' own
    with torch.no_grad():
        nats = model(*inputs_of(batch)).sum()
        each = sum(model(*inputs_of(collate(STAGE, [[d]], gap))).sum() for row in rows for d in row)
    assert batch["count_2"].tolist() == [sum(int((d.label_T != NO_TARGET).sum()) for row in rows for d in row), 80]
    assert float(nats) == pytest.approx(float(each), rel=1e-5) or gap < GAP
    padded = collate(STAGE, rows, gap, 64)  # as for a GPU
    assert padded["doc_BT"].shape == (3, 64) and padded["label_SN"].shape == (LEVELS, 64)
    assert torch.equal(padded["count_2"], batch["count_2"])
    with torch.no_grad():
        assert float(model(*inputs_of(padded)).sum()) == pytest.approx(float(nats), rel=1e-5)


def test_each_level_is_scored_as_a_whole_with_true_coarser_levels():
    model, (z_T, codes_TQ) = untrained(), sound(np.random.default_rng(0))
    sums = whole_level_sums(model, STAGE, [(z_T, codes_TQ)], "cpu")
    assert sums[1].tolist() == [0, len(codes_TQ), len(codes_TQ)]
    for level in range(LEVELS):
        d = document(STAGE, z_T, codes_TQ, level, np.ones(len(codes_TQ), bool))
        np.testing.assert_array_equal(masks_of(STAGE, d.ids_TC), np.arange(LEVELS)[None] >= level + 0 * codes_TQ)
        nats_SN = model(*inputs_of(collate(STAGE, [[d]], 0)))
        assert float(sums[0, 1 + level]) == pytest.approx(float(nats_SN.sum().detach()), rel=1e-6)


def test_tied_tables_fold_into_plain_ones():
    torch.manual_seed(0)
    model = build_parallel(STAGE, SHAPE, torch.randn(LEVELS, VOCAB, 6)).eval()
    batch = collate(STAGE, [[draw_document(STAGE, *sound(rng.generator(0, "test", n)), rng.generator(1, "test", n))]
                            for n in range(3)], GAP)
    with torch.no_grad():
        tied = model(*inputs_of(batch))
        model.fold_tied()
        assert model.tied is None and torch.equal(model(*inputs_of(batch)), tied)
        batch["ids_BTC"] = torch.where(batch["ids_BTC"] > STAGE.no_cond, batch["ids_BTC"], STAGE.no_cond)
        assert not torch.allclose(model(*inputs_of(batch)), tied)  # codes and conditions are read
