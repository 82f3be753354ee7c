"""Training the parallel decoder: it learns the law, its steps do not depend on batching, and what it exports is the model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch

from audiolm import store
from audiolm.config.lm import ParallelConfig
from audiolm.config.start import StartConfig
from audiolm.config.training import TrainConfig
from audiolm.eval import stage_gates
from audiolm.eval.metrics import likelihood
from audiolm.lm.model import load_lm
from audiolm.lm.parallel import inputs_of
from audiolm.models.lm.heads import NO_TARGET
from audiolm.tokenizers.artifact import write_export
from audiolm.tokenizers.start import start_weights
from audiolm.train.objectives import parallel, shared
from audiolm.train.objectives.base import Context
from tests.worlds import token_corpus
from tests.worlds.training import Gradients, learn

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 60
LAYOUT = {"condition_dropout": 0.2, "tied": False}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    frames = {"train": [60] * 8 + [17, 9, 5, 13], "dev": [40, 33, 12]}
    return token_corpus.make(tmp_path_factory.mktemp("corpus"), frames)


def objective(corpus, rank=0, world=1, seed=0, start=None, **changes):
    train = TrainConfig(steps=STEPS, batch=8, lr=5e-3, warmup_steps=5, engine="torch")
    shape = ParallelConfig(**{"crop_s": 0.8, "dim": 32, "layers": 2, "heads": 2, "ff": 64, "dropout": 0.0, **changes},
                           train=train)
    config = {"stage": "lm_parallel", "seed": seed, "lm": shape, "layout": LAYOUT, "rows": 6, "start": start}
    return parallel.parallel_objective(config, corpus.paths, Context(rank, world, torch.device("cpu"), seed))


@pytest.fixture(scope="module")
def trained(corpus):
    o = objective(corpus)
    before = o.evaluate()
    learn(o, STEPS)
    return o, before


def test_it_learns_the_law(trained):
    o, before = trained
    after, uniform = o.evaluate(), np.log(token_corpus.VOCAB)
    assert before["loss"] == pytest.approx(uniform, rel=0.1)
    # level 1 copies its condition, level 3 follows level 1; level 2, as a whole masked, tells nothing of itself
    assert after["loss.level1"] < 0.8 * uniform and after["loss.level3"] < 0.8 * uniform
    assert after["loss.level2"] == pytest.approx(uniform, rel=0.05)
    assert after["loss"] == pytest.approx(np.mean([after[f"loss.level{q}"] for q in (1, 2, 3)]), rel=1e-6)


def test_evaluation_is_the_validation_beside_baselines_and_what_the_condition_is_worth(trained):
    o, _ = trained
    o.modules["lm"].eval()
    figures, validation = likelihood.stage_figures(o.modules["lm"], o.stage, o.data, o.dev, 6), o.evaluate()
    for row in figures["levels"]:
        assert row["loss"] == pytest.approx(validation[f"loss.level{row['level']}"], rel=1e-6)
    by_level = {row["level"]: row for row in figures["levels"]}
    assert by_level[1]["below"] is None and by_level[1]["loss"] < by_level[1]["unigram"] - 0.5
    assert by_level[2]["better"] == "previous"  # the law of level 2, which a level that is masked as a whole cannot follow
    used = likelihood.conditioning(o.modules["lm"].eval(), o.stage, o.dev, o.rows, 0)
    assert used["true"] == pytest.approx(validation["loss"], rel=1e-6)
    verdict = stage_gates.conditioning_verdict("lm_parallel", used)
    assert verdict["ok"] and verdict["figures"]["conditioning"] > 0.3


def test_it_begins_as_the_export_it_starts_from(corpus, trained, tmp_path):
    o, _ = trained
    write_export(str(tmp_path), *o.export())
    planned = start_weights("lm.parallel.start.uri", StartConfig(uri=str(tmp_path)), "lm_parallel")
    assert objective(corpus, seed=3, start=planned).evaluate() == o.evaluate()
    with pytest.raises(ValueError, match=r"lm\.parallel\.layers is 3: set it to 2; lm\.parallel\.conv_kernel is 3: set it to"):
        objective(corpus, start=planned, layers=3, conv_kernel=3)


def test_levels_add_up_to_the_loss(corpus):
    o = objective(corpus)
    batch = o.load(0, range(8))
    result = o.train_step({"lm": Gradients(o.modules["lm"])}, [batch], 0)
    counts = (batch["label_SN"] != NO_TARGET).sum(1).tolist()
    assert min(counts) > 0 and float(result["units"]) == int((batch["doc_BT"] >= 0).sum())
    mean = sum(n * float(result[f"loss.level{q + 1}"]) for q, n in enumerate(counts)) / sum(counts)
    assert mean == pytest.approx(float(result["loss"]), rel=1e-6)


def test_micro_batches_and_padding_do_not_change_a_step(corpus):
    o, results = objective(corpus), []
    step = next(s for s in range(20) if len({o.load(s, [i])["doc_BT"].shape[1] for i in range(8)}) > 1)  # rows get padding
    for parts in ([range(8)], [range(0, 3), range(3, 8)], [[i] for i in range(8)]):
        engine = Gradients(o.modules["lm"])
        result = o.train_step({"lm": engine}, [o.load(step, rows) for rows in parts], step)
        results.append((float(result["loss"]), engine.taken))
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        assert torch.allclose(gradient, results[0][1], rtol=1e-4, atol=1e-6)


def test_two_workers_take_the_step_of_one(corpus, monkeypatch):
    whole = objective(corpus)
    one = Gradients(whole.modules["lm"])
    loss = float(whole.train_step({"lm": one}, [whole.load(1, range(8))], 1)["loss"])
    ranks = [objective(corpus, rank=r, world=2) for r in range(2)]
    parts = [[o.load(1, range(4 * r, 4 * r + 4))] for r, o in enumerate(ranks)]
    count_2 = sum(b["count_2"] for p in parts for b in p).double()
    monkeypatch.setattr(shared, "all_sum", lambda x: count_2 if x.ndim == 1 else x)
    engines = [Gradients(o.modules["lm"]) for o in ranks]
    losses = [float(o.train_step({"lm": e}, p, 1)["loss"]) for o, e, p in zip(ranks, engines, parts, strict=True)]
    assert sum(losses) == pytest.approx(loss, rel=1e-6)
    assert torch.allclose((engines[0].taken + engines[1].taken) / 2, one.taken, rtol=1e-4, atol=1e-6)


def test_validation_is_split_over_workers(corpus):
    whole = objective(corpus).evaluate()
    parts = [objective(corpus, rank=r, world=2).evaluate() for r in range(2)]
    assert all(p["tokens"] > 0 for p in parts) and sum(p["tokens"] for p in parts) == whole["tokens"]
    assert sum(p["loss"] * p["tokens"] for p in parts) / whole["tokens"] == pytest.approx(whole["loss"], rel=1e-6)


def test_masks_follow_from_seed_step_and_row(corpus):
    o, batch = objective(corpus), objective(corpus).load(3, range(8))
    assert all(torch.equal(batch[name], x) for name, x in objective(corpus, rank=1, world=2).load(3, range(8)).items())
    row = o.load(3, [5])
    length = row["doc_BT"].shape[1]
    assert torch.equal(row["ids_BTC"][0], batch["ids_BTC"][5, :length])  # a row does not depend on its batch
    for other in (o.load(4, range(8)), objective(corpus, seed=1).load(3, range(8))):
        assert other["ids_BTC"].shape != batch["ids_BTC"].shape or not torch.equal(other["ids_BTC"], batch["ids_BTC"])


def test_weights_come_from_the_seed_alone(corpus):
    torch.manual_seed(1)
    a = objective(corpus).modules["lm"].state_dict()
    before = torch.get_rng_state()
    b = objective(corpus, rank=1, world=2).modules["lm"].state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["embed.weight"], objective(corpus, seed=5).modules["lm"].state_dict()["embed.weight"])


def test_the_export_is_the_model(corpus, tmp_path):
    o = objective(corpus)
    tensors, about = o.export()
    store.put(str(tmp_path / "export" / "model.safetensors"), safetensors.torch.save(tensors))
    store.put_json(str(tmp_path / "export" / "config.json"), json.loads(json.dumps(about)))
    model, stage = load_lm(str(tmp_path))
    inputs = inputs_of(o.load(0, [0]))
    assert stage == o.stage
    assert torch.equal(model(*inputs), o.modules["lm"].eval()(*inputs))
