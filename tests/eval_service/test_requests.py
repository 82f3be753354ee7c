"""Asking in the UI: every state of a request, with real processes and a real MLflow, killed where it hurts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from audiolm import store
from audiolm.dag import lease
from audiolm.eval_service import request
from audiolm.eval_service.launcher import Processes, claim
from audiolm.eval_service.request import job_id
from tests.worlds.basics import ROOT, free_port
from tests.worlds.registry import NAME, look, tags, until, watcher_of
from tests.worlds.servers import MLflowServer
from tests.worlds.tiny_run import finish, tell


@pytest.fixture
def registry(ready):
    """An MLflowClient, and a function that makes a version with tags."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{ready}/mlflow.db")
    run = client.create_run("0").info.run_id
    client.create_registered_model(NAME)

    def version(**tags) -> str:
        known = {"uri": f"{ready}/nowhere", "audiolm.step": "lm_semantic", "audiolm.index": f"{ready}/nowhere.json",
                 "audiolm.export": "yes"}
        return str(client.create_model_version(NAME, "/x", run, {**known, "evaluate": "requested", **tags}).version)

    return client, version


def test_a_job_that_fails_says_why_and_the_next_request_is_another_job(registry, tmp_path):
    client, version = registry
    v, work = version(), Processes(str(tmp_path / "work"))
    (said,) = look(client, work)
    assert said == f"models:/{NAME}/{v}: submitted as eval-{NAME}-{v}-1"
    found = until(client, v, "failed")
    assert f"its weights are not at {tmp_path}/nowhere" in found["evaluate.reason"] and found["evaluate.ended"] == "1 failed"
    assert look(client, work) == []
    client.set_model_version_tag(NAME, v, "evaluate", "requested")
    assert look(client, work) == [f"models:/{NAME}/{v}: submitted as eval-{NAME}-{v}-2"]
    assert until(client, v, "failed")["evaluate.ended"] == "2 failed"


def test_a_repeat_while_its_job_runs_is_refused_by_id(registry, tmp_path):
    client, version = registry
    v, work = version(), Processes(str(tmp_path / "work"))
    assert claim(f"{tmp_path}/work/{job_id(NAME, v, 1)}.json")  # this process is its job
    assert look(client, work) == [f"models:/{NAME}/{v}: eval-{NAME}-{v}-1 is at work already"]
    assert tags(client, v)["evaluate"] == "submitted"  # as after a watcher that died before it set the tag
    request.mark_running(client, request.read_request(client, NAME, v))
    client.set_model_version_tag(NAME, v, "evaluate", "requested")
    assert "at work already" in look(client, work)[0] and tags(client, v)["evaluate"] == "running"
    assert look(client, work) == [] and tags(client, v)["evaluate"] == "running"
    assert len(os.listdir(tmp_path / "work")) == 1


def test_a_lost_job_is_found_and_marked(registry, tmp_path):
    client, version = registry
    v, work = version(), Processes(str(tmp_path / "work"))
    look(client, work)
    os.kill(store.get_json(f"{tmp_path}/work/{job_id(NAME, v, 1)}.json")["pid"], signal.SIGKILL)
    for _ in range(100):  # a killed process takes a while to go where the machine is busy
        if found := look(client, Processes(str(tmp_path / "work"))):
            break
        time.sleep(0.1)
    assert "was lost: its process is gone" in found[0]
    found = tags(client, v)
    assert found["evaluate"] == "failed" and "was lost" in found["evaluate.reason"] and found["evaluate.ended"] == "1 failed"

    gone = version()  # submitted, its tag not set, and its job died
    store.put_json(f"{tmp_path}/work/{job_id(NAME, gone, 1)}.json", {**lease.owner(), "pid": 2**22 - 1})
    look(client, work)
    assert "was lost" in tags(client, gone)["evaluate.reason"]

    rebooted = version(evaluate="running", **{"evaluate.job": "eval-x"})
    store.put_json(f"{tmp_path}/work/{job_id(NAME, rebooted, 1)}.json", {**lease.owner(), "boot": "another"})
    nobody = version(evaluate="submitted", **{"evaluate.job": "eval-y"})
    look(client, work)
    assert "was lost" in tags(client, rebooted)["evaluate.reason"]
    assert "holds nothing of it" in tags(client, nobody)["evaluate.reason"]


