"""Token layouts: ranges apart, packing round-trips, EOS where it belongs, packing agrees with what may be drawn."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.torch import save

from audiolm import store
from audiolm.config import lm as lm_config
from audiolm.config import training
from audiolm.lm.layouts import build_stages
from audiolm.lm.model import build_lm, export_lm, load_lm
from audiolm.lm.run_lengths import MAX_RUN, dedupe, run_lengths
from tests.worlds.layouts import PAPER
from tests.worlds.token_corpus import NO_LEVEL, legal_ids, level_table

K, VOCAB, Q, COARSE = 11, 7, 5, 2
TRAIN = training.TrainConfig(steps=1, batch=1, lr=1e-3)
SHAPE = lm_config.StageConfig(crop_s=1.0, dim=16, layers=1, heads=2, ff=32, train=TRAIN)


def stages(dedupe: bool = True, coarse: int = COARSE):
    lm = lm_config.LMConfig(**PAPER, dedupe=dedupe, coarse_levels=coarse, semantic=SHAPE, coarse=SHAPE, fine=SHAPE)
    return build_stages(lm, Q, VOCAB, K)


def crop(frames: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, K, frames).repeat(2)[:frames], rng.integers(0, VOCAB, (2 * frames, Q))


def packed(stage, at_end: bool = True):
    z_T, codes_TQ = crop()
    return stage.pack(z_T if stage.needs_semantic else None,
                      codes_TQ[:, stage.columns] if stage.needs_acoustic else None, at_end)


def test_dedupe():
    assert dedupe(np.array([3, 3, 1, 1, 1, 3, 2])).tolist() == [3, 1, 3, 2]
    assert dedupe(np.zeros(0, np.int64)).tolist() == []


@pytest.mark.parametrize("name", ["lm_semantic", "lm_coarse", "lm_fine"])
def test_id_ranges_are_disjoint_and_specials_lie_outside(name):
    stage = stages()[name]
    levels_V = level_table(stage)
    n_semantic = K if stage.needs_semantic else 0
    assert (levels_V[:n_semantic] == -1).all()
    for q in stage.columns:
        own = np.flatnonzero(levels_V[:stage.bos] == q)
        assert own.tolist() == list(range(n_semantic + q * VOCAB, n_semantic + (q + 1) * VOCAB))
    assert sorted({stage.bos, stage.eos, stage.sep}) == list(range(stage.vocab_size - 3, stage.vocab_size))
    assert levels_V[stage.bos] == levels_V[stage.sep] == NO_LEVEL


@pytest.mark.parametrize("name", ["lm_semantic", "lm_coarse", "lm_fine"])
def test_round_trip_and_loss_on_targets_only(name):
    stage = stages()[name]
    z_T, codes_TQ = crop()
    ids, target, *_ = packed(stage)
    prompt, targets = stage.split(ids)
    back = stage.unpack(targets)
    if name == "lm_semantic":
        assert back.tolist() == dedupe(z_T).tolist()
    else:
        np.testing.assert_array_equal(back, codes_TQ[:, slice(*stage.levels)])
    assert not target[:len(prompt)].any() and target[len(prompt):].all()
    assert ids[0] == stage.bos and (ids == stage.bos).sum() == 1
    assert len(ids) <= stage.max_len


def test_layouts():
    z_T, codes_TQ = crop(3)
    s = stages()
    semantic, coarse, fine = s["lm_semantic"], s["lm_coarse"], s["lm_fine"]
    assert semantic.pack(z_T, None, False)[0].tolist() == [semantic.bos, *dedupe(z_T)]
    assert semantic.pack(z_T, None, True)[0].tolist() == [semantic.bos, *dedupe(z_T), semantic.eos]
    flat = [K + q * VOCAB + codes_TQ[t, q] for t in range(6) for q in range(COARSE)]
    ids = coarse.pack(z_T, codes_TQ[:, :COARSE], False)[0]
    assert ids.tolist() == [coarse.bos, *dedupe(z_T), coarse.sep, *flat, coarse.eos]
    flat = [[q * VOCAB + codes_TQ[t, q] for t in range(6) for q in span] for span in (range(COARSE), range(COARSE, Q))]
    assert fine.pack(None, codes_TQ, True)[0].tolist() == [fine.bos, *flat[0], fine.sep, *flat[1]]


@pytest.mark.parametrize("dedup", [True, False])
@pytest.mark.parametrize("name", ["lm_semantic", "lm_coarse", "lm_fine"])
def test_what_is_packed_may_be_drawn_and_nothing_else(name, dedup):
    stage = stages(dedup)[name]
    ids, target, *_ = packed(stage)
    first = int(np.flatnonzero(target)[0])
    for n, at in enumerate(range(first, len(ids))):
        mask_V = legal_ids(stage, n, int(ids[at - 1]))
        assert mask_V[ids[at]]
        legal = set(level_table(stage)[np.flatnonzero(mask_V & (np.arange(len(mask_V)) < stage.bos))].tolist())
        assert legal == {-1 if name == "lm_semantic" else stage.levels[0] + n % stage.slots}
        assert not mask_V[[stage.bos, stage.sep]].any()


def test_eos_and_repeats():
    s = stages()
    semantic, coarse, fine = s["lm_semantic"], s["lm_coarse"], s["lm_fine"]
    assert [bool(legal_ids(semantic, n)[semantic.eos]) for n in range(3)] == [False, True, True]
    assert [bool(legal_ids(coarse, n)[coarse.eos]) for n in range(5)] == [False, False, True, False, True]
    assert not any(legal_ids(fine, n)[fine.eos] for n in range(7))
    assert not legal_ids(semantic, 1, 4)[4] and legal_ids(semantic, 1, 4).sum() == K
    assert legal_ids(stages(dedupe=False)["lm_semantic"], 1, 4)[4]


def test_levels_of_targets():
    stage = stages()["lm_coarse"]
    ids, target, *_ = packed(stage)
    assert level_table(stage)[ids[target]].tolist() == [0, 1] * 24 + [0]  # EOS stands in a level-1 slot
    assert (level_table(stage)[ids[1:np.flatnonzero(target)[0] - 1]] == -1).all()


def test_no_fine_stage_where_all_levels_are_coarse():
    assert list(stages(coarse=Q)) == ["lm_semantic", "lm_coarse"]
    with pytest.raises(ValueError, match="coarse_levels"):
        stages(coarse=Q + 1)


def test_paper_sizes():
    s = build_stages(lm_config.LMConfig(**PAPER), 12, 1024, 1024)
    assert [x.crop_frames for x in s.values()] == [750, 250, 75]
    assert [x.max_len for x in s.values()] == [750 + 2, 250 + 2000 + 3, 600 + 1200 + 2]
    assert [x.vocab_size for x in s.values()] == [1024 + 3, 1024 + 4 * 1024 + 3, 12 * 1024 + 3]


def test_what_does_not_belong_is_refused():
    s, (z_T, codes_TQ) = stages(), crop()
    with pytest.raises(ValueError, match="frames do not match"):
        s["lm_coarse"].pack(z_T[:-1], codes_TQ[:, :COARSE], True)
    with pytest.raises(ValueError, match="columns"):
        s["lm_coarse"].pack(z_T, codes_TQ, True)
    with pytest.raises(ValueError, match="one codec"):
        s["lm_fine"].pack(None, codes_TQ + VOCAB, True)
    with pytest.raises(ValueError, match="one tokenizer"):
        s["lm_semantic"].pack(z_T + K, None, True)
    shifted = s["lm_coarse"].targets(codes_TQ[:, :COARSE])[1:]
    with pytest.raises(ValueError, match="another level's slot"):
        s["lm_coarse"].unpack(np.append(shifted, shifted[0]))


def test_export_is_loaded_alike_and_others_are_refused(tmp_path):
    stage = stages()["lm_coarse"]
    module = build_lm(stage, SHAPE)
    weights, about = export_lm(module, stage)
    path = str(tmp_path / "build")
    store.put(store.join(path, "export", "model.safetensors"), save(weights))
    store.put_json(store.join(path, "export", "config.json"), about)
    model, loaded = load_lm(path)
    assert loaded == stage and not model.training
    for name, value in module.state_dict().items():
        assert value.equal(model.state_dict()[name])
    store.put_json(store.join(path, "export", "config.json"), {**about, "kind": "codec"})
    with pytest.raises(ValueError, match="lm_\\*"):
        load_lm(path)
    with pytest.raises(FileNotFoundError, match="training step"):
        load_lm(str(tmp_path / "nothing"))


def test_run_lengths_say_all_that_was_there():
    draw = np.random.default_rng(0)
    z_T = np.repeat(draw.integers(0, K, 40), draw.integers(1, 2 * MAX_RUN + 9, 40))
    ids, lengths = run_lengths(z_T)
    np.testing.assert_array_equal(np.repeat(ids, lengths), z_T)
    assert lengths.max() == MAX_RUN and (lengths[:-1][ids[1:] == ids[:-1]] == MAX_RUN).all()  # only a long run is several ids
    stage = build_stages(lm_config.LMConfig(semantic=SHAPE), 4, VOCAB, K)["lm_semantic"]
    for at_end in (True, False):
        part = stage.pack(z_T, None, at_end)
        known = part.length > 0
        np.testing.assert_array_equal(part.ids[1:len(ids) + 1], ids)
        np.testing.assert_array_equal(part.length[known], lengths if at_end else lengths[:-1])  # a cut run's is not known
        assert part.length[0] == 0 and (part.ids[-1] == stage.eos) == at_end


def test_a_target_has_the_condition_of_its_own_frame():
    s = build_stages(lm_config.LMConfig(coarse_levels=COARSE, semantic=SHAPE, coarse=SHAPE, fine=SHAPE), 4, VOCAB, K)
    z_T, codes_TQ = crop()
    coarse, fine = s["lm_coarse"], s["lm_fine"]
    for stage, expected in ((coarse, np.repeat(z_T, 2)[:, None]),
                            (fine, codes_TQ[:, :COARSE] + VOCAB * np.arange(COARSE))):
        part = stage.pack(z_T if stage is coarse else None, codes_TQ[:, :len(stage.columns)], True)
        at = np.flatnonzero(part.target) - 1  # the ids that predict
        np.testing.assert_array_equal(part.cond[at], np.repeat(expected, stage.slots, 0))
        assert (np.delete(part.cond, at, 0) == stage.no_cond).all()
        dropped = stage.pack(z_T if stage is coarse else None, codes_TQ[:, :len(stage.columns)], True, drop=True)
        assert dropped.ids[:2].tolist() == [stage.bos, stage.sep] and (dropped.cond == stage.no_cond).all()
        np.testing.assert_array_equal(dropped.ids[2:], part.ids[part.target])


def test_the_acoustic_ablation_has_no_semantic_ids():
    config = lm_config.LMConfig(coarse_levels=COARSE, ablation="acoustic", semantic=SHAPE, coarse=SHAPE, fine=SHAPE)
    stage, codes_TQ = build_stages(config, 4, VOCAB, K)["lm_coarse"], crop()[1]
    part = stage.pack(None, codes_TQ[:, :COARSE], True)
    assert part.ids[:2].tolist() == [stage.bos, stage.sep] and stage.vocab_size == COARSE * VOCAB + 3
    np.testing.assert_array_equal(stage.unpack(part.ids[part.target]), codes_TQ[:, :COARSE])
    with pytest.raises(ValueError, match="lm.ablation leaves stage 2 without"):
        lm_config.LMConfig(ablation="acoustic", lengths=False, conditioning="prefix")
