"""Tracking against a real MLflow: an SQLite file, and a server that is down, comes up and is killed."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from audiolm import store
from audiolm.metrics_log import MetricsFile
from audiolm.store import hide_credentials
from audiolm.tracking.outbox import shipped_path
from audiolm.tracking.tracker import Tracker
from tests.worlds.basics import ROOT
from tests.worlds.servers import MLflowServer


def client(tracker: Tracker):
    from mlflow import MlflowClient

    return MlflowClient(tracker.uri)


def runs(tracker: Tracker) -> dict:
    """MLflow's runs of the experiment by name (the newest of a name wins)."""
    c = client(tracker)
    found = c.search_runs([c.get_experiment_by_name("tests").experiment_id], order_by=["attributes.start_time ASC"])
    return {r.info.run_name: r for r in found}


def metrics_file(path: Path, steps) -> str:
    f = MetricsFile(str(path))
    for s in steps:
        f.add(s, {"loss": 10.0 - s, "tokens/s": 5.0})
    f.close()
    return str(path)


def pending(tmp_path) -> list:
    return list((tmp_path / ".tracking").rglob("*.json"))


def test_a_whole_run_is_shown(tmp_path):
    said = []
    t = Tracker("sqlite", str(tmp_path), "tests", "demo", say=said.append)
    long = "x" * 9000
    t.start({"corpus.root": "s3://user:secret@host/bucket?token=abc", "long": long, **{f"p{i}": str(i) for i in range(150)}},
            {"git.commit": "abc"})
    build = tmp_path / "codec" / "0001"
    run = t.begin_step("codec", str(build), {"steps": "7"}, {"fingerprint": "f00"})
    path = metrics_file(build / "metrics-0001.jsonl", range(1, 1300))  # 2,598 metrics: more than one call takes
    t.ship(run, path)
    (build / "ui" / "wav").mkdir(parents=True)
    (build / "ui" / "report.html").write_text("<p>hello")
    (build / "ui" / "wav" / "a.wav").write_bytes(b"RIFF")
    run_id = t.run_id(run)
    t.end_step(run, "FINISHED", {"mel": 0.5, "name": "x", "ladder": {"all levels": 1}}, str(build / "ui"))
    t.link_step("manifest", "feedbeef")
    t.finish("FINISHED")
    assert said == [] and pending(tmp_path) == []

    found = runs(t)
    parent, child = found["demo"], found["codec"]
    assert child.info.run_id == run_id and child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert parent.data.params["p149"] == "149" and len(parent.data.params["long"]) == 6000
    assert parent.data.params["corpus.root"] == "s3://***@host/bucket?token=***"
    assert parent.data.tags["git.commit"] == "abc" and parent.data.tags["built_by.manifest"] == "feedbeef"
    assert child.data.metrics["fact.mel"] == 0.5 and child.data.metrics["fact.ladder.all levels"] == 1.0
    history = client(t).get_metric_history(run_id, "loss")
    assert [h.step for h in history] == list(range(1, 1300)) and history[0].value == 9.0
    assert {a.path for a in client(t).list_artifacts(run_id)} == {"report.html", "wav"}
    assert (tmp_path / "mlflow.db").exists() and (tmp_path / "mlflow").is_dir()
    assert json.loads(Path(shipped_path(path)).read_text())["run_id"] == run_id
    assert str(tmp_path / "mlflow.db") in t.url() and "mlflow ui" in t.url()


def commit(build: Path, step: int, **more) -> None:
    record = {"step": step, "folder": f"{step:08d}-0001", "validation": {"step": 2, "loss": 0.5}, "validated": 7.25,
              "best_step": min(step, 2), **more}
    store.put_json(str(build / "commits" / f"{step:08d}.json"), record)


