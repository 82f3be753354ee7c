"""A training under faults: killed behind a checkpoint, a store that is away for a while, a step that hangs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

import pytest

from audiolm.metrics_log import read_build
from audiolm.store import get, join, names
from audiolm.train import guards
from audiolm.train.commits import newest
from tests.worlds.servers import faulty_s3
from tests.worlds.training import TinyLM, build, training_step

WAIT_S = 240.0  # for what takes seconds on an idle machine


def logged():
    return training_step(log_every=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return build(logged(), str(tmp_path_factory.mktemp("whole")))


def rows(path):
    """Everything that the metrics say but for the speed."""
    return {r["step"]: {k: v for k, v in r["metrics"].items() if k not in ("units_per_s", "step_s")} for r in read_build(path)}


def _train_and_hang(store, stall_s):
    """Trains in this process and stops within step 9, for which alone `stall_s` holds: earlier ones may be slow."""
    real = TinyLM.train_step

    def held(self, engines, batches, step):
        if step == 7:
            guards.STALL_S = stall_s
        while step == 8:
            time.sleep(1)
        return real(self, engines, batches, step)

    TinyLM.train_step = held
    build(logged(), store)


def child(store, stall_s=3600.0):
    process = multiprocessing.get_context("spawn").Process(target=_train_and_hang, args=(store, stall_s))
    process.start()
    return process


def test_a_run_killed_behind_a_checkpoint_on_s3_has_every_row_of_an_uninterrupted_one(s3_server, whole):
    store = f"s3://tests/{time.time_ns()}"
    path, process = join(logged().root(store), "0001"), child(store)
    until = time.monotonic() + WAIT_S
    while not ((commit := newest(path)) and commit["step"] == 8):
        assert time.monotonic() < until and process.is_alive(), "it did not come to its checkpoint"
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    resumed = build(logged(), store)
    assert names(join(resumed.folder, "attempts")) == ["0001.json", "0002.json"]
    assert resumed.facts == whole.facts and rows(resumed.folder) == rows(whole.folder)


def test_a_training_outlasts_outages_in_its_middle_and_at_its_end(s3_server, whole, monkeypatch):
    """The store is away for some seconds from the first commit on, and again when the last file is written."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # else the client's own retries cover an outage this short
    away, begun = threading.Event(), set()

    def fault(method, path, headers):
        for end in ("commits/00000003.json", "final.json"):
            if method == "PUT" and path.endswith(end) and end not in begun:
                begun.add(end)
                away.set()
                threading.Timer(2.0, away.clear).start()
                return "lose"
        return "reset" if away.is_set() else None

    with faulty_s3(s3_server) as proxy:
        proxy.fault = fault
        trained = build(logged(), f"s3://tests/{time.time_ns()}")
        assert len(begun) == 2 and len(proxy.planted) > 4
        assert trained.record["attempt"] == 1 and trained.facts == whole.facts
        assert get(join(trained.path, "export", "model.safetensors")) == get(join(whole.path, "export", "model.safetensors"))


@pytest.mark.long
@pytest.mark.parametrize("fault", ["reset", "503", "hang"])
def test_an_outage_longer_than_a_lease_neither_ends_the_owner_nor_lets_a_waiting_driver_in(s3_server, whole, fault):
    """With the package's own times: 90 s, while another driver waits for the same step."""
    away, begun, got = threading.Event(), [], []

    def plant(method, path, headers):
        if method == "PUT" and path.endswith("commits/00000003.json") and not begun:
            begun.append(path)
            away.set()
            threading.Timer(90.0, lambda: (away.clear(), proxy.released.set())).start()
        return fault if away.is_set() else None

    with faulty_s3(s3_server) as proxy:
        store = f"s3://tests/{time.time_ns()}"
        proxy.fault = plant
        drivers = [threading.Thread(target=lambda: got.append(build(logged(), store)), daemon=True) for _ in range(2)]
        for driver in drivers:
            driver.start()
        for driver in drivers:
            driver.join(2 * WAIT_S)
        assert begun and len(got) == 2
        assert [a.record["attempt"] for a in got] == [1, 1] and got[0].facts == whole.facts


def test_a_step_that_hangs_ends_its_process_and_the_next_goes_on(tmp_path, whole, capfd):
    process = child(str(tmp_path), stall_s=4.0)
    process.join(WAIT_S)
    assert process.exitcode == 1
    resumed = build(logged(), str(tmp_path))
    assert resumed.record["attempt"] == 2 and resumed.facts == whole.facts
    assert "in held" in capfd.readouterr().err
