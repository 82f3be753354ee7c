"""The training loop: resume equals uninterrupted, checkpoints are committed and pruned, a lost lease stops it."""

from __future__ import annotations

import time

import pytest
import safetensors.torch
import torch

from audiolm.config.run import ClusterConfig
from audiolm.dag.execute import StepFailed
from audiolm.dag.lease import Lease, LeaseLost
from audiolm.metrics_log import MetricsFile, read_build
from audiolm.pipeline.run_observer import headline
from audiolm.store import exists, get, get_json, join, names, put_json, remove
from audiolm.train import checkpoint
from audiolm.train import engine as engines
from audiolm.train.commits import commits, newest
from audiolm.train.loop import report_progress, run_worker, train
from audiolm.train.rank import TrainJob
from tests.worlds.training import SPOILED, build, settings, tiny_lm, training_step


@pytest.mark.parametrize(("engine", "zero"), [("torch", 0), ("deepspeed", 1), ("deepspeed", 3)])
def test_a_run_that_failed_and_resumed_equals_an_uninterrupted_one(tmp_path, engine, zero, monkeypatch):
    monkeypatch.setattr(engines, "WHOLE_NUMEL", 0)
    how = {"engine": engine, "zero": zero, "export": "best"}
    whole = build(training_step(**how), str(tmp_path / "whole"))
    store = str(tmp_path / "broken")
    with pytest.raises(StepFailed, match="planted at step 8"):
        build(training_step(fail_at=8, **how), store)
    resumed = build(training_step(**how), store)
    assert names(join(resumed.folder, "attempts")) == ["0001.json", "0002.json"]
    assert {k: v for k, v in resumed.facts.items()} == whole.facts
    assert get(join(resumed.path, "export", "model.safetensors")) == get(join(whole.path, "export", "model.safetensors"))
    rows = [{r["step"]: r["metrics"]["loss"] for r in read_build(a.folder) if "loss" in r["metrics"]} for a in (whole, resumed)]
    assert all(rows[0][step] == rows[1][step] for step in rows[0])


def test_micro_batches_do_not_change_the_run(tmp_path):
    whole = build(training_step(), str(tmp_path / "a"))
    parts = build(training_step(micro_batch=2), str(tmp_path / "b"))
    assert parts.facts["val.loss"] == pytest.approx(whole.facts["val.loss"], rel=1e-2)
    assert parts.facts["exported_step"] == whole.facts["exported_step"] == 12


def test_checkpoints_are_found_by_commit_and_pruned_to_the_last_the_best_and_the_trunks_end(tmp_path):
    artifact = build(training_step(), str(tmp_path))
    live = [c["step"] for c in commits(artifact.folder) if not c.get("pruned")]
    best = artifact.facts["best_step"]  # the decay begins at 8, and 5 was the best then
    assert live == sorted({5, 8, 10, 12, best}) and len(names(join(artifact.folder, "checkpoints"))) == len(live)
    put_json(join(artifact.folder, "checkpoints", "00000099-0001", "state.json"), {})  # a save that was never committed
    assert newest(artifact.folder)["step"] == 12


@pytest.mark.parametrize(("engine", "zero"), [("torch", 0), ("deepspeed", 3)])
def test_the_best_weights_are_exported_when_asked(tmp_path, engine, zero, monkeypatch):
    monkeypatch.setattr(engines, "WHOLE_NUMEL", 0)
    step = training_step(objective=SPOILED, export="best", lr=0.02, decay_steps=1, steps=24, engine=engine, zero=zero)
    linear = torch.nn.functional.linear
    artifact = build(step, str(tmp_path))
    assert torch.nn.functional.linear is linear  # a step inline leaves torch as it was
    best = artifact.facts["best_step"]
    assert best < 24
    assert artifact.facts["exported_step"] == best
    commit = next(c for c in commits(artifact.folder) if c["step"] == best)
    saved = checkpoint.load(artifact.folder, commit, "model")
    exported = safetensors.torch.load(get(join(artifact.path, "export", "model.safetensors")))
    assert all((exported[k] == saved[f"param/{k}"]).all() for k in exported)


def test_a_worker_whose_lease_was_taken_does_not_commit(tmp_path):
    path = str(tmp_path / "b")
    lease = Lease(path)
    job = TrainJob(tiny_lm, {}, settings(), {}, path, lease.attempt, path, f"{path}/metrics-0001.jsonl", 0, "cpu", 1, 16, False)
    taken = Lease(path)
    with pytest.raises(LeaseLost, match="taken over by attempt 2"):
        run_worker(job, 0, 1)
    assert names(join(path, "commits")) == [] and get_json(join(path, "final.json")) is None
    for each in (lease, taken):
        each.close("stopped")


