"""Asking in the UI with Ray's job server: an evaluation as a job of a real cluster, a repeat, a job it does not know."""

from __future__ import annotations

import time

import pytest

from audiolm import store
from audiolm.eval_service import request
from audiolm.eval_service.launcher import RayJobs, open_launcher
from audiolm.pipeline.private_ray import read_settings
from tests.worlds.basics import free_port
from tests.worlds.registry import NAME, look, tags, until, until_of
from tests.worlds.servers import CLOSED
from tests.worlds.tiny_run import codec_build, finish, tell, tell_steps
from workflows import evaluate


@pytest.fixture
def cluster(head, monkeypatch):
    """The address of a job server; this process has its token.

    A head of `ray start`: where several clusters run, a job of any other one may join the wrong one.
    """
    with monkeypatch.context() as settings:
        for name, value in CLOSED.items():
            settings.setenv(name, value)
        read_settings()
        yield head
    read_settings()


def test_an_evaluation_is_one_ray_job(world, encoded, ready, cluster):
    folder = str(ready)
    _, build = finish(world, folder)
    uri = tell("sqlite", folder, build).uri
    from mlflow import MlflowClient
    from ray.job_submission import JobSubmissionClient

    client, launcher = MlflowClient(uri), open_launcher(False, cluster, "")
    client.set_model_version_tag(NAME, "2", "evaluate.suites", "stages")
    client.set_model_version_tag(NAME, "2", "evaluate", "requested")
    job = f"eval-{NAME}-2-1"
    assert look(client, launcher) == [f"models:/{NAME}/2: submitted as {job}"]
    assert not RayJobs(cluster).submit(job, ["--help"])  # by another watcher
    client.set_model_version_tag(NAME, "2", "evaluate", "requested")
    assert "at work already" in look(client, launcher)[0]
    found = until(client, "2", "done", "failed", log=lambda: JobSubmissionClient(cluster).get_job_logs(job))
    assert found["evaluate"] == "done", (found.get("evaluate.reason"), JobSubmissionClient(cluster).get_job_logs(job)[-3000:])
    assert client.get_run(found["evaluate.run"]).data.tags["audiolm.evaluation"] == job
    while launcher.status(job)[0]:
        time.sleep(0.2)
    assert "SUCCEEDED" in launcher.status(job)[1]

    client.set_model_version_tag(NAME, "3", "evaluate", "running")
    client.set_model_version_tag(NAME, "3", "evaluate.job", f"eval-{NAME}-3-1")
    look(client, launcher)
    assert "Ray's job server does not know it" in tags(client, "3")["evaluate.reason"]
    assert request.read_request(client, NAME, "3").number == 2


def test_a_codecs_table_is_the_same_as_ray_tasks_and_in_one_process(world, encoded, ready, cluster):
    folder = str(ready)
    finish(world, folder)
    uri = tell_steps("sqlite", folder, {"codec": codec_build(folder)}).uri
    from mlflow import MlflowClient
    from ray.job_submission import JobSubmissionClient

    client, launcher = MlflowClient(uri), open_launcher(False, cluster, "")
    client.set_model_version_tag("tiny-codec", "1", "evaluate", "requested")
    assert look(client, launcher) == ["models:/tiny-codec/1: submitted as eval-tiny-codec-1-1"]
    found = until_of(client, "tiny-codec", "1", "done", "failed",
                     log=lambda: JobSubmissionClient(cluster).get_job_logs("eval-tiny-codec-1-1"))
    assert found["evaluate"] == "done", found.get("evaluate.reason")
    by_ray = rows(f"{folder}/evaluations/tiny-codec-1/1")
    store.remove(f"{folder}/evaluations/cache")
    assert evaluate.main(["models:/tiny-codec/1", "--tracking", uri, "--store", folder, "--out", f"{folder}/inline"]) == 0
    assert rows(f"{folder}/inline") == by_ray and len(by_ray) > 20


def rows(folder: str) -> list[dict]:
    """A report's rows, to the last bit, without the seconds that they took."""
    return [{**row, "seconds": 0} for row in store.get_json(f"{folder}/rows.json")]


def test_no_job_server_is_an_error_that_names_the_ways_out():
    with pytest.raises(ValueError, match="no Ray job server at http://127.0.0.1.*--inline"):
        open_launcher(False, f"http://127.0.0.1:{free_port()}", "")
