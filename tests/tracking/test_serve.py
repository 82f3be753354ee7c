"""A system as MLflow serves it: a real `mlflow models serve`, the model in this process, and how it gets into MLflow."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import sysconfig
import time
import tracemalloc
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from audiolm import store
from audiolm.config.serve import ServeConfig
from audiolm.data.audio import wav_bytes
from audiolm.generate.load import load
from audiolm.generate.predict import Service, TooLate
from audiolm.generate.prompts import prompt_from_bytes
from audiolm.tracking.lookup import index_of
from audiolm.tracking.registry import save
from audiolm.tracking.target import resolve
from audiolm.tracking.tracker import Tracker
from tests.worlds.basics import ROOT, free_port
from tests.worlds.tiny_system import build, token_store, voice


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict[str, str]:
    """A whole system's folders."""
    folder = str(tmp_path_factory.mktemp("system"))
    return {**build(folder), "semantic_tokens": token_store(folder)}


@pytest.fixture(scope="module")
def folder(steps, tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("model") / "model")
    save(path, {"index": "runs/tiny.json", "steps": steps})
    return path


@pytest.fixture(scope="module")
def model(folder):
    import mlflow

    return mlflow.pyfunc.load_model(folder)


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def sound(text: str) -> np.ndarray:
    import soundfile

    wav_T, rate = soundfile.read(io.BytesIO(base64.b64decode(text)), dtype="int16")
    assert rate == 16_000 and wav_T.ndim == 1
    return wav_T


