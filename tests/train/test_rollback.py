"""Rollback on a spike: the run equals one that never had the rows, on any schedule of saves and after a failure."""

from __future__ import annotations

import math

import pytest
import torch

from audiolm.config.training import TrainConfig
from audiolm.dag.execute import StepFailed
from audiolm.dag.lease import Lease
from audiolm.metrics_log import read_build
from audiolm.store import get, get_json, join
from audiolm.train import guards
from audiolm.train.commits import newest
from audiolm.train.rank import TrainJob
from tests.worlds.training import build, settings, tiny_lm, train_on_two, training_step

LONG = {"steps": 40, "lr": 1e-2, "save_every": 7, "log_every": 4}
RULE = {"rollback": {"deviations": 10, "window": 6}}


def weights(artifact):
    return get(join(artifact.path, "export", "model.safetensors"))


def losses(artifact):
    return {r["step"]: r["metrics"]["loss"] for r in read_build(artifact.folder) if "loss" in r["metrics"]}


def test_which_batch_a_step_takes():
    assert [guards.batch_number(s, []) for s in range(3)] == [0, 1, 2]
    skipped = [{"step": 3, "rows": 3}, {"step": 3, "rows": 4}, {"step": 6, "rows": 8}]
    assert [guards.batch_number(s, skipped) for s in range(8)] == [0, 1, 2, 5, 6, 7, 9, 10]


def test_what_a_spike_is():
    train = TrainConfig(steps=9, batch=1, lr=1, rollback={"deviations": 5, "window": 4})

    def seen(*values):
        spikes = guards.SpikeGuard(train, None, None)
        for step, value in enumerate(values):
            spikes.add(step, torch.tensor(value))
        spikes.check()
        return spikes

    assert list(seen(9.0, 3.0, 2.1, 2.0, 2.2, 2.3, 1.0).recent) == pytest.approx([2.0, 2.2, 2.3, 1.0])
    with pytest.raises(guards.LossSpike) as found:
        seen(2.0, 2.1, 2.2, 2.1, 2.6, 9.0)
    assert found.value.step == 4 and found.value.skipped == [{"step": 4, "rows": 4}]  # the first, whenever it is checked
    with pytest.raises(guards.LossSpike):
        seen(2.0, math.nan)  # before there is a window
    off = guards.SpikeGuard(TrainConfig(steps=9, batch=1, lr=1), None, None)
    off.add(0, torch.tensor(math.nan))
    off.check()
    assert off.record() == {} and off.facts() == {}


@pytest.fixture(scope="module")
def spared(tmp_path_factory):
    """A run on a corpus without the noise."""
    return build(training_step(objective={"without": (20, 30)}, **LONG), str(tmp_path_factory.mktemp("spared")))


@pytest.mark.parametrize("changes", [{}, {"log_every": 1, "save_every": 3}, {"save_every": 100, "eval_every": 100},
                                     {"engine": "deepspeed"}])
def test_a_run_that_rolled_back_equals_one_without_those_rows(tmp_path, spared, changes):
    rolled = build(training_step(objective={"noisy": (20, 30)}, **{**LONG, **RULE, **changes}), str(tmp_path))
    assert rolled.facts["rollbacks"] == 2
    ours, theirs = losses(rolled), losses(spared)
    if "engine" in changes:
        assert all(ours[s] == pytest.approx(theirs[s], rel=1e-4) for s in theirs)
    else:
        assert weights(rolled) == weights(spared) and all(ours[s] == theirs[s] for s in ours if s in theirs)
    record = newest(rolled.folder)["spikes"]
    assert record["skipped"] == [{"step": 20, "rows": 20}, {"step": 29, "rows": 30}] and len(record["recent"]) == 6
    logged = {r["step"]: r["metrics"]["rollbacks"] for r in read_build(rolled.folder) if "rollbacks" in r["metrics"]}
    assert logged == {21: 1, 30: 2}


def test_without_the_rule_the_noise_is_trained_on(tmp_path, spared):
    plain = build(training_step(objective={"noisy": (20, 30)}, **LONG), str(tmp_path))
    assert weights(plain) != weights(spared) and "rollbacks" not in plain.facts


@pytest.mark.parametrize("fail_at", [22, 27, 31])  # before the next checkpoint knows of the first spike, and after
def test_it_resumes_exactly(tmp_path, spared, fail_at):
    with pytest.raises(StepFailed, match="planted"):
        build(training_step(fail_at=fail_at, objective={"noisy": (20, 30)}, **LONG, **RULE), str(tmp_path))
    resumed = build(training_step(objective={"noisy": (20, 30)}, **LONG, **RULE), str(tmp_path))
    assert weights(resumed) == weights(spared) and resumed.facts["rollbacks"] == 2


def test_after_three_it_fails_and_names_the_steps(tmp_path):
    with pytest.raises(StepFailed, match=r"spiked to [\d.]+ at step 26, after 3 rollbacks for spikes at steps 21, 21, 26: "
                                         r"single rows are not to blame. Look at train: lr 0.01"):
        build(training_step(objective={"noisy": (20, 21, 27, 28)}, **LONG, **RULE), str(tmp_path))


def test_two_workers_roll_back_and_stop_early_alike(tmp_path):
    """Each rank decides for itself, from reduced figures: did they differ, one would wait for the other for ever."""
    changes = {**LONG, **RULE, "steps": 60, "decay_steps": 0, "eval_every": 4, "patience": 1, "export": "best"}
    objective = {"noisy": (20,), "dropout": 0.0}
    alone = build(training_step(objective=objective, **changes), str(tmp_path / "a"))
    assert alone.facts["rollbacks"] == 1 and alone.facts["stopped_at"] < 60
    path = str(tmp_path / "b")
    lease = Lease(path)
    job = TrainJob(tiny_lm, objective, settings(**changes), {}, path, lease.attempt, path, f"{path}/metrics-0001.jsonl", 0,
                   "cpu", 1, 16, False)
    train_on_two(job)
    lease.close("done")
    both = get_json(join(path, "final.json"))
    assert both == {k: pytest.approx(v, rel=1e-5) if "loss" in k else v for k, v in alone.facts.items()}
