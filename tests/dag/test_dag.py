"""The DAG: identity, builds, leases, plans; on a local disk and on an S3 server alike."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from types import SimpleNamespace

import pytest

from audiolm.config.run import ClusterConfig
from audiolm.config.training import TrainConfig
from audiolm.dag import execute as execute_dag
from audiolm.dag import lease
from audiolm.dag.execute import StepFailed, execute, run_step
from audiolm.dag.lease import Lease, LeaseLost, Waiter
from audiolm.dag.plan import plan, toposort
from audiolm.dag.step import Step, inspect
from audiolm.store import get_json, join, names, put_json

calls: list[str] = []


@pytest.fixture(autouse=True)
def _clear():
    calls.clear()


def make(config, inputs, out):
    calls.append("make")
    put_json(join(out.path, "data.json"), config["train"].steps)
    return {"rows": config["train"].steps}


def double(config, inputs, out):
    calls.append(out.step.name)
    put_json(join(out.path, "data.json"), 2 * get_json(join(inputs["make"].path, "data.json")))


def graph(steps=3, workers=None, **runtime):
    config = {"train": TrainConfig(steps=steps, batch=1, lr=1.0, **runtime), "cluster": ClusterConfig(workers=workers)}
    a = Step("make", make, config)
    b = Step("double", double, {}, (a,))
    return toposort([Step("leaf", double, {"x": 1}, (a, b))])


def go(store, steps, **options):
    rows = plan(steps, store, **options)
    execute(rows, store, inline=True, force=options.get("force", ()))
    return [r.run for r in rows]


def statuses(store, steps):
    return [str(r.state.status) for r in plan(steps, store)]


def test_runs_then_skips(store):
    assert go(store, graph()) == [True] * 3 and calls == ["make", "double", "leaf"]
    assert go(store, graph()) == [False] * 3 and len(calls) == 3


def test_identity_is_what_is_computed_never_how(store):
    go(store, graph())
    assert go(store, graph(workers=9, micro_batch=1, engine="torch", zero=0)) == [False] * 3
    assert go(store, graph(steps=4)) == [True] * 3
    assert Step("s", make, {"train": TrainConfig(steps=1, batch=1, lr=1)}).fingerprint == \
        Step("s", make, {"train": TrainConfig(steps=1, batch=1, lr=1.0)}).fingerprint


def test_force_opens_a_new_build_and_its_descendants_follow(store):
    go(store, graph())
    go(store, graph(), only=["double"], force=["double"])
    assert statuses(store, graph()) == ["done", "done", "stale"]
    assert go(store, graph()) == [False, False, True]
    paths = [r.state.artifact.path for r in plan(graph(), store)]
    assert [p.split("/")[-2:] for p in paths] == [["0001", "0001"], ["0002", "0001"], ["0002", "0001"]]
    assert get_json(join(paths[1].replace("0002", "0001"), "data.json")) == 6  # the older build stays readable


def test_a_forced_build_that_did_not_finish_is_continued(store):
    steps = graph()
    go(store, steps)

    def broken(config, inputs, out):
        raise ValueError("boom")

    bad = [Step("make", broken, steps[0].config), *steps[1:]]
    with pytest.raises(StepFailed, match="boom"):
        go(store, bad, force=["make"])
    assert statuses(store, steps)[0] == "failed"
    go(store, steps, force=["make"])
    assert names(steps[0].root(store)) == ["0001", "0002", "recipe.json"]
    assert len(names(join(steps[0].root(store), "0002", "attempts"))) == 2


def test_only_and_from_and_unknown_names(store):
    with pytest.raises(ValueError, match="double needs make, not built"):
        plan(graph(), store, only=["double"])
    with pytest.raises(ValueError, match="--only: no step named codek; the steps are make, double, leaf"):
        plan(graph(), store, only=["codek"])
    go(store, graph(), only=["make"])
    assert go(store, graph(), from_=["double"]) == [False, True, True]


def test_the_plan_says_how_a_recipe_differs_from_its_sibling(store):
    go(store, graph())
    assert "train.steps: 3 -> 5" in plan(graph(steps=5), store)[0].reason


def test_failure_is_recorded_and_stops_what_follows(store):
    def boom(config, inputs, out):
        raise ValueError("boom at codec.lr")

    a = Step("bad", boom)
    with pytest.raises(StepFailed, match="step bad failed: ValueError: boom at codec.lr"):
        go(store, toposort([Step("after", make, {}, (a,))]))
    assert statuses(store, toposort([a])) == ["failed"]
    assert "boom" in get_json(join(a.root(store), "0001", "attempts", "0001.json"))["error"]
    assert calls == []


def test_one_of_many_claims_wins(store):
    build, won, lost = join(store, "x", "0001"), [], []

    def claim():
        try:
            won.append(Lease(build))
        except FileExistsError:
            lost.append(1)

    barrier_threads = [threading.Thread(target=claim) for _ in range(8)]
    original, lease.latest = lease.latest, lambda b: 0
    try:
        for t in barrier_threads:
            t.start()
        for t in barrier_threads:
            t.join()
    finally:
        lease.latest = original
    assert len(won) == 1 and len(lost) == 7
    won[0].close("done")


def test_two_drivers_run_a_step_once(store):
    def slow(config, inputs, out):
        calls.append("slow")
        time.sleep(1.0)
        return {}

    step, got = Step("shared", slow), []
    threads = [threading.Thread(target=lambda: got.append(run_step(step, store, {}, poll_s=0.1))) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert calls == ["slow"] and len({a.build for a in got}) == 1 and len(got) == 2


def test_a_claim_after_another_is_refused(store):
    """Both saw the build free; the second must not take the first one's fresh attempt over."""
    path = f"{store}/shared/0001"
    waiter = lease.Waiter(path)
    assert waiter.free()
    first = lease.Lease(path)
    with pytest.raises(FileExistsError):
        lease.Lease(path, waiter.number)
    assert not waiter.free()
    first.close("done")