def flac(seconds: int) -> str:
    import soundfile

    sink = io.BytesIO()
    with soundfile.SoundFile(sink, "w", 16_000, 1, "PCM_16", format="FLAC") as f:
        for _ in range(seconds // 60):
            f.write(np.full(16_000 * 60, 0.01, np.float32))
    return base64_of(sink.getvalue())


def wide(channels: int) -> str:
    """A second."""
    import soundfile

    sink = io.BytesIO()
    with soundfile.SoundFile(sink, "w", 16_000, channels, "PCM_U8", format="WAV") as f:
        for _ in range(4):
            f.write(np.full((4000, channels), 0.5, np.float32))
    return base64_of(sink.getvalue())


def ask(model, *rows, params=None) -> list[dict]:
    import pandas

    return model.predict(pandas.DataFrame(rows), params)


@pytest.fixture(scope="module")
def server(folder):
    """Its address; a request has 12 s, 5,000 sounds and one other that waits."""
    port = free_port()
    limits = json.dumps({"max_sounds": 5000, "max_waiting": 1})
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "models", "serve", "-m", folder, "--env-manager", "local", "-h", "127.0.0.1",
         "-p", str(port), "--timeout", "12"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, "MLFLOW_PYFUNC_INFERENCE_CONFIG": limits, "PYTHONPATH": str(ROOT),
             "PATH": sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]})
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, "the server ended or did not come up"
                time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def post(url: str, *rows, **params) -> tuple[int, dict]:
    body = json.dumps({"dataframe_records": rows, **({"params": params} if params else {})}).encode()
    request = urllib.request.Request(f"{url}/invocations", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as e:
        text = e.read().decode()
        return e.code, json.loads(text) if text.startswith("{") else {"message": text}  # the server's own 504 is plain text


def test_a_request_is_answered_with_sound_and_a_bad_one_with_the_reason(server):
    row = {"audio": base64_of(wav_bytes(voice(0.7))), "seconds": 1, "seed": 3, "samples": 2}
    status, reply = post(server, row)
    assert status == 200
    first, second = reply["predictions"]
    for told in (first, second):
        assert told["prompt_s"] == 0.68 and 0.68 < told["seconds"] <= 1.68  # 0.7 s are 17 whole frames
        assert len(sound(told["audio"])) == round(told["seconds"] * 16_000)
        assert told["seconds"] == 1.68 or told["ended"]
    assert [(told["sample"], told["seed"]) for told in (first, second)] == [(0, 3), (1, 4)]
    assert post(server, row) == (status, reply)  # the same bytes
    assert post(server, {**row, "seed": 4, "samples": 1})[1]["predictions"][0]["audio"] == second["audio"]

    status, reply = post(server, {**row, "audio": base64_of(b"hello")})
    assert status == 400 and reply["error_code"] == "INVALID_PARAMETER_VALUE"
    assert "row 0: audio: the file of 5 bytes is no audio that can be read" in reply["message"]
    assert "Traceback" not in str(reply)
    assert "row 0: audio: '5' is not base64" in post(server, {**row, "audio": 5})[1]["message"]
    assert post(server, row, temperature_coarse=0.0)[1]["predictions"][0]["audio"] != first["audio"]


def test_requests_that_find_no_place_are_refused_and_one_whose_caller_left_is_given_up(server):
    small = {"mode": "unconditional", "seconds": 0.1}
    body = json.dumps({"dataframe_records": [{"mode": "unconditional", "seconds": 1.9, "samples": 5000}]}).encode()  # minutes
    deadline, refused = time.monotonic() + 120, []
    with socket.create_connection(("127.0.0.1", int(server.rsplit(":", 1)[1]))) as caller:
        caller.sendall(b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                       b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        while not refused:
            assert time.monotonic() < deadline, "no request was refused"
            with ThreadPoolExecutor(4) as pool:  # more than there are places, should the long one not have begun yet
                refused = [reply for status, reply in pool.map(lambda _: post(server, small), range(4)) if status == 503]
    assert "one request is answered and 1 wait, at most (max_waiting): ask again later" in refused[0]["message"]
    while (status := post(server, small)[0]) != 200:
        assert time.monotonic() < deadline, status


def test_the_answer_is_what_the_system_generates(model, steps):
    lm, prompt = load(steps), wav_bytes(voice(0.6))
    wav_T, text = prompt_from_bytes(prompt), base64_of(prompt)
    wanted = {"continuation": lm.continuation([wav_T], 0.4, [5]), "unconditional": lm.unconditional(0.4, [5]),
              "acoustic": lm.acoustic(lm.tokenize([wav_T]), [5], [len(wav_T)]), "resynthesis": lm.resynthesis([wav_T])}
    rows = [{"audio": None if mode == "unconditional" else text, "mode": mode, "seconds": 0.4, "seed": 5} for mode in wanted]
    for told, (mode, (made,)) in zip(ask(model, *rows), wanted.items(), strict=True):
        assert told["audio"] == base64_of(wav_bytes(made.wav_T)), mode
        assert told["prompt_s"] == (0.6 if mode == "continuation" else 0.0) and told["ended"] == made.ended


def test_any_rate_and_format_is_heard(model):
    import soundfile

    wav_T = voice(0.8)
    for rate, kind in ((44_100, "WAV"), (22_050, "FLAC"), (48_000, "OGG"), (44_100, "MP3")):
        t = np.arange(round(0.8 * rate)) / rate
        wav_TC = np.stack([np.interp(t, np.arange(len(wav_T)) / 16_000, wav_T)] * 2, 1)
        sink = io.BytesIO()
        soundfile.write(sink, wav_TC, rate, format=kind)
        heard = prompt_from_bytes(sink.getvalue())
        assert abs(len(heard) - 12_800) <= (0 if kind != "MP3" else 2000) and len(heard) % 640 == 0, kind
        assert len(prompt_from_bytes(sink.getvalue(), 0.6)) == 9600
        assert np.abs(heard).max() > 0.1
    lines = base64.encodebytes(wav_bytes(wav_T)).decode()  # as the base64 command wraps it
    assert ask(model, {"audio": lines, "seconds": 0.1})[0]["prompt_s"] == 0.8


def test_bad_input_is_refused_with_the_field_and_the_fix(model):
    import soundfile
    from mlflow.exceptions import MlflowException

    good, nan = base64_of(wav_bytes(voice(0.6))), io.BytesIO()
    soundfile.write(nan, np.full(16_000, np.nan, np.float32), 16_000, format="WAV", subtype="FLOAT")
    for row, reason in (
            ({"audio": "$%&"}, r"row 0: audio: '\$%&' is not base64: send what .base64 < prompt.wav"),
            ({"audio": good[:40]}, "row 0: audio: the file of 30 bytes: truncated"),
            ({"seconds": 0.5}, "row 0: audio: missing; mode continuation needs"),
            ({"audio": base64_of(wav_bytes(np.zeros(16_000, np.float32)))}, "row 0: audio: the prompt is silent"),
            ({"audio": base64_of(wav_bytes(voice(0.3)))}, r"row 0: audio: the prompt lasts 0\.30 s: give at least 0\.5 s"),
            ({"audio": base64_of(nan.getvalue())}, "row 0: audio: the file of .* bytes: the sample at 0.000 s is NaN"),
            ({"audio": good, "seconds": 1.5}, r"row 0: audio, seconds: 2\.1.* s .* exceed the 2 s"),
            ({"audio": good, "seconds": -1.0}, "row 0: seconds: -1 is not a length"),
            ({"audio": good, "seconds": float("inf")}, "row 0: seconds: inf"),
            ({"audio": good, "samples": 0}, "row 0: samples: 0; give 1 to 32"),
            ({"audio": good, "samples": 33}, "row 0: samples: 33; give 1 to 32"),
            ({"audio": flac(3600), "mode": "resynthesis"}, r"row 0: audio: it lasts longer than 60 s \(max_prompt_s\): send"),
            ({"audio": wide(9)}, r"row 0: audio: 9 channels, 8 at most \(max_channels\): mix them down"),
            ({"audio": "A" * 30_000_000}, r"audio: 22\.5 MB, 20 at most \(max_mb\): send less sound"),
            ({"audio": good, "mode": "sing"}, "row 0: mode: 'sing' is none; one of continuation"),
            ({}, "no rows")):
        with pytest.raises(MlflowException, match=reason) as caught:
            ask(model, row)
        assert caught.value.error_code == "INVALID_PARAMETER_VALUE"
    with pytest.raises(MlflowException, match=r"17 rows ask for 34 sounds, 32 at most \(max_sounds\): send several"):
        ask(model, *[{"mode": "unconditional", "seconds": 0.1, "samples": 2}] * 17)
    with pytest.raises(MlflowException, match="row 1: audio: missing"):
        ask(model, {"audio": good, "seconds": 0.1}, {"audio": None, "seconds": 0.1})
    with pytest.raises(MlflowException, match=r"temperature \(-1"):
        ask(model, {"audio": good, "seconds": 0.1}, params={"temperature_fine": -1.0})


def test_an_hour_or_a_thousand_channels_are_refused_before_they_are_decoded(model):
    from mlflow.exceptions import MlflowException

    for audio in (flac(3600), wide(1024)):
        tracemalloc.start()
        try:
            with pytest.raises(MlflowException, match="max_prompt_s|max_channels"):
                ask(model, {"audio": audio, "mode": "resynthesis"})
            peak_mb = tracemalloc.get_traced_memory()[1] / 1e6
        finally:
            tracemalloc.stop()
        assert peak_mb < 100  # the audio has 230 and 65 MB, and the work on it many times as much


def test_a_request_whose_time_is_over_is_given_up_and_the_next_one_is_answered(steps):
    service = Service(load(steps), ServeConfig())
    rows = [{"mode": "unconditional", "seconds": 0.3}]
    wanted = service.answer(rows, {})
    with pytest.raises(TooLate, match="was not ready within 0 s: ask for fewer or shorter sounds, or .* --timeout"):
        service.answer(rows, {}, limit_s=1e-9)
    assert service.answer(rows, {}, limit_s=600) == wanted


def test_a_system_whose_folder_is_gone_says_which(steps, tmp_path):
    import mlflow

    save(str(tmp_path / "m"), {"index": "runs/tiny.json", "steps": {**steps, "codec": str(tmp_path / "gone")}})
    with pytest.raises(ValueError, match="step codec of runs/tiny.json is not at .*gone"):
        mlflow.pyfunc.load_model(str(tmp_path / "m"))


def finished(tmp_path, systems, name="tiny"):
    """Pipeline runs of one name, one after another, each ending with a system; returns an MlflowClient and the said."""
    said = []
    for steps in systems:
        t = Tracker("sqlite", str(tmp_path), "tests", name, say=said.append)
        t.start({"run.name": name}, {"store": str(tmp_path)})
        t.serves(f"{tmp_path}/runs/{name}.json", steps)
        t.finish("FINISHED")
    from mlflow import MlflowClient

    return MlflowClient(t.uri), said


def test_a_run_registers_its_system_once(ready, tmp_path, steps):
    import mlflow

    other = {**steps, "lm_fine": "/elsewhere"}
    client, said = finished(tmp_path, [steps, steps, other, steps], "it's a:b")
    versions = {v.version: v for v in client.search_model_versions("name = 'it_s a_b'")}
    assert said == [] and versions.keys() == {1, 2}
    run = client.get_run(versions[1].run_id)
    assert run.info.run_name == "it's a:b" and "mlflow.parentRunId" not in run.data.tags
    path = mlflow.artifacts.download_artifacts(versions[1].source, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
                                               dst_path=str(tmp_path / "got"))
    told = store.get_json(f"{path}/artifacts/system.json")
    assert told == {"index": f"{tmp_path}/runs/it's a:b.json", "steps": steps}
    model = mlflow.pyfunc.load_model(path)
    assert 0 < len(sound(ask(model, {"mode": "unconditional", "seconds": 0.3})[0]["audio"])) <= 4800


def test_a_driver_killed_while_it_registers_leaves_one_version(ready, tmp_path, steps):
    client, _ = finished(tmp_path, [steps])
    experiment = client.get_experiment_by_name("tests").experiment_id
    (model,) = client.search_logged_models([experiment])
    client.delete_model_version("tiny", "1")
    client, _ = finished(tmp_path, [steps])  # as if it had been killed before the version was made
    assert [m.model_id for m in client.search_logged_models([experiment])] == [model.model_id]
    assert len(client.search_model_versions("name = 'tiny'")) == 1


def test_a_system_outside_the_users_store_is_not_read(ready, tmp_path, steps):
    client, _ = finished(tmp_path, [steps])
    kmeans = steps["kmeans"]
    with pytest.raises(ValueError, match=f"MLflow's system.json, .* is '/.*/system./.*', outside outputs and {tmp_path}: name"):
        resolve("models:/tiny/1", "outputs", client.tracking_uri)
    above = os.path.commonpath([kmeans, str(tmp_path)])  # named by the user, it is read
    with pytest.raises(ValueError, match="there is no run index .*runs/tiny.json"):
        resolve("models:/tiny/1", above, client.tracking_uri)


def test_a_run_is_found_by_its_id(ready, tmp_path, monkeypatch):
    t = Tracker("sqlite", str(tmp_path), "tests", "demo")
    t.start({"run.name": "demo"}, {"store": str(tmp_path)})
    step = t.begin_step("codec", "x", {}, {})
    step_id = t.run_id(step)
    t.end_step(step, "FINISHED", {}, None)
    t.finish("FINISHED")
    from mlflow import MlflowClient

    client = MlflowClient(t.uri)
    parent, wanted = client.get_run(step_id).data.tags["mlflow.parentRunId"], f"{tmp_path}/runs/demo.json"
    assert index_of(step_id, t.uri) == index_of(parent, t.uri) == wanted
    monkeypatch.setenv("MLFLOW_TRACKING_URI", t.uri)
    assert index_of(parent) == wanted
    foreign = client.create_run("0").info.run_id
    with pytest.raises(ValueError, match="not a run of this pipeline"):
        index_of(foreign)
    with pytest.raises(ValueError, match="no run 'abc' in MLflow at sqlite"):
        index_of("abc")
    elsewhere = tmp_path.parent / "elsewhere"
    client.set_tag(parent, "store", str(elsewhere))
    with pytest.raises(ValueError, match=f"tag store is '{elsewhere}', outside ./outputs and {tmp_path}: name .* --store"):
        index_of(parent)
    assert index_of(parent, folder=str(tmp_path.parent)) == f"{elsewhere}/runs/demo.json"
    client.set_tag(parent, "store", "outputs")
    with pytest.raises(ValueError, match="store 'outputs', relative"):
        index_of(parent)
    with pytest.raises(ValueError, match="does not answer"):
        index_of(parent, f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path / ".tracking")
    with pytest.raises(ValueError, match="no MLflow database outputs/mlflow.db"):
        index_of(parent)
    assert not (tmp_path / ".tracking" / "outputs").exists()