def test_a_commit_is_a_model_with_its_validation_and_one_that_was_pruned_says_so(ready, tmp_path):
    t, build = Tracker("sqlite", str(tmp_path), "tests", "demo"), tmp_path / "lm" / "0001"
    t.start({}, {})
    run = t.begin_step("lm", "a", {}, {})
    commit(build, 1)
    commit(build, 2, export="lm")
    (build / "checkpoints" / "00000009-0001").mkdir(parents=True)  # written, never committed
    t.ship(run, metrics_file(build / "metrics-0001.jsonl", [1]), str(build))
    assert t.flush(30)
    t._delivery.shown.clear()  # as another driver would begin
    commit(build, 1, pruned=True)
    commit(build, 0, pruned=True)  # gone before anybody heard of it
    commit(build, 3)
    assert t.flush(30)
    commit(build, 3, pruned=True)
    t.end_step(run, "FINISHED", {}, None)
    t.finish("FINISHED")
    c = client(t)
    models = c.search_logged_models([c.get_experiment_by_name("tests").experiment_id])
    found = {int(m.params["step"]): m for m in models}
    assert len(models) == 4 and found.keys() == {0, 1, 2, 3}
    assert {m.model_type for m in models} == {"checkpoint"} and {str(m.status) for m in models} == {"READY"}
    assert {s for s, m in found.items() if "pruned" in m.tags} == {0, 1, 3}
    assert found[2].tags["uri"] == f"{build}/checkpoints/00000002-0001" and found[2].tags["export"].endswith("/export")
    assert found[2].source_run_id == run.run_id and "export" not in found[1].tags
    assert [(m.key, m.value, m.step) for m in found[2].metrics] == [("val.loss", 0.5, 2)] and not found[3].metrics
    versions = {int(v.tags["step"]): v for v in c.search_model_versions("name = 'demo-lm'")}
    assert {v.version: s for s, v in versions.items()} == {1: 1, 2: 2, 3: 3}
    assert {s for s, v in versions.items() if "pruned" in v.tags and v.description.startswith("**Pruned:**")} == {1, 3}
    assert versions[2].tags["uri"] == found[2].tags["uri"] and versions[2].tags["audiolm.index"] == f"{tmp_path}/runs/demo.json"
    assert versions[2].tags["loss"] == "0.5" and versions[2].tags["fingerprint"] == "lm" and versions[2].run_id == run.run_id
    assert c.get_model_version_by_alias("demo-lm", "best").version == 2


def test_metrics_arrive_while_a_step_runs_and_none_twice(ready, tmp_path):
    t = Tracker("sqlite", str(tmp_path), "tests", "demo")
    t.start({}, {})
    run = t.begin_step("lm", "a", {}, {})
    path = metrics_file(tmp_path / "metrics-0001.jsonl", [1, 2])
    t.ship(run, path)
    assert t.flush(30)
    assert len(client(t).get_metric_history(run.run_id, "loss")) == 2
    metrics_file(tmp_path / "metrics-0001.jsonl", [3])
    assert t.flush(30)
    os.unlink(shipped_path(path))  # as if it had been killed before it noted the offset
    run.offset = 0
    t.end_step(run, "FAILED", {}, None)
    t.finish("FAILED")
    assert [h.step for h in client(t).get_metric_history(run.run_id, "loss")] == [1, 2, 3]
    assert runs(t)["lm"].info.status == "FAILED"


