"""The demo page as a real server, asked by gradio's client, by plain HTTP and in a real browser of a phone's width."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf

from audiolm import store
from audiolm.data.audio import wav_bytes
from audiolm.demo.sounds import Request, answer
from audiolm.generate.load import load, system_steps
from tests.worlds.basics import ROOT, free_port
from tests.worlds.browser import PLAYED
from tests.worlds.tiny_system import build, token_store, voice

pytest.importorskip("gradio", reason="no gradio: pip install -e '.[demo]'")
TEMPERATURES = (0.9, 0.8, 0.6)
LONGEST_S = 1.75  # below the 2 s that the coarse stage was trained on


def command(index: str, port: int, folder: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "workflows/demo.py"), index, "--device", "cpu", "--port", str(port), "--max-seconds",
         str(LONGEST_S)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": folder})


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The command on a tiny system: its process, address, port, index, folder of temporary files, and a clip."""
    folder = str(tmp_path_factory.mktemp("demo"))
    paths = {**build(folder), "semantic_tokens": token_store(folder)}
    index = f"{folder}/runs/tiny.json"
    store.put_json(index, {"run": "tiny", "steps": {n: {"path": p} for n, p in paths.items()},
                           "config": {"samples": {"temperature_semantic": TEMPERATURES[0]}}})
    os.makedirs(f"{folder}/tmp")
    sf.write(f"{folder}/clip.wav", voice(1.5), 16_000)
    port = free_port()
    process = command(index, port, f"{folder}/tmp")
    line = process.stdout.readline()
    assert f"run tiny ({index}) on cpu: http://127.0.0.1:{port}/" in line, process.stderr.read()
    yield SimpleNamespace(process=process, url=f"http://127.0.0.1:{port}/", port=port, index=index, tmp=f"{folder}/tmp",
                          clip=f"{folder}/clip.wav")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert os.listdir(f"{folder}/tmp") == []  # neither sounds nor uploads outlive the server


@pytest.fixture
def client(served, monkeypatch, tmp_path):
    from gradio_client import Client

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the client would look up its user agent
    return Client(served.url, verbose=False, analytics_enabled=False, download_files=str(tmp_path))


def ask(client, clip: str, mode: str = "continuation", endpoint: str = "/generate", seconds: float = 0.8) -> tuple:
    from gradio_client import handle_file

    return client.predict(handle_file(clip), mode, 0.6, seconds, 2, 5, *TEMPERATURES, api_name=endpoint)


def test_the_sounds_of_a_request_are_the_systems(served, client):
    defaults = {c["props"].get("label"): c["props"].get("value") for c in client.config["components"]}
    assert tuple(defaults[stage] for stage in ("semantic", "coarse", "fine")) == TEMPERATURES  # the run's
    status, *players = ask(client, served.clip)
    assert status.startswith("Done in") and [p["visible"] for p in players] == [True] * 6 + [False] * 4
    lm = load(system_steps(served.index))
    names = ("semantic", "coarse", "fine")
    expected = answer(lm, Request(served.clip, "continuation", 0.6, 0.8, 2, 5, dict(zip(names, TEMPERATURES, strict=True))), 2)
    for sound, player, picture in zip(expected, players[:6:2], players[1:6:2], strict=True):
        assert player["label"] == sound.title and store.get(player["value"]) == wav_bytes(sound.wav_T)
        assert store.get(picture["value"])[:4] == b"\x89PNG"
    status, *players = ask(client, served.clip, endpoint="/ladder")
    assert [p["visible"] for p in players] == [True] * 12 and players[-2]["label"].startswith("5. continuation")


def test_bad_recordings_and_requests_have_their_line(served, client, tmp_path):
    from gradio_client.exceptions import AppError

    for name, wav_T, mode, line in (("silent.wav", np.zeros(16_000), "continuation", "silent.wav: the prompt is silent"),
                                    ("long.wav", voice(3.0), "acoustic", "long.wav lasts longer than 1.75 s")):
        sf.write(tmp_path / name, wav_T, 16_000)
        with pytest.raises(AppError, match=line):
            ask(client, str(tmp_path / name), mode)
    with pytest.raises(AppError, match="2.3 s together, 1.75 s at most"):
        ask(client, served.clip, seconds=1.7)


def test_an_upload_is_bounded_in_bytes(served):
    import httpx

    sent = httpx.post(f"{served.url}gradio_api/upload", files={"files": ("big.wav", bytes(51 * 2**20))}, timeout=120)
    assert sent.status_code == 413 and "maximum allowed size" in sent.text
    assert not [f for folder, _, files in os.walk(served.tmp) for f in files if f == "big.wav"]


def test_no_file_of_the_machine_is_read(served):
    import httpx

    for path in ("/etc/passwd", served.index, served.clip, f"{served.tmp}/../clip.wav", "pyproject.toml"):
        assert httpx.get(f"{served.url}gradio_api/file={path}").status_code == 403
    recording = {"path": served.clip, "meta": {"_type": "gradio.FileData"}}
    data = {"data": [recording, "continuation", 0.6, 0.8, 1, 0, *TEMPERATURES]}
    event = httpx.post(f"{served.url}gradio_api/call/generate", json=data).json()["event_id"]
    assert "event: error" in httpx.get(f"{served.url}gradio_api/call/generate/{event}", timeout=60).text


def test_there_is_no_way_around_the_queue(served):
    import httpx

    data = {"data": [None, "unconditional", 0.6, 0.8, 1, 0, *TEMPERATURES]}
    assert httpx.post(f"{served.url}gradio_api/run/generate", json=data).status_code == 404


def test_a_taken_port_is_named(served, tmp_path):
    process = command(served.index, served.port, str(tmp_path))
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2 and f"--port {served.port}: " in stderr and "give another --port" in stderr
    assert stderr.count("\n") == 1


def test_a_phone_uploads_and_plays(served, browser, tmp_path):
    page, foreign, errors = browser.new_context(viewport={"width": 390, "height": 844}).new_page(), [], []
    page.set_default_timeout(120_000)
    page.on("request", lambda r: r.url.startswith((served.url, "data:", "blob:")) or foreign.append(r.url))
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.goto(served.url)
    page.locator("input[type=file]").first.set_input_files(served.clip)
    page.get_by_role("button", name="Trim audio").wait_for()  # the upload is there
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("Done in").wait_for()
    page.get_by_text("Continuation, seed 1").wait_for()
    assert page.locator("img").count() == 3
    players = page.locator("audio[src]")
    players.last.wait_for(state="attached")
    assert all(players.evaluate_all(PLAYED)) and players.count() >= 3
    page.get_by_text("Each stage of the ladder").click()
    page.get_by_role("button", name="Build the ladder").click()
    page.get_by_text("5. continuation").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 390  # nothing scrolls sideways
    page.screenshot(path=tmp_path / "phone.png", full_page=True)
    assert (foreign, errors) == ([], [])