def test_an_end_that_was_interrupted_is_completed_and_states_typed_by_hand_do_no_harm(registry, tmp_path):
    client, version = registry
    work = Processes(str(tmp_path / "work"))
    half = version(evaluate="running", **{"evaluate.job": job_id(NAME, "1", 2), "evaluate.ended": "2 done"})
    late = version(evaluate="submitted", **{"evaluate.job": job_id(NAME, "2", 1), "evaluate.ended": "1 failed"})
    typed = [version(evaluate=text) for text in ("running", "done", "yes please", "REQUESTED")]
    assert look(client, work) == []
    assert tags(client, half)["evaluate"] == "done" and tags(client, late)["evaluate"] == "failed"
    assert [tags(client, v)["evaluate"] for v in typed] == ["running", "done", "yes please", "REQUESTED"]
    again = request.read_request(client, NAME, half)
    second = request.Request(NAME, half, {"evaluate.ended": "1 done"})  # it is over
    request.end_request(client, second, "failed", "late")
    assert request.read_request(client, NAME, half) == again


def test_what_cannot_be_evaluated_is_refused_before_a_job(registry, tmp_path):
    client, version = registry
    work = Processes(str(tmp_path / "work"))
    wrong = {version(pruned="true"): "it was pruned",
             version(**{"audiolm.export": "no"}): "a checkpoint of lm_semantic holds a training's state",
             version(**{"evaluate.suites": "stages; rm -rf /"}): "evaluate.suites: no suite stages; rm -rf /"}
    foreign = client.create_model_version(NAME, "/x", tags={"evaluate": "requested"}).version
    look(client, work)
    for v, reason in {**wrong, str(foreign): "it is no checkpoint of this project"}.items():
        found = tags(client, v)
        assert found["evaluate"] == "failed" and found["evaluate.reason"].startswith(reason), found
    assert not (tmp_path / "work").exists()


def test_tags_that_lead_out_of_the_store_are_refused_before_a_job(registry, tmp_path):
    client, version = registry
    work, outside = Processes(str(tmp_path / "work")), tmp_path.parent / "elsewhere"
    (tmp_path / "link").symlink_to(outside)
    places = (f"{outside}/x", f"{tmp_path}/../elsewhere/x", f"{tmp_path}/link/x", f"file://{outside}/x", "s3://bucket/x",
              "http://127.0.0.1:1/x", f"{tmp_path}/x::http://127.0.0.1:1/x")
    for tag, place in [("uri", places[0]), ("audiolm.build", places[0]), *(("audiolm.index", place) for place in places)]:
        v = version(**{tag: place})
        look(client, work)
        found = tags(client, v)
        assert found["evaluate"] == "failed", (tag, place)
        assert found["evaluate.reason"].startswith(f"MLflow's tag {tag} is {place!r}, outside outputs and {tmp_path}: name")
    assert not (tmp_path / "work").exists()


def test_only_so_many_at_a_time_and_the_others_stay_requested(registry, tmp_path):
    client, version = registry
    work = Processes(str(tmp_path / "work"))
    vs = [version() for _ in range(3)]
    for v in vs:
        claim(f"{tmp_path}/work/{job_id(NAME, v, 1)}.json")
    look(client, work, parallel=2)
    look(client, work, parallel=2)
    assert sorted(tags(client, v)["evaluate"] for v in vs) == ["requested", "submitted", "submitted"]


def test_a_job_that_cannot_be_submitted_is_set_aside_and_the_others_go_on(registry, tmp_path, monkeypatch):
    client, version = registry
    work, said = Processes(str(tmp_path / "work")), []
    bad, good = version(), version()
    os.makedirs(log := f"{tmp_path}/work/{job_id(NAME, bad, 1)}.log")  # its log cannot be opened
    claim(f"{tmp_path}/work/{job_id(NAME, good, 1)}.json")
    watcher = watcher_of(client, work, said)
    watcher.sweep()
    assert tags(client, bad)["evaluate"] == "requested" and tags(client, good)["evaluate"] == "submitted"
    assert len(said) == 2 and "cannot be submitted, again in 10 s: IsADirectoryError" in said[0]
    watcher.sweep()
    assert len(said) == 2  # not tried yet
    os.rmdir(log)
    claim(f"{tmp_path}/work/{job_id(NAME, bad, 1)}.json")
    monkeypatch.setattr("audiolm.eval_service.watcher.time", SimpleNamespace(monotonic=lambda: time.monotonic() + 10))
    watcher.sweep()
    assert tags(client, bad)["evaluate"] == "submitted"


def test_ids_are_safe_and_of_one_name_each():
    a, b = job_id("it's a", "1", 1), job_id("it_s a", "1", 1)
    assert a != b and job_id("speech-lm", "3", 2) == "eval-speech-lm-3-2"
    assert not set(a) & set(" '\"/;$")


KILLED = """
    import os
    from audiolm.eval_service.launcher import Processes
    from audiolm.eval_service.watcher import Watcher
    from audiolm.eval.suites.run import check_names
    from mlflow import MlflowClient

    class Dies(Processes):
        def submit(self, job, args):
            super().submit(job, args)
            os.kill(os.getpid(), 9)

    extra = ["--tracking", {uri!r}, "--store", {store!r}]
    Watcher(MlflowClient({uri!r}), {store!r}, Dies({work!r}), extra, 1, print, check_names).sweep()
"""


