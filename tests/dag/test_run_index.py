"""A run's index, written by several drivers at once."""

from __future__ import annotations

import threading

from audiolm.config.load import load_config
from audiolm.dag.run_index import steps_of, write_index
from tests.worlds.basics import ROOT


def test_drivers_of_one_run_that_write_at_once_lose_no_entry(store):
    cfg = load_config(str(ROOT / "tests" / "e2e.yaml"), [f"store={store}", "tracking=none", "corpus.name=c"])
    order = [f"step{d}{n}" for d in range(3) for n in range(4)]

    def driver(d):
        for n in range(4):
            assert write_index(cfg, {f"step{d}{n}": {"path": f"/p{d}{n}", "build": "b", "run_id": None}}, order)

    threads = [threading.Thread(target=driver, args=(d,)) for d in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert steps_of(f"{store}/runs/{cfg.run.name}.json") == {name: f"/p{name[4:]}" for name in order}


def test_a_step_that_left_the_plan_leaves_the_index(store):
    cfg = load_config(str(ROOT / "tests" / "e2e.yaml"), [f"store={store}", "tracking=none", "corpus.name=c"])
    write_index(cfg, {n: {"path": f"/{n}", "build": "b", "run_id": None} for n in "ab"}, ["a", "b"])
    assert steps_of(write_index(cfg, {"c": {"path": "/c", "build": "b", "run_id": None}}, ["a", "c"])) == {"a": "/a", "c": "/c"}
