"""Losses of a stage: over a slot's own ids alone, the same whatever the packing and the pieces, targets where they belong."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from audiolm.config import lm, training
from audiolm.lm.frames import packed_frames
from audiolm.lm.loss import batch_sums, inputs_of, level_sums, prepare
from audiolm.lm.model import build_lm
from audiolm.lm.pack_rows import pack_rows
from audiolm.lm.stages import Packed, Stage
from audiolm.models.lm import heads as module
from audiolm.models.lm.heads import NO_TARGET, LevelHeads, even_piece
from tests.worlds.token_corpus import level_table

K, VOCAB, Q = 11, 7, 5
STAGES = {"semantic": Stage("semantic", K, VOCAB, (0, 0), 2, True, 2.0),
          "coarse": Stage("coarse", K, VOCAB, (0, 2), 2, True, 2.0),
          "fine": Stage("fine", 0, VOCAB, (2, Q), 2, True, 2.0),
          "semantic with lengths": Stage("semantic", K, VOCAB, (0, 0), 2, True, 2.0, lengths=True),
          "aligned coarse": Stage("coarse", K, VOCAB, (0, 2), 2, False, 2.0, aligned=True, dropped=0.1),
          "aligned fine": Stage("fine", 0, VOCAB, (2, Q), 2, True, 2.0, aligned=True, dropped=0.1),
          "frames": Stage("coarse", K, VOCAB, (0, 3), 3, False, 2.0, frames=True),
          "aligned frames": Stage("coarse", K, VOCAB, (0, 2), 2, False, 2.0, aligned=True, dropped=0.1, frames=True)}
SHAPE = lm.StageConfig(crop_s=2.0, dim=32, layers=2, heads=2, ff=64, dropout=0.0,
                       depth=lm.DepthConfig(dim=16, layers=2, ff=32),
                       train=training.TrainConfig(steps=1, batch=1, lr=1e-3))


def crops(stage: Stage, lengths: list[int]) -> list[Packed]:
    draw = np.random.default_rng(0)
    return [stage.pack(draw.integers(0, K, n), draw.integers(0, VOCAB, (2 * n, len(stage.columns))), True) for n in lengths]


def model_of(stage: Stage, positions: str = "rotary"):
    torch.manual_seed(0)
    model = build_lm(stage, SHAPE.model_copy(update={"positions": positions}))
    torch.nn.init.normal_((model.depth if stage.frames else model).head.weight)
    return model


@pytest.mark.parametrize("positions", ["rotary", "t5"])
@pytest.mark.parametrize("name", list(STAGES))
def test_a_packed_row_costs_what_its_documents_cost(name, positions):
    stage, model = STAGES[name], model_of(STAGES[name], positions)
    parts = crops(stage, [3, 1, 5, 4])
    sizes = [len(packed_frames(stage, p).ids) if stage.frames else len(p.ids) for p in parts]
    length = sum(sizes[:3]) + 2
    sums, grads = [], []
    for batch in (pack_rows(stage, [parts[:3], parts[3:]], length), pack_rows(stage, [[p] for p in parts], length)):
        tensors = prepare(stage, batch)
        nats_SN = model(*inputs_of(tensors))
        nats_SN.sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        model.zero_grad()
        sums.append(level_sums(stage, nats_SN.detach(), tensors["label_SN"]))
        assert tensors["count_2"].tolist() == [sum(p.target.sum() for p in parts), sum(sizes)]
    torch.testing.assert_close(sums[0], sums[1], atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4, rtol=1e-4)
    levels_V = level_table(stage)
    counts = [sum(int((levels_V[p.ids[p.target]] == level).sum()) for p in parts) for level in range(-1, stage.levels[1])]
    counts += [sum(int((p.length > 0).sum()) for p in parts)] if stage.lengths else []
    assert sums[0][1].tolist() == counts


FLAT = [name for name, stage in STAGES.items() if not stage.frames]


@pytest.mark.parametrize("name", FLAT)
def test_probabilities_are_over_the_slots_own_ids(name):
    """Every legal id in turn as one target: its probabilities sum to 1, and an id of another slot is refused."""
    stage, model = STAGES[name], model_of(STAGES[name]).requires_grad_(False)
    part = crops(stage, [3])[0]
    ids = part.ids
    first = int(np.flatnonzero(part.target)[0])
    for n in range(2 * stage.slots):
        legal, chances = stage.slot_ids()[n % stage.slots], []
        for i in legal:
            changed = ids.copy()
            changed[first + n] = i
            only = np.arange(len(ids)) == first + n
            sums = batch_sums(model, stage, pack_rows(stage, [[part._replace(ids=changed, target=only)]], len(ids)), "cpu")
            chances.append(math.exp(-float(sums[0, 0 if stage.lengths else slice(None)].sum())))
        assert sum(chances) == pytest.approx(1.0, abs=1e-5)
    ids[first] = stage.bos
    with pytest.raises(ValueError, match=f"{stage.name}: id {stage.bos} is marked as a target"):
        prepare(stage, pack_rows(stage, [[part]], len(ids)))


def test_a_frames_probability_is_the_product_over_its_slots():
    """All codes of one frame in turn: the probabilities sum to 1, and each slot's sum to 1 given the slots before it."""
    stage = Stage("coarse", K, 3, (0, 3), 3, False, 2.0, aligned=True, frames=True)
    model, draw = model_of(stage).requires_grad_(False), np.random.default_rng(0)
    z_T, codes_TQ, at = draw.integers(0, K, 3), draw.integers(0, 3, (6, 3)), 4
    every, nats = list(itertools.product(range(3), repeat=3)), []
    for frame in every:
        changed = codes_TQ.copy()
        changed[at] = frame
        part = stage.pack(z_T, changed, True)
        target = (np.arange(len(part.ids)) - (len(part.ids) - 18)) // 3 == at
        nats.append(batch_sums(model, stage, pack_rows(stage, [[part._replace(target=target)]]), "cpu")[0, 1:].numpy())
    chances = np.exp(-np.array(nats)).reshape(3, 3, 3, 3)  # codes of the frame, slot
    assert chances.prod(3).sum() == pytest.approx(1.0, abs=1e-5)
    assert np.ptp(chances[..., 0], (1, 2)).max() < 1e-6 and np.ptp(chances[..., 1], 2).max() < 1e-6  # no look-ahead
    assert np.ptp(chances[..., 1], 0).max() > 1e-3 and np.ptp(chances[..., 2], 1).max() > 1e-3
    for slot, chance in enumerate((chances[:, 0, 0, 0], chances[0, :, 0, 1], chances[0, 0, :, 2])):
        assert chance.sum() == pytest.approx(1.0, abs=1e-5), slot


