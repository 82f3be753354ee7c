"""Training a stage: it learns, its loss is per token whatever the batching, and what it exports is the model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch

from audiolm import store
from audiolm.config.lm import DepthConfig, LMConfig, StageConfig
from audiolm.config.training import TrainConfig
from audiolm.lm.loss import inputs_of
from audiolm.lm.model import build_lm, load_lm
from audiolm.tokenizers.artifact import write_export
from audiolm.train import engine as engines
from audiolm.train.engine import make_engine
from audiolm.train.objectives import lm, shared
from audiolm.train.objectives.base import Context
from audiolm.train.objectives.shared import stage_of
from tests.worlds import token_corpus
from tests.worlds.layouts import PAPER
from tests.worlds.token_corpus import level_table
from tests.worlds.training import Gradients, learn

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 60
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    frames = {"train": [60] * 8 + [17, 9, 5, 13], "dev": [40, 33, 12]}
    return token_corpus.make(tmp_path_factory.mktemp("corpus"), frames)


def objective(corpus, stage="lm_coarse", rank=0, world=1, seed=0, replaced=0.0, own=0.0, own_from=0, device=CPU,
              centroids=None, **changed):
    train = TrainConfig(steps=STEPS, batch=8, lr=1e-2, warmup_steps=5, **{"engine": "torch", **changed})
    stage, _, kind = stage.partition(" ")
    shape = StageConfig(crop_s=0.8, dim=32, layers=2, heads=2, ff=64, dropout=0.0, train=train, kind=kind or "flat",
                        replaced=replaced, own=own, own_from=own_from, depth=DepthConfig(dim=16, layers=2, ff=32))
    layout = {**PAPER, "dedupe": False, "coarse_levels": 2, "conditioning": "aligned" if kind else "prefix",
              "centroids": centroids is not None}
    config = {"stage": stage, "seed": seed, "lm": shape, "layout": layout, "rows": 6}
    return lm.lm_objective(config, {**corpus.paths, "kmeans": centroids}, Context(rank, world, device, seed))


STAGES = ["lm_semantic", "lm_coarse", "lm_coarse frame", "lm_fine"]


@pytest.mark.parametrize("stage", STAGES)
def test_it_learns(corpus, stage):
    o = objective(corpus, stage)
    first = o.evaluate()["loss"]
    losses = learn(o, STEPS)
    last = o.evaluate()
    uniform = np.log(token_corpus.K + 1 if stage == "lm_semantic" else token_corpus.VOCAB)  # of a slot's own ids
    assert first == pytest.approx(uniform, rel=0.1)
    assert np.mean(losses[-5:]) < 0.92 * losses[0]
    assert last["loss"] < 0.97 * first


@pytest.mark.parametrize("dtype, layout", [("float32", "doc_BT"), ("bfloat16", "bounds_N")])
def test_documents_are_laid_out_for_what_the_device_can_do(corpus, dtype, layout):
    batch = objective(corpus, device=torch.device("meta"), dtype=dtype).load(0, range(2))
    assert [name for name in ("doc_BT", "bounds_N") if name in batch] == [layout]


def test_frames_that_are_read_are_replaced_by_others_of_the_row_and_labels_stay(corpus):
    plain, noisy = (objective(corpus, "lm_coarse frame", replaced=share) for share in (0.0, 0.3))
    shares = []
    for step in range(10):
        a, b, frame_BT = plain.load(step, range(8)), noisy.load(step, range(8)), plain.data.batch(step, range(8))["target_BT"]
        assert all(torch.equal(a[name], b[name]) for name in a.keys() - {"ids_BT", "cond_BTC"})
        n_cond = plain.stage.n_cond
        assert torch.equal(a["cond_BTC"][..., :n_cond], b["cond_BTC"][..., :n_cond])
        true, read = (torch.cat([x["ids_BT"][..., None], x["cond_BTC"][..., n_cond:]], -1) for x in (a, b))
        changed_BT = (true != read).any(-1)
        assert not changed_BT[~frame_BT].any()
        for row_TC, read_TC, frame_T, changed_T in zip(true, read, frame_BT, changed_BT, strict=True):
            assert {*map(tuple, read_TC[frame_T].tolist())} <= {*map(tuple, row_TC[frame_T].tolist())}  # whole frames
            shares.append(float(changed_T.sum() / frame_T.sum()))
        alone = noisy.load(step, [5])
        assert torch.equal(alone["ids_BT"][0], b["ids_BT"][5])  # whoever holds the row
    assert 0.2 < np.mean(shares) < 0.32 and max(shares) > 0.4 and min(shares) < 0.1
    assert plain.evaluate() == noisy.evaluate()


def test_levels_add_up_to_the_loss(corpus):
    o = objective(corpus)
    result = o.train_step({"lm": Gradients(o.modules["lm"])}, [o.load(0, range(8))], 0)
    ids_BT, target_BT = (o.data.batch(0, range(8))[k] for k in ("ids_BT", "target_BT"))
    levels = level_table(o.stage)[ids_BT[target_BT].numpy()]
    counts = [int((levels == q).sum()) for q in range(2)]
    last_B = torch.where(target_BT, torch.arange(target_BT.shape[1]), 0).amax(1)
    assert float(result["units"]) == (last_B + 1).sum() > sum(counts)  # the prefix is work too, padding is none
    mean = sum(n * float(result[f"loss.level{q + 1}"]) for q, n in enumerate(counts)) / sum(counts)
    assert mean == pytest.approx(float(result["loss"]), rel=1e-6)
    assert "loss.level1" not in objective(corpus, "lm_semantic").evaluate()
    assert {"loss.level3"} == {k for k in objective(corpus, "lm_fine").evaluate() if "level" in k}


@pytest.mark.parametrize("stage", ["lm_coarse", "lm_coarse frame"])
def test_micro_batches_and_padding_do_not_change_a_step(corpus, stage):
    results = []
    for parts in ([range(8)], [range(0, 3), range(3, 8)], [[i] for i in range(8)]):
        o = objective(corpus, stage)
        engine = Gradients(o.modules["lm"])
        batches = [o.load(2, rows) for rows in parts]
        results.append((float(o.train_step({"lm": engine}, batches, 2)["loss"]), engine.taken))
    lengths = {int((objective(corpus, stage).load(2, [i])["label_SN"] >= 0).sum()) for i in range(8)}
    assert len(lengths) > 1  # else an unweighted mean would pass
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        assert torch.allclose(gradient, results[0][1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("stage", "own"), [("lm_coarse", 0.0), ("lm_coarse frame", 0.0), ("lm_coarse frame", 0.4)])
def test_two_workers_take_the_step_of_one(corpus, stage, own, monkeypatch):
    whole = objective(corpus, stage, own=own)
    one = Gradients(whole.modules["lm"])
    loss = float(whole.train_step({"lm": one}, [whole.load(1, range(8))], 1)["loss"])
    ranks = [objective(corpus, stage, rank=r, world=2, own=own) for r in range(2)]
    parts = [[o.load(1, range(4 * r, 4 * r + 4))] for r, o in enumerate(ranks)]
    count_2 = sum(b["count_2"] for p in parts for b in p).double()
    monkeypatch.setattr(shared, "all_sum", lambda x: count_2 if x.ndim == 1 else x)
    engines = [Gradients(o.modules["lm"]) for o in ranks]
    losses = [float(o.train_step({"lm": e}, p, 1)["loss"]) for o, e, p in zip(ranks, engines, parts, strict=True)]
    assert sum(losses) == pytest.approx(loss, rel=1e-6)  # each rank holds its share of the sum
    averaged = (engines[0].taken + engines[1].taken) / 2  # what an engine does
    assert torch.allclose(averaged, one.taken, rtol=1e-4, atol=1e-7)


def test_own_draws_begin_at_their_step(corpus):
    losses = {}
    for name, settings in (("none", {}), ("later", {"own": 0.4, "own_from": 2}), ("all", {"own": 0.4})):
        o = objective(corpus, "lm_coarse frame", **settings)
        losses[name] = [float(o.train_step({"lm": Gradients(o.modules["lm"])}, [o.load(step, range(8))], step)["loss"])
                        for step in (1, 2)]
    assert losses["later"] == [losses["none"][0], losses["all"][1]]
    assert losses["none"][0] != losses["all"][0] and losses["none"][1] != losses["all"][1]


def test_validation_is_split_over_workers(corpus, monkeypatch):
    whole = objective(corpus).evaluate()
    parts = [objective(corpus, rank=r, world=2).evaluate() for r in range(2)]
    assert all(p["tokens"] > 0 for p in parts) and sum(p["tokens"] for p in parts) == whole["tokens"]
    loss = sum(p["loss"] * p["tokens"] for p in parts) / whole["tokens"]
    assert loss == pytest.approx(whole["loss"], rel=1e-6)


def test_weights_come_from_the_seed_alone(corpus):
    torch.manual_seed(1)
    a = objective(corpus).modules["lm"].state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    b = objective(corpus, rank=1, world=2).modules["lm"].state_dict()
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's draws move
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["embed.weight"], objective(corpus, seed=5).modules["lm"].state_dict()["embed.weight"])


@pytest.mark.parametrize("stage", ["lm_semantic", "lm_coarse", "lm_coarse frame"])
def test_semantic_ids_begin_at_their_centroids(corpus, stage, tmp_path):
    centroid_KC = torch.randn(token_corpus.K, 8, generator=torch.Generator().manual_seed(0))
    centroid_KC[1] = centroid_KC[0] + 0.01
    write_export(str(tmp_path), {"centroids": centroid_KC}, {})
    placed, free = (objective(corpus, stage, centroids=path).modules["lm"].state_dict() for path in (str(tmp_path), None))
    name = "backbone.embed.weight" if "frame" in stage else "embed.weight"
    apart_K = (placed[name][:token_corpus.K] - placed[name][0]).norm(dim=1)
    assert apart_K[1] < 0.1 * apart_K[2:].min()
    assert torch.equal(placed[name][token_corpus.K:], free[name][token_corpus.K:])
    assert all(torch.equal(value, placed[n]) for n, value in free.items() if n != name)


@pytest.mark.parametrize("stage", ["lm_coarse", "lm_coarse frame"])
def test_the_export_is_the_model(corpus, stage, tmp_path):
    o = objective(corpus, stage)
    tensors, about = o.export()
    store.put(str(tmp_path / "export" / "model.safetensors"), safetensors.torch.save(tensors))
    store.put_json(str(tmp_path / "export" / "config.json"), json.loads(json.dumps(about)))
    model, loaded = load_lm(str(tmp_path))
    inputs = inputs_of(o.load(0, [0]))
    assert loaded == o.stage
    assert torch.equal(model(*inputs), o.modules["lm"].eval()(*inputs))


@pytest.mark.parametrize("stage, engine", [*((stage, "torch") for stage in STAGES), ("lm_coarse frame", "deepspeed")])
def test_a_resumed_training_goes_on_bit_for_bit(corpus, stage, engine, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def training(*saved):
        o = objective(corpus, stage, engine=engine, zero=1)
        return o, make_engine(o.modules["lm"], o.shape.train, o.ctx, *saved)

    def run(o, engine, *steps):
        engine.set_lr(1e-2)
        return [float(o.train_step({"lm": engine}, [o.load(s, range(8))], s)["loss"]) for s in steps]

    whole = training()
    run(*whole, 0, 1)
    again = training(whole[1].state(), whole[1].updates)
    assert run(*again, 2, 3) == run(*whole, 2, 3)


def test_a_stage_that_the_codec_leaves_no_room_for_is_named(corpus):
    config = {"stage": "lm_fine", "lm": objective(corpus).shape, "layout": {**PAPER, "coarse_levels": 3}}
    with pytest.raises(ValueError, match="stage is 'lm_fine'.*coarse_levels 3"):
        stage_of(config, corpus.paths)


@pytest.mark.parametrize("stage", ["lm_semantic", "lm_coarse", "lm_coarse frame", "lm_fine"])
@pytest.mark.parametrize("zero", [2, 3])
def test_weights_used_in_several_places_train_alike_on_partitioned_engines(corpus, stage, zero, monkeypatch):
    """Tied tables, conditions and run lengths read weights outside of the layer that owns them."""
    monkeypatch.setattr(engines, "WHOLE_NUMEL", 0)  # else ZeRO 3 leaves a model of this size whole
    codes_QVE = torch.randn(2 if "coarse" in stage else 3, token_corpus.VOCAB, 4, generator=torch.Generator().manual_seed(0))
    losses = {}
    for engine in ("torch", "deepspeed"):
        name, _, kind = stage.partition(" ")
        train = TrainConfig(steps=STEPS, batch=8, lr=1e-2, warmup_steps=2, engine=engine, zero=zero)
        shape = StageConfig(crop_s=0.8, dim=32, layers=2, heads=2, ff=64, dropout=0.0, train=train, kind=kind or "flat")
        layout = LMConfig(**{"coarse_levels": 2, name.removeprefix("lm_"): shape}).layout(name)
        layout |= {"tied": False, "centroids": False, "coarse_levels": 2}
        o = lm.lm_objective({"stage": name, "lm": shape, "layout": layout, "rows": 6}, corpus.paths, Context(0, 1, CPU, 0))
        if name != "lm_semantic":
            torch.manual_seed(0)
            o.modules["lm"] = build_lm(o.stage, shape, codes_QVE)
        engine_of = {"lm": make_engine(o.modules["lm"], train, o.ctx)}
        losses[engine] = [float(o.train_step(engine_of, [o.load(s, range(8))], s)["loss"]) for s in range(4)]
    assert losses["deepspeed"] == pytest.approx(losses["torch"], rel=1e-5)
    assert len(set(losses["torch"])) == 4
