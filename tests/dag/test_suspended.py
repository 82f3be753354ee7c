"""A driver that is suspended while it works, and wakes up after another one has finished its steps."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from audiolm.config.run import ClusterConfig
from audiolm.dag import lease
from audiolm.dag.execute import run_step
from audiolm.dag.outputs import build_of
from audiolm.dag.step import Step
from audiolm.data.parallel import parallel_map
from audiolm.pipeline.cli import run_command
from audiolm.store import exists, get, get_json, join, put, put_json
from audiolm.train.loop import train
from tests.worlds.basics import ROOT
from tests.worlds.training import TinyLM, settings

CPU = ClusterConfig(threads=1, device="cpu")
together = threading.Barrier(3, action=lambda: os.kill(os.getpid(), signal.SIGSTOP))  # all kinds of steps at their worst moment


def pause() -> None:
    if os.environ.get("SUSPENDED"):
        together.wait(120)


def shard(path: str, k: int) -> int:
    """Writes a shard unless it is there; the bytes are this process's own, as a GPU's may be."""
    if exists(path):
        return 0
    if k == 3:
        pause()
    put(path, f"{k} {os.getpid()}".encode())
    return 1


def data(config, inputs, out):
    made = parallel_map(shard, [(join(out.path, f"shard-{k}"), k) for k in range(5)], out=out, cluster=CPU, unit="shards")
    return {"made": made}


def evaluation(config, inputs, out):
    pause()
    put_json(join(out.path, "table.json"), {"seconds": time.monotonic(), "pid": os.getpid()})
    return {"pid": os.getpid()}


class PausedLM(TinyLM):
    def export(self):
        weights, config = super().export()
        pause()
        return weights, {**config, "pid": os.getpid()}


def training(config, inputs, out):
    return train(PausedLM, {"seed": 0}, settings(), inputs, out, cluster=CPU)


STEPS = [Step("data", data), Step("evaluation", evaluation),
         Step("training", training, {"train": settings()}, trains=settings())]


def run_all(store: str) -> list:
    """Artifacts or errors of the steps, each by a thread as the scheduler has them."""
    def one(step):
        try:
            return run_step(step, store, {}, inline=True, poll_s=0.2)
        except Exception as e:  # noqa: BLE001  the test looks at it
            return e

    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(one, STEPS))


def digests(store: Path) -> dict[str, str]:
    """Of all files but those of each build's first attempt: its outputs, its record, its metrics."""
    files = [p for build in store.glob("*/*/0001") for p in build.rglob("*") if p.is_file()
             and p.relative_to(build).parts[0] not in ("0001", "metrics-0001.jsonl") and p.name != "0001.json"]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_a_suspended_driver_that_wakes_up_changes_nothing_of_the_finished_steps(tmp_path, monkeypatch):
    store = str(tmp_path)
    first = subprocess.Popen([sys.executable, "-m", "tests.dag.test_suspended", store], cwd=ROOT, text=True,
                             env={**os.environ, "SUSPENDED": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 240
        while psutil.Process(first.pid).status() != psutil.STATUS_STOPPED:
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        monkeypatch.setattr(lease, "LEASE_S", 1.0)
        finished = run_all(store)
        facts = [a.facts for a in finished]
        assert facts[0]["made"] == [0, 0, 0, 1, 1] and facts[1]["pid"] == os.getpid()  # whole shards are taken over
        assert get(join(finished[0].path, "shard-0")) == f"0 {first.pid}".encode()
        config = join(finished[2].path, "export", "config.json")
        assert get_json(config)["pid"] == os.getpid()
        before = digests(tmp_path)
        assert {"done.json", "table.json", "shard-4", "model.safetensors"} <= {Path(n).name for n in before}

        first.send_signal(signal.SIGCONT)
        said, _ = first.communicate(timeout=240)
        assert first.returncode == 1
        lines = [line for line in said.splitlines() if "taken over" in line]
        assert len(lines) == 3 == said.count("error: ") == said.count("attempt 1 was taken over by"), said
        assert "Traceback" not in said
        assert digests(tmp_path) == before
    finally:
        first.kill()
        first.wait()
    assert [a.path for a in run_all(store)] == [a.path for a in finished]
    assert all(a.path == f"{build_of(a.path)}/0002" for a in finished)


def _child(store: str) -> int:
    for e in run_all(store):
        print(f"error: {e}", flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(run_command(lambda: _child(sys.argv[1])))