def test_a_killed_drivers_runs_end_as_killed_and_the_new_run_names_them(ready, tmp_path):
    code = f"""
        import os
        from audiolm.metrics_log import MetricsFile
        from audiolm.tracking.tracker import Tracker
        t = Tracker("sqlite", {str(tmp_path)!r}, "tests", "demo")
        t.start({{"a": "1"}}, {{}})
        run = t.begin_step("codec", "x", {{}}, {{}})
        f = MetricsFile({str(tmp_path / "metrics-0001.jsonl")!r})
        f.add(1, {{"loss": 1.0}})
        t.ship(run, f.path)
        assert t.flush(60)
        f.add(2, {{"loss": 2.0}})
        os.kill(os.getpid(), 9)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, timeout=90)
    assert killed.returncode == -9
    t = Tracker("sqlite", str(tmp_path), "tests", "demo")
    dead = runs(t)["demo"].info.run_id
    assert runs(t)["demo"].info.status == "RUNNING"
    t.start({}, {})
    t.finish("FINISHED")
    old = client(t).get_run(dead)
    assert old.info.status == "KILLED"
    child = runs(t)["codec"]
    assert child.info.status == "KILLED" and child.data.tags["mlflow.parentRunId"] == dead
    assert [h.step for h in client(t).get_metric_history(child.info.run_id, "loss")] == [1, 2]
    new = runs(t)["demo"]
    assert new.info.run_id != dead and new.data.tags["takes_over"] == dead and new.info.status == "FINISHED"
    assert pending(tmp_path) == []


def test_a_living_driver_of_the_same_name_is_left_alone(ready, tmp_path):
    first = Tracker("sqlite", str(tmp_path), "tests", "demo")
    first.start({}, {})
    step = first.begin_step("codec", "a", {}, {})
    assert first.flush(30)
    second = Tracker("sqlite", str(tmp_path), "tests", "demo")
    second.start({}, {})
    second.finish("FINISHED")
    assert client(first).get_run(step.run_id).info.status == "RUNNING"
    first.finish("KILLED")  # a step nobody ended ends with its run
    assert client(first).get_run(step.run_id).info.status == "KILLED"


def test_no_tracking_has_the_same_face_and_writes_nothing(tmp_path):
    t = Tracker("none", str(tmp_path), "tests", "demo")
    t.start({"a": "1"}, {})
    run = t.begin_step("codec", "a", {}, {})
    t.ship(run, str(tmp_path / "m.jsonl"))
    t.end_step(run, "FINISHED", {"x": 1}, None)
    assert t.run_id(run) is None
    t.link_step("codec", "abc")
    assert t.flush(1)
    t.finish("FINISHED")
    assert "none" in t.url() and list(tmp_path.iterdir()) == []


def test_what_cannot_work_is_refused_with_the_fix(tmp_path):
    with pytest.raises(ValueError, match="local disk.*http://host:5000"):
        Tracker("sqlite", "s3://bucket/x", "tests", "demo")
    with pytest.raises(ValueError, match="'mlruns' is neither sqlite, none"):
        Tracker("mlruns", str(tmp_path), "tests", "demo")


def test_credentials_are_masked():
    assert hide_credentials("postgresql://me:p@ss@db:5432/x") == "postgresql://***@db:5432/x"
    assert hide_credentials("https://h/x?a=1&X-Amz-Signature=ab&sig=zz") == "https://h/x?a=1&X-Amz-Signature=***&sig=***"
    assert hide_credentials("s3://bucket/a@b/c") == "s3://bucket/a@b/c"


class SilentServer:
    """Takes connections and answers none of them until it is closed."""

    def __init__(self):
        self.waiting, self.asked, self.answered = [], threading.Event(), False
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):  # it is closed
            while True:
                self.waiting.append(self._socket.accept()[0])
                self.asked.set()

    def close(self):
        self.answered = True
        self._socket.close()
        for connection in self.waiting:
            connection.close()


def test_no_call_waits_for_a_server_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")  # longer than this test may take: only the calls' own limits help
    monkeypatch.setattr("audiolm.tracking.tracker.FIRST_RUN_S", 0.5)
    server, said = SilentServer(), []
    try:
        t = Tracker(server.url, str(tmp_path), "tests", "demo", say=said.append)
        t.start({"a": "1"}, {})
        assert server.asked.wait(60)  # the thread is within a request from here on
        run = t.begin_step("codec", "x", {}, {})
        t.ship(run, metrics_file(tmp_path / "metrics-0001.jsonl", [1, 2]))
        t.headline({"codec.loss": 0.5})
        t.uses_dataset("corpus", "abc", ["/data"])
        t.link_step("manifest", "feedbeef")
        t.serves("i.json", {"codec": "/c"})
        assert not t.flush(0.5)
        t.end_step(run, "FINISHED", {"mel": 1.5}, None)
        assert t.run_id(run) is None
        assert len(server.waiting) == 1 and not server.answered and run.run_id is None
        monkeypatch.setattr(t._thread, "join", lambda timeout_s: None)  # of its own limit, which is seconds
        t.finish("FINISHED", timeout_s=0.0)
        assert len(server.waiting) == 1 and not server.answered and "delivers the rest" in said[-1]
    finally:
        server.close()


def test_the_parent_run_shows_results_source_and_corpus(ready, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "workflows" / "full_pipeline.py"), "run.name=demo"])
    t = Tracker("sqlite", str(tmp_path), "tests", "demo")
    t.start({}, {})
    corpus = ("speech", "0123456789abcdef", ["s3://user:secret@host/a", "/data/b"])
    t.headline({"lm_semantic.loss": 2.5, "codec.pesq": 3.25})
    t.uses_dataset(*corpus)
    assert t.flush(30)
    c, parent = client(t), runs(t)["demo"]
    assert parent.info.status == "RUNNING" and parent.data.metrics == {"lm_semantic.loss": 2.5, "codec.pesq": 3.25}
    t.headline({"abx.within": 7.5})
    sent = client(t).get_metric_history(parent.info.run_id, "codec.pesq")[0].timestamp
    t._parent.headline["codec.pesq"] = [3.25, sent]  # as if it had been killed before it noted what was delivered
    t.uses_dataset(*corpus)
    t.finish("FINISHED")
    assert pending(tmp_path) == []
    parent = c.get_run(parent.info.run_id)
    assert parent.data.metrics == {"lm_semantic.loss": 2.5, "codec.pesq": 3.25, "abx.within": 7.5}
    history = [c.get_metric_history(parent.info.run_id, k) for k in parent.data.metrics]
    assert [len(points) for points in history] == [1, 1, 1] and all(p.timestamp > 1.6e12 for (p,) in history)
    assert parent.data.tags["mlflow.source.name"] == "workflows/full_pipeline.py"
    assert parent.data.tags["mlflow.source.type"] == "LOCAL"
    (found,) = parent.inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == corpus[:2] and [x.value for x in found.tags] == ["training"]
    assert json.loads(found.dataset.source) == {"uri": "s3://***@host/a, /data/b"}


def test_an_outage_only_delays(ready, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server, said, folder = MLflowServer(tmp_path), [], str(tmp_path / "store")
    url = f"http://me:secret@127.0.0.1:{server.port}"
    try:
        # down from the beginning: the run goes on, and says so once
        t = Tracker(url, folder, "tests", "demo", say=said.append)
        t.start({"a": "1"}, {"store": "x"})
        run = t.begin_step("codec", "x", {}, {})
        ui = tmp_path / "ui"
        ui.mkdir()
        (ui / "a.txt").write_text("hello")
        t.serves("i.json", {"codec": "/c"})
        t.headline({"codec.loss": 0.5})
        t.uses_dataset("corpus", "abc", ["/data"])
        t.ship(run, metrics_file(tmp_path / "metrics-0001.jsonl", [1, 2]))
        assert not t.flush(10)
        t.end_step(run, "FINISHED", {"mel": 1.5}, str(ui))
        assert t.run_id(run) is None
        t.finish("FINISHED", timeout_s=1)
        assert len([s for s in said if "does not answer" in s]) == 1 and "delivers the rest" in said[-1]
        assert not any("secret" in s for s in said) and store.names(f"{folder}/.tracking/demo")
        assert not any("secret" in p.read_text() for p in (tmp_path / "store").rglob("*.json"))

        # the next run delivers it
        server.start()
        t = Tracker(url, folder, "tests", "demo", say=said.append)
        t.start({}, {})
        assert t.flush(240)
        old = runs(t)["codec"]
        assert old.info.status == "FINISHED" and old.data.metrics["fact.mel"] == 1.5
        assert [h.step for h in client(t).get_metric_history(old.info.run_id, "loss")] == [1, 2]
        assert [a.path for a in client(t).list_artifacts(old.info.run_id)] == ["a.txt"]
        assert [v.run_id for v in client(t).search_model_versions("name = 'demo'")] == [old.data.tags["mlflow.parentRunId"]]
        parent = client(t).get_run(old.data.tags["mlflow.parentRunId"])
        assert [p.value for p in client(t).get_metric_history(parent.info.run_id, "codec.loss")] == [0.5]
        assert [d.dataset.name for d in parent.inputs.dataset_inputs] == ["corpus"]
        assert "secret" not in t.url() and "/#/experiments/" in t.url()

        # hanging in the middle: what happens meanwhile arrives when it is back, and nothing twice
        run = t.begin_step("lm", "x", {}, {})
        path = str(tmp_path / "metrics-0002.jsonl")
        t.ship(run, metrics_file(Path(path), [1]))
        assert t.flush(240)
        with monkeypatch.context() as hurried:
            hurried.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
            server.freeze(True)
            metrics_file(Path(path), [2, 3])
            assert not t.flush(20)
            t.end_step(run, "FINISHED", {}, None)
        server.freeze(False)
        t.finish("FINISHED")
        assert "answers again" in said[-1]
        assert [h.step for h in client(t).get_metric_history(run.run_id, "loss")] == [1, 2, 3]
        assert runs(t)["demo"].info.status == "FINISHED" and store.names(f"{folder}/.tracking/demo") == []
    finally:
        server.kill()
