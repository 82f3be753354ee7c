"""Asking for checkpoints of a codec and a masked model: on a real server, of trainings that still run, and what is refused."""

from __future__ import annotations

import os

import pytest

from audiolm import store
from audiolm.config.base import identity
from audiolm.eval.suites.run import check_names
from audiolm.eval_service.launcher import Processes
from audiolm.eval_service.watcher import Watcher
from audiolm.tracking.outbox import key
from tests.worlds.basics import ROOT
from tests.worlds.registry import until_of
from tests.worlds.servers import MLflowServer
from tests.worlds.tiny_run import MASKED, codec_build, finish, saved_build, tell_steps, triphones, untrained_masked
from workflows import evaluate


@pytest.fixture
def asked(world, encoded, tmp_path):
    """(client of a real server with a version of codec, masked_model and semantic_vocoder each, the store)."""
    server, folder = MLflowServer(tmp_path), str(tmp_path / "store")
    finish(world, folder)
    codec = codec_build(folder)
    masked, _ = saved_build(folder, "masked_model", {"model": identity(MASKED)}, {"model": untrained_masked()[1]}, 5, {
        "loss": 1.25, "accuracy": 0.5, "target_entropy": 1.4})
    vocoder, _ = saved_build(folder, "semantic_vocoder", {}, {}, 3, {"loss": 1.0})
    try:
        server.start()
        tell_steps(server.url, folder, {"codec": codec, "masked_model": masked, "semantic_vocoder": vocoder})
        from mlflow import MlflowClient

        yield MlflowClient(server.url), folder
    finally:
        server.kill()


def request(client, name: str, suites: str = "") -> None:
    if suites:
        client.set_model_version_tag(name, "1", "evaluate.suites", suites)
    client.set_model_version_tag(name, "1", "evaluate", "requested")


def test_each_is_answered_by_its_own_suite_and_others_are_refused(world, asked, tmp_path, monkeypatch):
    client, folder = asked
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    said, work = [], Processes(str(tmp_path / "work"))
    watcher = Watcher(client, folder, work, ["--tracking", client.tracking_uri, "--store", folder], 9, said.append, check_names)
    for name in ("tiny-codec", "tiny-masked_model"):
        assert "set the tag `evaluate`" in client.get_model_version(name, "1").description
    assert "set the tag" not in client.get_model_version("tiny-semantic_vocoder", "1").description

    # Before a job: a suite that needs a system, and a step of which nothing can be measured alone.
    request(client, "tiny-codec", "codec, wer")
    request(client, "tiny-semantic_vocoder")
    watcher.sweep()
    refused = until_of(client, "tiny-codec", "1", "failed")["evaluate.reason"]
    assert refused == "evaluate.suites: wer needs a whole system, and this is a checkpoint of codec: name codec, or none"
    refused = until_of(client, "tiny-semantic_vocoder", "1", "failed")["evaluate.reason"]
    assert refused.startswith("a checkpoint of semantic_vocoder holds a training's state") and not os.path.exists(work.folder)

    # The codec by a process that the watcher starts.
    client.delete_model_version_tag("tiny-codec", "1", "evaluate.suites")
    request(client, "tiny-codec")
    watcher.sweep()
    log = f"{work.folder}/eval-tiny-codec-1-2.log"
    found = until_of(client, "tiny-codec", "1", "done", "failed", log=lambda: open(log).read())
    assert found["evaluate"] == "done" and found["evaluate.ended"] == "2 done", (found.get("evaluate.reason"), open(log).read())
    version = client.get_model_version("tiny-codec", "1")
    assert "| codecs: original (ceiling) | PESQ |" in version.description and "set the tag" not in version.description
    metrics = {m.key: m for m in client.get_logged_model(version.tags["audiolm.model"]).metrics}
    assert {key(f"eval/codecs/codec, {q}/mel distance") for q in ("1 level", "3 levels")} <= metrics.keys()
    assert metrics[key("eval/codecs/codec, 3 levels/mel distance")].step == 7 and "val.mel" in metrics
    files = {a.path for a in client.list_artifacts(found["evaluate.run"])}
    assert files == {"report.html", "rows.json", "rows.csv"}

    # The masked model in this process, as the job does it: validation, ABX and phones.
    argv = ["models:/tiny-masked_model/1", "--tracking", client.tracking_uri, "--store", folder, "--device", "cpu"]
    request(client, "tiny-masked_model")
    assert evaluate.main([*argv, triphones(world), "--answer", "1"]) == 0
    metrics = {m.key: m.value for m in client.get_logged_model(
        client.get_model_version("tiny-masked_model", "1").tags["audiolm.model"]).metrics}
    at = "eval/masked model/validation at step 5"
    assert metrics[key(f"{at}/loss, nats a masked frame")] == 1.25
    assert metrics[key(f"{at}/right on masked frames, percent")] == 50
    assert metrics[key(f"{at}: by frequency/loss, nats a masked frame")] == 1.4
    assert {f"eval/masked model/{item}/ABX across percent" for item in ("MFCC", "layer 2")} <= metrics.keys()
    assert 0 <= metrics[key("eval/masked model/layer 2, 4 clusters/PNMI")] <= 1

    # Weights that are gone end the request with the reason.
    build = version.tags["audiolm.build"]
    store.remove(f"{folder}/evaluations/checkpoints")
    store.remove(f"{build}/checkpoints")
    request(client, "tiny-codec")
    assert evaluate.main([a.replace("masked_model", "codec") for a in argv] + ["--answer", "3"]) == 1
    gone = until_of(client, "tiny-codec", "1", "failed")
    assert "its weights are not at" in gone["evaluate.reason"] and gone["evaluate.ended"] == "3 failed"