def test_the_round_trip(world, encoded, ready, tmp_path, monkeypatch):
    """Asked on a server, the watcher killed between submitting and telling, another one finishes, woken by the webhook."""
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOWED_SCHEMES", "http,https")
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
    monkeypatch.setenv("AUDIOLM_WEBHOOK_SECRET", "sixteen letters or more")
    server, folder, work = MLflowServer(tmp_path), str(tmp_path / "store"), str(tmp_path / "work")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    _, build = finish(world, folder)
    watcher = None
    try:
        server.start()
        from mlflow import MlflowClient

        client, port = MlflowClient(server.url), free_port()
        client.create_webhook("ask", f"http://127.0.0.1:{port}/", ["model_version_tag.set"], secret="sixteen letters or more")
        tell(server.url, folder, build)
        tell(server.url, folder, build)  # another driver finds all that is there
        named = [client.get_model_version_by_alias(NAME, alias) for alias in ("best", "latest")]
        assert [str(v.version) for v in named] == ["2", "3"]
        assert len(client.search_model_versions(f"name = '{NAME}'")) == 3
        for v in (1, 2):
            client.set_model_version_tag(NAME, v, "evaluate", "requested")
        client.set_model_version_tag(NAME, "2", "evaluate.suites", "stages, ladder")
        code = textwrap.dedent(KILLED.format(uri=server.url, work=work, store=folder))
        assert subprocess.run([sys.executable, "-c", code], env=env, timeout=120).returncode == -9
        assert os.path.exists(f"{work}/eval-{NAME}-2-1.json")  # submitted, and nobody was told

        said = open(tmp_path / "watcher.log", "w+b")
        watcher = subprocess.Popen(
            [sys.executable, str(ROOT / "workflows/evaluate.py"), "watch", "--inline", "--work", work, "--tracking",
             server.url, "--store", folder, "--every", "300", "--webhook", str(port)], stdout=said, stderr=said, env=env)
        found = until(client, "2", "done", "failed", seconds=240)
        assert found["evaluate"] == "done", found
        assert until(client, "1", "failed")["evaluate.reason"].startswith("it was pruned")
        v = client.get_model_version(NAME, "2")
        assert "[report with sound and plots](#/experiments/" in v.description and "| losses: semantic stage |" in v.description
        assert v.description.startswith("Checkpoint of `lm_semantic` at step 2") and "set the tag" not in v.description
        metrics = {m.key: m for m in client.get_logged_model(v.tags["audiolm.model"]).metrics}
        assert metrics["eval/losses/semantic stage/nats per token"].step == 2 and "val.loss" in metrics
        run = client.get_run(found["evaluate.run"])
        assert run.info.status == "FINISHED" and run.data.tags["mlflow.parentRunId"] == v.run_id
        assert {a.path for a in client.list_artifacts(run.info.run_id)} == {"report.html", "rows.json", "rows.csv"}
        assert len(client.search_runs([run.info.experiment_id], "tags.`audiolm.evaluation` LIKE 'eval%'")) == 1

        client.set_model_version_tag(NAME, "3", "evaluate.suites", "stages")
        client.set_model_version_tag(NAME, "3", "evaluate", "requested")  # the watcher looks every 300 s unless it is woken
        assert until(client, "3", "done", "failed", seconds=120)["evaluate"] == "done"
        assert tags(client, "3")["evaluate.job"] == f"eval-{NAME}-3-1"
    finally:
        if watcher:
            watcher.kill()
            watcher.wait()
            print(Path(said.name).read_text())
        server.kill()


def test_an_mlflow_that_is_down_when_a_job_ends_only_delays(ready, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    from audiolm.eval.results import Result
    from audiolm.eval.suites.base import SuiteReport
    from audiolm.eval_service.evaluation_job import answer

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = MLflowServer(tmp_path)
    try:
        server.start()
        client = MlflowClient(server.url)
        client.create_registered_model(NAME)
        experiment = client.create_experiment("tests")  # the copied database's own one keeps files in the working folder
        run = client.create_run(experiment).info.run_id
        model = client.create_logged_model(experiment, "m", run)
        client.create_model_version(NAME, model.artifact_location, run, {"evaluate": "submitted"}, model_id=model.model_id)

        def evaluate():
            store.put_json(f"{tmp_path}/r/rows.json", [])
            store.put(f"{tmp_path}/r/report.html", b"<p>")
            server.kill()
            threading.Timer(2.0, server.start).start()
            return SuiteReport([Result("I", "a", "x", 1.0)], [], f"{tmp_path}/r")

        assert answer(client, NAME, "1", 1, evaluate)
        assert tags(client, "1")["evaluate"] == "done"
        assert not answer(client, NAME, "1", 1, lambda: pytest.fail("that request has ended"))
    finally:
        server.kill()
