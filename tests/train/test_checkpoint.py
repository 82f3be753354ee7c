"""Checkpoints written off the training path: one in flight, errors surface, every kept one loads as an export."""

from __future__ import annotations

import threading

import pytest
import torch

from audiolm import store as store_audiolm
from audiolm.dag.lease import Lease, LeaseLost
from audiolm.store import exists, get_json, join, names
from audiolm.train import checkpoint
from audiolm.train.checkpoint import Saver, load
from audiolm.train.commits import commits, newest


def state(x):
    return {"model": {"param/w": torch.full((3,), float(x)), "buffer/b": torch.zeros(1), "exp_avg/w": torch.ones(3)}}


def record(best, **more):
    return {"best_step": best, "best_loss": 1.0, "validation": {}, "updates": {"model": 1}, **more}


@pytest.fixture
def build(store):
    path = join(store, "b")
    lease = Lease(path)
    yield path
    lease.close("stopped")


def test_a_checkpoint_is_written_aside_and_a_second_waits_for_it(build, monkeypatch):
    first, second, real = threading.Event(), threading.Event(), store_audiolm.put

    def gated(path, data, **more):
        assert (first if "00000001" in path else second).wait(30)
        real(path, data, **more)

    monkeypatch.setattr(checkpoint, "put", gated)
    with Saver(build, 1, 2, 0, None) as saver:
        saver.save(1, state(1), record(1))
        saver.check()
        assert newest(build) is None  # training goes on meanwhile
        threading.Timer(0.3, first.set).start()
        saver.save(2, state(2), record(1))
        assert newest(build)["step"] == 1
        second.set()
    assert [c["step"] for c in commits(build)] == [1, 2]  # the end waits


def test_what_went_wrong_surfaces_and_loses_that_checkpoint_alone(build, monkeypatch):
    real = store_audiolm.put

    def failing(path, data, **more):
        if "00000002" in path:
            raise OSError("the disk is full")
        real(path, data, **more)

    monkeypatch.setattr(checkpoint, "put", failing)
    with pytest.raises(OSError, match="the disk is full"), Saver(build, 1, 2, 0, None) as saver:
        saver.save(1, state(1), record(1))
        saver.save(2, state(2), record(1))
    assert newest(build)["step"] == 1
    other = Lease(build)
    with pytest.raises(LeaseLost), Saver(build, 1, 2, 0, None) as saver:
        saver.save(3, state(3), record(1))
    other.close("stopped")
    assert newest(build)["step"] == 1


def test_kept_are_the_last_ones_the_best_and_the_trunks_end_with_its_best(build):
    with Saver(build, 1, 2, 4, ("model", {"kind": "x"})) as saver:
        for step in range(1, 9):
            trunk = {"trunk": {"best_step": 3, "best_loss": 1.0}} if step <= 4 else {}
            saver.save(step, state(step), record(6 if step >= 6 else 3, **trunk))
    with Saver(build, 1, 2, 4, ("model", {"kind": "x"})) as saver:  # a resumed one keeps the same
        saver.save(9, state(9), record(6))
    there = [c["step"] for c in commits(build) if exists(join(build, "checkpoints", c["folder"], "model.safetensors"))]
    assert [c["step"] for c in commits(build) if not c.get("pruned")] == there == [3, 4, 6, 8, 9]
    assert len(commits(build)) == 9
    folder = join(build, "checkpoints", newest(build)["folder"])
    assert names(join(folder, "export")) == ["config.json", "model.safetensors"]
    assert get_json(join(folder, "export", "config.json"))["kind"] == "x"
    saved = load(build, newest(build), "model")
    assert saved.keys() == state(9)["model"].keys() and saved["param/w"].tolist() == [9.0] * 3
