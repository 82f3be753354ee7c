"""Trunks: a longer training continues a shorter one's checkpoint, and equals a run of that length from the start."""

from __future__ import annotations

import pytest

from audiolm.config.lm import ParallelConfig, StageConfig
from audiolm.config.run import ClusterConfig
from audiolm.config.training import TrainConfig
from audiolm.dag.execute import StepFailed, execute
from audiolm.dag.plan import plan
from audiolm.dag.step import Artifact, Step
from audiolm.lm.model import load_lm
from audiolm.metrics_log import read_build, read_from
from audiolm.pipeline.cli import table
from audiolm.store import get, get_json, join, names, remove
from audiolm.train.commits import commits, path_of
from audiolm.train.loop import train
from audiolm.train.objectives.lm import lm_objective
from audiolm.train.objectives.parallel import parallel_objective
from tests.worlds import token_corpus
from tests.worlds.layouts import PAPER
from tests.worlds.training import SPOILED, build, training_step


def losses(artifact):
    return {r["step"]: r["metrics"] for r in read_build(artifact.folder)}


def first_step(artifact):
    return read_from(artifact.folder + "/metrics-0001.jsonl")[0][0]["step"]


def exported(artifact):
    return get(join(artifact.path, "export", "model.safetensors"))


@pytest.mark.parametrize("changes", [
    {},
    {"decay_steps": 0},  # its last validation is one that a longer run does not make
    {"objective": SPOILED, "export": "best", "lr": 0.02, "decay_steps": 1, "steps": 17},  # the best is in the trunk
    {"engine": "deepspeed"},
], ids=["decay", "no-decay", "best", "deepspeed"])
def test_more_steps_continue_and_equal_a_run_of_that_length(tmp_path, changes):
    at_once = build(training_step(**{**changes, "steps": 24}), str(tmp_path / "a"))
    store = str(tmp_path / "b")
    short = training_step(**changes)
    build(short, store)
    long = training_step(**{**changes, "steps": 24})
    begin = short.trains.trunk_steps
    assert f"goes on from step {begin} of {short.fingerprint}/0001" in table(plan([long], store), run=True)
    continued = build(long, store)
    assert first_step(continued) == begin + 1
    assert continued.facts == at_once.facts and exported(continued) == exported(at_once)
    if changes.get("export") == "best":
        assert continued.facts["best_step"] <= begin
    ours, theirs = losses(continued), losses(at_once)
    assert all(ours[s]["loss"] == theirs[s]["loss"] for s in theirs if s in ours and "loss" in ours[s] and "loss" in theirs[s])
    assert {s for s in theirs if "val.loss" in theirs[s]} <= ours.keys()  # the curve is whole


def test_the_trunk_lives_in_a_store_of_any_kind_and_outlives_the_run_that_made_it(store):
    short = training_step()
    build(short, store)
    long = training_step(steps=24)
    with pytest.raises(StepFailed, match="planted at step 15"):
        build(Step("tiny", training_step(fail_at=15, steps=24).fn, long.config, trains=long.trains), store)
    remove(short.root(store))
    assert "goes on from step 15" in table(plan([long], store), run=True)
    whole = build(training_step(steps=24), join(store, "other"))
    assert exported(build(long, store)) == exported(whole)


def test_a_run_that_was_stopped_lends_what_it_keeps(tmp_path):
    store = str(tmp_path)
    with pytest.raises(StepFailed, match="planted"):
        build(training_step(fail_at=7), store)
    artifact = build(training_step(steps=30), store)
    assert first_step(artifact) == 7
    shorter = training_step(steps=9, decay_steps=6)  # it begins to decay at 3, and nothing of before is left
    assert "goes on" not in table(plan([shorter], store), run=True)


def test_a_pruned_checkpoint_is_passed_over(tmp_path):
    store = str(tmp_path)
    artifact = build(training_step(), store)
    assert [c["step"] for c in commits(artifact.folder) if not c.get("pruned") and "trunk" in c] == [5, 8]
    row = plan([training_step(steps=14, decay_steps=7)], store)  # decays from 7 on: 6 is pruned, 5 is kept as the best
    assert "goes on from step 5" in table(row, run=True)


def test_forced_and_stale_builds_take_nothing_old(tmp_path):
    store = str(tmp_path)

    def graph(**changes):
        first = Step("first", lambda config, inputs, out: {})
        step = training_step(**changes)
        return [first, Step("tiny", step.fn, step.config, (first,), trains=step.trains)]

    def go(steps, **options):
        rows = plan(steps, store, **options)
        execute(rows, store, inline=True, force=options.get("force", ()))
        return plan(steps, store)[1].state.artifact

    go(graph())
    assert "goes on" not in table(plan(graph(), store, force=["tiny"]), run=True)
    assert first_step(go(graph(), force=["tiny"])) == 1
    longer = go(graph(steps=20))
    assert first_step(longer) == 9 and get_json(longer.folder + "/build.json")["trunk"]["forced"] == 1  # of the newer trunk
    assert first_step(go(graph(steps=20), force=["tiny"])) == 1
    go(graph(steps=22), only=["first"], force=["first"])
    assert "goes on" not in table(plan(graph(steps=22), store), run=True)
    assert first_step(go(graph(steps=22))) == 1
    assert first_step(go(graph(steps=26))) == 19


def test_another_recipe_is_another_trunk(tmp_path):
    store = str(tmp_path)
    build(training_step(), store)
    assert training_step(steps=20).trunk == training_step().trunk != training_step(lr=1e-3).trunk
    assert "goes on" not in table(plan([training_step(steps=20, lr=1e-3)], store), run=True)
    assert names(join(store, "tiny")) == [training_step().fingerprint]


@pytest.mark.parametrize("name", ["lm_coarse", "lm_parallel"])
def test_a_language_model_of_100_then_200_steps_is_that_of_200_at_once_and_each_checkpoint_is_an_export(tmp_path, name):
    corpus = token_corpus.make(tmp_path / "corpus", {"train": [60] * 8 + [17, 9], "dev": [40, 33]})

    def stage(steps):
        run = TrainConfig(steps=steps, batch=4, lr=1e-2, warmup_steps=5, decay_steps=20, eval_every=40, save_every=70,
                          engine="torch", export="best")
        kind, factory, layout = {"lm_coarse": (StageConfig, lm_objective, {"dedupe": False, "coarse_levels": 2}),
                                 "lm_parallel": (ParallelConfig, parallel_objective, {})}[name]
        size = kind(crop_s=0.8, dim=16, layers=1, heads=2, ff=32, dropout=0.1, train=run)
        config = {"stage": name, "seed": 0, "lm": size, "rows": 4, "layout": {**PAPER, "dedupe": False, **layout}}
        inputs = {name: Artifact(path, "0001", {}) for name, path in corpus.paths.items()}

        def fn(config, _, out):
            return train(factory, config, run, inputs, out, cluster=ClusterConfig(threads=1, device="cpu"))

        return Step(name, fn, config, trains=run)

    at_once = build(stage(200), str(tmp_path / "a"))
    build(stage(100), str(tmp_path / "b"))
    continued = build(stage(200), str(tmp_path / "b"))
    assert first_step(continued) == 81
    assert continued.facts == at_once.facts and exported(continued) == exported(at_once)
    commit = get_json(path_of(continued.folder, continued.facts["exported_step"]))
    kept, _ = load_lm(join(continued.folder, "checkpoints", commit["folder"]))
    final, _ = load_lm(continued.path)
    assert all((a == b).all() for a, b in zip(kept.state_dict().values(), final.state_dict().values(), strict=True))