def test_a_loss_that_is_not_finite_names_what_to_change(tmp_path):
    with pytest.raises(StepFailed, match=r"the loss is nan at step \d+: look at train: lr 1e\+30 and clip 0"):
        build(training_step(lr=1e30, clip=0, warmup_steps=0), str(tmp_path))


@pytest.mark.parametrize(("spoil", "kept", "message"), [
    ("weights", 5, "weights are not finite after step 6, and are not saved"),
    ("validation", 3, "the validation loss is nan at step 5")])
def test_what_is_not_finite_is_never_saved(tmp_path, spoil, kept, message):
    step = training_step(objective={"spoil": {spoil: 5}})  # no step's loss shows it: update 5 is the last before a save
    with pytest.raises(StepFailed, match=message):
        build(step, str(tmp_path))
    path = join(step.root(str(tmp_path)), "0001")
    saved = newest(path)
    assert saved["step"] == kept and all(v.isfinite().all() for v in checkpoint.load(path, saved, "model").values())
    assert not exists(join(path, "export"))


def test_a_batch_that_workers_cannot_share_is_refused(tmp_path):
    class Out:
        inline, path, step = False, str(tmp_path), training_step()

    with pytest.raises(ValueError, match="batch 8 is not divisible by cluster.train_workers 3"):
        train(tiny_lm, {"seed": 0}, settings(), {}, Out, cluster=ClusterConfig(train_workers=3, device="cpu"))


def test_an_alarm_of_the_validation_stands_in_the_progress_until_it_is_over(tmp_path):
    notes: list[str] = []

    class Out:
        def progress(self, done, total, unit, note):
            notes.append(note)

    job = TrainJob(tiny_lm, {}, settings(), {}, str(tmp_path), 1, str(tmp_path), f"{tmp_path}/metrics-0001.jsonl", 0, "cpu",
                   1, 16, False)

    def seen(text: str, present: bool) -> bool:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if notes and (text in notes[-1]) == present:
                return True
            time.sleep(0.1)
        return False

    metrics = MetricsFile(job.metrics)
    with report_progress(job, Out()):
        metrics.add(2, {"val.loss": 1.0, "val.alarm/levels_without_gain": 3.0})
        metrics.add(3, {"loss": 1.0})
        assert seen("ALARM levels_without_gain 3", True)
        metrics.add(4, {"loss": 0.9})
        assert seen("loss 0.900, ALARM levels_without_gain 3", True)
        metrics.add(5, {"val.loss": 1.0, "val.alarm/levels_without_gain": 0.0})
        metrics.add(6, {"loss": 0.8})
        assert seen("loss 0.800", True) and seen("ALARM", False)
    metrics.close()


EARLY = {"steps": 60, "lr": 0.2, "warmup_steps": 0, "decay_steps": 0, "eval_every": 4, "patience": 2, "export": "best"}


def test_patience_ends_a_training_past_its_best_and_exports_the_best(tmp_path):
    whole = build(training_step(**EARLY), str(tmp_path / "a"))
    best, stopped = whole.facts["best_step"], whole.facts["stopped_at"]
    assert stopped == best + 2 * 4 < 60 and whole.facts["steps"] == stopped and whole.facts["exported_step"] == best
    validated = {r["step"]: r["metrics"]["val.loss"] for r in read_build(whole.folder) if "val.loss" in r["metrics"]}
    assert max(validated) == stopped and min(validated, key=validated.get) == best
    assert f"stopped at step {stopped} of 60: 2 validations were no better than step {best}'s" in headline(whole.facts)
    assert newest(whole.folder)["step"] == stopped  # saved, so that it is known to be over

    store = str(tmp_path / "b")
    with pytest.raises(StepFailed, match="planted"):
        build(training_step(fail_at=stopped - 2, **EARLY), store)
    resumed = build(training_step(**EARLY), store)  # the validations before the failure count
    assert resumed.facts == whole.facts


def test_a_training_that_was_killed_at_its_early_end_is_not_trained_on(tmp_path):
    done = build(training_step(**EARLY), str(tmp_path))
    path, final, committed = done.folder, get_json(join(done.path, "final.json")), commits(done.folder)
    remove(join(done.path, "final.json"))
    lease = Lease(path)
    run_worker(TrainJob(tiny_lm, {"fail_at": final["steps"]}, settings(**EARLY), {}, path, lease.attempt, done.path,
                        f"{path}/metrics-0002.jsonl", 0, "cpu", 1, 16, False), 0, 1)
    lease.close("done")
    assert get_json(join(done.path, "final.json")) == final and commits(path) == committed


def test_patience_without_the_best_exported_is_refused():
    with pytest.raises(ValueError, match=r"patience \(2\).*export is 'last': set export: best"):
        settings(patience=2)