def test_a_frame_is_the_sum_of_its_codes_and_is_predicted_from_its_condition_and_what_is_before():
    stage = STAGES["aligned frames"]
    model, (part,) = model_of(stage).requires_grad_(False), crops(stage, [4])
    batch = pack_rows(stage, [[part]])
    own = {name: x for name, x in prepare(stage, batch).items() if name in ("ids_BT", "cond_BTC")}
    table, backbone = model.backbone.embed.weight, model.backbone
    first = len(stage.split(part.ids)[0])
    frames_NS, z_N = part.ids[first:].reshape(-1, 2), part.cond[first - 1:-1:2, 0]
    h_PD = table[torch.from_numpy(np.append(part.ids[:first], frames_NS[:, 0]))]
    h_PD[first:] += table[torch.from_numpy(frames_NS[:, 1])]
    h_PD[first - 1:-1] += table[torch.from_numpy(z_N)]
    torch.testing.assert_close(backbone._embed(own["ids_BT"], own["cond_BTC"], None)[0], h_PD)


@pytest.mark.parametrize("name", FLAT)
def test_what_the_model_is_given_has_one_shape_whatever_is_packed(name):
    stage = STAGES[name]
    seen = set()
    for lengths in ([1] * 200, [2] * 200, [5, 1, 30, 7] * 9, [50] * 3):
        parts, row, at = crops(stage, lengths), [], 0
        for part in parts:
            if at + len(part.ids) > stage.max_len:
                break
            row, at = [*row, part], at + len(part.ids)
        tensors = prepare(stage, pack_rows(stage, [row, row], stage.max_len), flash=True)
        seen.add(tuple((k, x.shape) for k, x in tensors.items() if k != "bounds_N"))
        assert len(tensors["bounds_N"]) in (9, 17, 33, 65, 129, 257)
    assert len(seen) == 1