def test_a_build_that_another_driver_is_just_opening_is_joined(tmp_path):
    """On a disk the folder is there a moment before its build.json."""
    step = Step("one", lambda config, inputs, out: {})
    (tmp_path / "one" / step.fingerprint / "0001").mkdir(parents=True)
    assert run_step(step, str(tmp_path), {}).build.endswith(".0001")


def test_a_worker_that_lost_its_lease_stops_and_cannot_publish(store, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.1)
    step, errors, started = Step("slow", lambda c, i, out: [(time.sleep(0.05), out.check()) for _ in range(400)] and {}), [], \
        threading.Event()

    def zombie():
        started.set()
        try:
            run_step(step, store, {})
        except LeaseLost as e:
            errors.append(e)

    thread = threading.Thread(target=zombie)
    thread.start()
    build = join(step.root(store), "0001")
    while lease.latest(build) < 1:
        time.sleep(0.05)
    other = Lease(build)
    thread.join(30)
    other.close("stopped")
    assert errors and get_json(join(build, "done.json")) is None
    with pytest.raises(LeaseLost):
        lease.check_lease(build, 1)


def _claim_and_die(build):
    Lease(build)
    os._exit(9)


def test_a_dead_owner_of_this_machine_is_taken_over_at_once(store, monkeypatch):
    step = Step("dead", make, {"train": TrainConfig(steps=1, batch=1, lr=1.0)})
    execute_dag._open_build(step, store, {}, False)
    build = join(step.root(store), "0001")
    process = multiprocessing.get_context("spawn").Process(target=_claim_and_die, args=(build,))
    process.start()
    process.join()
    assert get_json(join(build, "attempts", "0001.json"))["state"] == "running"
    assert str(inspect(step, store, {}).status) == "lost"

    def wait(seconds):
        raise AssertionError("it waited for the lease of a dead owner")

    monkeypatch.setattr(execute_dag, "time", SimpleNamespace(time=time.time, sleep=wait))
    run_step(step, store, {})
    assert names(join(build, "attempts")) == ["0001.json", "0002.json"]


def test_an_owner_elsewhere_counts_by_its_beat_alone(store, monkeypatch):
    build = join(store, "far", "0001")
    far = {"state": "running", "beat": 3, "time": 0.0, "host": "far", "boot": "other", "pids": "", "pid": 1, "started": 0.0}
    put_json(join(build, "attempts", "0001.json"), far)
    monkeypatch.setattr(lease, "LEASE_S", 0.4)
    waiter = Waiter(build)
    assert not waiter.free()  # its clock (time: 0) is not believed
    time.sleep(0.25)
    put_json(join(build, "attempts", "0001.json"), far | {"beat": 4})
    assert not waiter.free()
    time.sleep(0.5)
    assert waiter.free()


def test_training_steps_take_turns_while_others_overlap(store):
    active, most = [], {"train": 0, "all": 0}
    lock = threading.Lock()

    def work(config, inputs, out):
        with lock:
            active.append(out.step)
            most["train"] = max(most["train"], sum(s.trains for s in active))
            most["all"] = max(most["all"], len(active))
        time.sleep(0.4)
        with lock:
            active.remove(out.step)

    steps = [Step("t1", work, trains=True), Step("t2", work, trains=True), Step("d1", work), Step("d2", work)]
    execute(plan(steps, store), store, slots=1)
    assert most["train"] == 1 and most["all"] >= 2


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("inline", [False, True])
def test_a_step_waits_for_the_gate_that_it_comes_after_and_is_the_same_step(store, fails, inline):
    order = []

    def work(config, inputs, out):
        time.sleep(0.2 if out.name == "gate" and not inline else 0)
        if fails and out.name == "gate":
            raise ValueError("not good enough")
        order.append(out.name)

    source = Step("source", work)
    gate = Step("gate", work, {}, (source,))
    stage = Step("stage", work, {}, (source,), after=(gate,))
    assert stage.fingerprint == Step("stage", work, {}, (source,)).fingerprint
    steps = [source, stage, gate]  # its place in the list does not matter
    if fails:
        with pytest.raises(StepFailed, match="gate failed: ValueError: not good enough"):
            execute(plan(steps, store), store, inline=inline)
        assert order == ["source"]
        execute(plan(steps, store, only=["stage"]), store, inline=inline)  # a gate that does not run holds nothing up
        assert order == ["source", "stage"]
    else:
        execute(plan(steps, store), store, inline=inline)
        assert order == ["source", "gate", "stage"]
