"""The gates of a stage: what they tell apart, and that a failure stops once trained, never trains again and can be forced."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest

from audiolm.config.lm import StageConfig
from audiolm.config.run import ClusterConfig
from audiolm.config.training import TrainConfig
from audiolm.dag.execute import StepFailed, execute
from audiolm.dag.plan import plan
from audiolm.dag.step import Step
from audiolm.data.tokens import TokenStore, level_name
from audiolm.eval import stage_gates
from audiolm.metrics_log import read_build
from audiolm.models.entropy import entropy_bits
from audiolm.pipeline import steps
from audiolm.pipeline.run_observer import headline
from audiolm.store import get, get_json, join, names
from tests.worlds import token_corpus
from tests.worlds.layouts import PAPER


@pytest.mark.parametrize(("vocab", "frames", "used", "bits", "collapsed"), [
    (1024, 10**6, 1024, 9.3, False), (1024, 10**6, 700, 7.8, False),
    (1024, 10**6, 13, math.log2(13), True),  # ANCHORS: a level that used 13 codes
    (1024, 10**6, 1024, 4.9, True),  # all are seen, one has most of the frames
    (1024, 10**6, 90, math.log2(90), True),
    (1024, 60, 40, 5.1, False),  # a store of 60 frames cannot use more
    (2, 100, 2, 1.0, False),
])
def test_a_collapsed_level_is_told_from_a_short_store(vocab, frames, used, bits, collapsed):
    assert stage_gates.collapsed(vocab, frames, used, bits) == collapsed


def test_only_the_levels_that_a_stage_reads_are_judged():
    facts = {"frames": 10**5, **{f"used.q{q:02d}": 64 for q in range(3)}, "entropy_bits.q00": 5.5, "entropy_bits.q01": 5.0,
             "entropy_bits.q02": 1.0}
    assert stage_gates.tokens_verdict("acoustic", "codec", facts, 64, 2)["ok"]
    found = stage_gates.tokens_verdict("acoustic", "codec", facts, 64, 3)
    assert not found["ok"] and "collapsed: level 3 uses 64 of 64 codes and 1.00 of 6.00 bits" in found["text"]


@pytest.mark.parametrize(("true", "shuffled", "se", "ok"), [
    (3.432, 3.431, 0.01, False), (3.4, 3.41, 0.001, False),  # significant, and nothing
    (3.4, 3.6, 0.15, False),  # much, and perhaps by chance
    (3.4, 3.6, 0.05, True),
])
def test_a_prefix_is_used_when_the_gain_is_neither_small_nor_by_chance(true, shuffled, se, ok):
    assert stage_gates.conditioning_verdict("lm_coarse", {"true": true, "shuffled": shuffled, "se": se})["ok"] == ok


def test_a_loss_that_is_not_finite_beats_nothing():
    assert stage_gates.unigram_verdict({"loss": 2.0, "unigram": 2.1})["ok"]
    assert not stage_gates.unigram_verdict({"loss": math.nan, "unigram": 2.1})["ok"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return token_corpus.make(tmp_path_factory.mktemp("corpus"), {"train": [60] * 12, "dev": [40] * 8})


def graph(corpus, steps_=2, used=None, **shape):
    """lm_coarse after steps that copy the corpus; `used` plants a usage of the semantic tokens."""
    def copied(name):
        def fn(config, inputs, out):
            shutil.copytree(corpus.paths[name], out.path, dirs_exist_ok=True)
            if name == "manifest":
                return {}
            store, facts = TokenStore(out.path), {}
            for q in map(level_name, range(store.spec["n_q"])):
                counts = np.bincount(np.concatenate([store.read(k, [q])[q].values for k in range(store.shards)]))
                facts |= {"frames": int(counts.sum()), f"used.{q}": int((counts > 0).sum()),
                          f"entropy_bits.{q}": entropy_bits(counts)}
            return {**facts, **({"used.q00": used} if used and name == "semantic_tokens" else {})}
        return fn

    inputs = [Step(n, copied(n), {"used": used}) for n in ("manifest", "semantic_tokens", "acoustic_tokens")]
    train = TrainConfig(steps=steps_, batch=8, lr=1e-2, warmup_steps=2, engine="torch", eval_every=steps_, export="best")
    lm = StageConfig(crop_s=0.8, dim=32, layers=2, heads=2, ff=64, dropout=0.0, train=train, **shape)
    config = {"seed": 0, "cluster": ClusterConfig(device="cpu", threads=1), "stage": "lm_coarse", "lm": lm, "rows": 16,
              "layout": {**PAPER, "dedupe": False, "coarse_levels": 1}}
    return [*inputs, Step("lm_coarse", steps.train_lm, config, tuple(inputs), trains=train)]


def go(graph, store, force=()):
    rows = plan(graph, store, force=force)
    execute(rows, store, inline=True, force=force)
    return plan(graph, store)[-1].state.artifact


UNUSED = r"step lm_coarse failed: GateFailed: .*the prefix is not used: .*\(the trained weights are kept\): --force lm_coarse"


def test_a_failed_gate_stops_after_training_trains_nothing_again_and_is_forced(corpus, tmp_path):
    store, steps_ = str(tmp_path), graph(corpus)
    with pytest.raises(StepFailed, match=UNUSED) as first:
        go(steps_, store)
    path = join(steps_[-1].root(store), "0001")
    weights, commits = get(join(path, "0001", "export", "model.safetensors")), names(join(path, "commits"))
    with pytest.raises(StepFailed) as again:
        go(graph(corpus), store)
    assert str(again.value) == str(first.value)
    assert plan(graph(corpus), store, force=["lm_coarse"])[-1].reason == "forced, goes on with build 0001"
    artifact = go(graph(corpus), store, force=["lm_coarse"])
    assert artifact.path == f"{path}/0003" and len(names(join(path, "attempts"))) == 3
    assert names(join(path, "commits")) == commits
    assert get(join(artifact.path, "export", "model.safetensors")) == weights
    assert sorted({r["step"] for r in read_build(path) if "loss" in r["metrics"]}) == [1, 2]
    assert [n for n in names(path) if n.startswith("metrics")] == ["metrics-0001.jsonl"]  # later attempts began no training
    assert artifact.facts["gate/failed"] == 2
    assert artifact.facts["gate/conditioning"] < artifact.facts["gate/conditioning.needed"]
    assert "GATE the prefix is not used" in headline(artifact.facts)
    assert stage_gates.failures(artifact.path)[0].endswith("(forced)")
    with pytest.raises(StepFailed, match=UNUSED):  # a new build is judged anew
        go(graph(corpus), store, force=["lm_coarse"])


def test_a_stage_that_only_warns_goes_on_and_is_the_same_stage(corpus, tmp_path):
    warned = graph(corpus, gates="warn")
    artifact = go(warned, str(tmp_path))
    assert warned[-1].fingerprint == graph(corpus)[-1].fingerprint
    assert any("the prefix is not used" in n for n in artifact.facts["notes"])
    assert any("(told only)" in f for f in stage_gates.failures(artifact.path))


def test_a_stage_that_learned_passes(corpus, tmp_path):
    artifact = go(graph(corpus, steps_=80), str(tmp_path))
    assert artifact.facts["gate/failed"] == 0 and artifact.facts["notes"] == []
    assert artifact.facts["gate/unigram"] > 0.1
    logged = read_build(artifact.folder)[-1]["metrics"]
    assert logged["gate/conditioning"] == artifact.facts["gate/conditioning"] > artifact.facts["gate/conditioning.needed"]


def test_collapsed_tokens_stop_a_stage_before_it_trains_and_the_force_is_remembered(corpus, tmp_path):
    store, steps_ = str(tmp_path), graph(corpus, used=1)
    message = "semantic tokenizer collapsed: level 1 uses 1 of 12 codes.*nothing was trained yet.*: --force lm_coarse"
    with pytest.raises(StepFailed, match=message):
        go(steps_, store)
    path = join(steps_[-1].root(store), "0001")
    assert not names(join(path, "commits"))
    with pytest.raises(StepFailed, match=UNUSED):  # past the first gate, trained, and the next one was not seen before
        go(steps_, store, force=["lm_coarse"])
    assert get_json(join(path, "0002", "gates.json"))["semantic_tokens"]["forced"]
    with pytest.raises(StepFailed, match=UNUSED):
        go(steps_, store)
    assert go(steps_, store, force=["lm_coarse"]).folder == path