def test_a_frame_models_losses_have_one_of_few_sizes():
    stage, places = STAGES["aligned frames"], set()
    for lengths in ([50], [1] * 30, [3, 30, 10], [49]):
        for drop in (False, True):
            draw = np.random.default_rng(0)
            row = [stage.pack(draw.integers(0, K, n), draw.integers(0, VOCAB, (2 * n, 2)), True, drop) for n in lengths]
            tensors = prepare(stage, pack_rows(stage, [row, row], stage.max_len))
            places.add(tensors["label_SN"].shape[1])
            targets = int((tensors["label_SN"][0] != NO_TARGET).sum())
            assert targets == 4 * sum(lengths) and targets <= max(places) and tensors["label_SN"].shape[1] - targets < 19
    assert len(places) > 1 and all(n % 19 == 0 for n in places)  # 2 rows of 152 positions in 16 parts


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_pieces_give_the_losses_and_gradients_of_the_whole(piece):
    torch.manual_seed(0)
    heads, h_ND = LevelHeads(16, [9, 8]), torch.randn(50, 16, requires_grad=True)
    torch.nn.init.normal_(heads.weight)
    index_SN, label_SN = torch.randint(0, 50, (2, 40)), torch.randint(0, 8, (2, 40))
    label_SN[:, ::3] = NO_TARGET
    scores = [h_ND[i] @ w.T for i, w in zip(index_SN, heads.weight.split([9, 8]), strict=True)]
    whole = torch.stack([F.cross_entropy(s, n, reduction="none") for s, n in zip(scores, label_SN, strict=True)])
    weight_SN = torch.rand(2, 40)
    found = heads(h_ND, index_SN, label_SN, piece)
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=1e-6)
    grads = [torch.autograd.grad((x * weight_SN).sum(), (h_ND, heads.weight)) for x in (found, whole)]
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-5)
    assert (found[:, ::3] == 0).all()


def test_pieces_are_whole_tiles_as_even_as_they_can_be():
    assert even_piece(9012, 8192) == 4608 and even_piece(8193, 8192) == 4224  # not 8,192 and what is left
    assert even_piece(8192, 8192) == 8192 and even_piece(16383, 8192) == 8192 and even_piece(40, 7) == 7
    for n in range(1, 40_000, 97):
        pieces = [len(x) for x in torch.empty(n).split(even_piece(n, 8192))]
        assert len(pieces) == -(-n // 8192) and max(pieces) <= 8192 and max(pieces) - min(pieces) < 128 * len(pieces)


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("biased", [False, True])
def test_added_rows_change_neither_losses_nor_gradients(dtype, near, biased, monkeypatch):
    """A GPU's way: 9 ids are 64 rows of the product, 64 stay as they are."""
    torch.manual_seed(0)
    heads, h_ND = LevelHeads(16, [9, 64]), torch.randn(50, 16, requires_grad=True)
    torch.nn.init.normal_(heads.weight)
    heads.bias = torch.randn(73) if biased else None
    index_SN, label_SN = torch.randint(0, 50, (2, 40)), torch.randint(0, 9, (2, 40))
    label_SN[:, ::3] = NO_TARGET
    found = []
    for align, rows in (({}, 9 + 64), ({"cpu": 64}, 64 + 64)):
        monkeypatch.setattr(module, "ALIGN", align)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16), FlopCounterMode(display=False) as flops:
            nats_SN = heads(h_ND, index_SN, label_SN)
        assert flops.get_total_flops() == 2 * 40 * 16 * rows and nats_SN.dtype == torch.float32
        found.append([nats_SN.detach(), *torch.autograd.grad(nats_SN.sum(), (h_ND, heads.weight))])
    torch.testing.assert_close(*found, atol=near, rtol=near)


def test_pieces_bound_the_memory():
    """What the backward pass keeps of scores is nothing: they are made again."""
    heads, h_ND, kept = LevelHeads(16, [4096]), torch.randn(512, 16, requires_grad=True), []
    torch.nn.init.normal_(heads.weight)
    index_SN = torch.arange(512)[None]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        nats_SN = heads(h_ND, index_SN, index_SN, 64)
    assert nats_SN.requires_grad and sum(kept) < 512 * 4096 / 2


def test_rows_in_different_slots_are_scored_by_their_own_heads():
    torch.manual_seed(0)
    heads, h_BD = LevelHeads(16, [9, 8]), torch.randn(4, 16)
    torch.nn.init.normal_(heads.weight)
    scores_BW = heads.scores(h_BD, [0, 1, 1])
    assert torch.equal(heads.scores(h_BD, [1, 1, 1])[1:], scores_BW[1:])
    assert torch.equal(heads.scores(h_BD, [0])[0], scores_BW[0])
    assert (scores_BW[1:, 8] == -torch.inf).all() and scores_BW[:, :8].isfinite().all()
