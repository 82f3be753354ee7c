"""The GPU command: all parts at tiny size on a CPU, what becomes of parts that go wrong, and training that travels."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from audiolm.config.load import load_config
from audiolm.dag.execute import execute
from audiolm.dag.plan import plan
from audiolm.dag.step import Status
from tests.bench.gpu_parts import published, worker
from tests.bench.gpu_parts.report import Report
from tests.worlds.basics import ROOT
from workflows.full_pipeline import graph

E2E = "tests/e2e.yaml"


def run(*command, **more):
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=550, **more)


def test_all_parts_at_tiny_size(tmp_path):
    store, out, steps = tmp_path / "store", tmp_path / "out", graph(load_config(str(ROOT / E2E)))
    execute(plan(steps, str(store), only=("manifest",)), str(store), inline=True)
    done = run("tests/bench/gpu.py", "--tiny", "--device", "cpu", "--minutes", "8", "--out", out, "--config", E2E,
               f"store={store}", "--train", "codec")
    found = json.loads((out / "gpu.json").read_text())
    assert done.returncode == 0, done.stdout + (out / "gpu.log").read_text()[-3000:]
    assert {i["part"] for i in found["items"]} == set("abcde")
    assert all(i["status"] == "done" and i["figures"] for i in found["items"])
    figures = {f["name"]: f for i in found["items"] for f in i["figures"]}
    assert figures["equal ids of a graph, flat"]["least"] == 1.0
    assert figures["codec: steps in all"]["value"] == 12
    assert all(name in figures for name in ("train semantic, deepspeed", "train parallel, torch", "encode HuBERT-base"))
    assert (out / "gpu.md").read_text() in done.stdout
    # Elsewhere the pieces are the finished step.
    other = tmp_path / "other"
    shutil.copytree(store / "manifest", other / "manifest")
    run("tests/bench/gpu.py", "--unpack", out, "--store", other, check=True)
    (codec,) = (row for row in plan(steps, str(other), only=("codec",)) if row.step.name == "codec")
    assert not codec.run and codec.state.status is Status.DONE


def test_a_part_that_goes_wrong_is_reported_and_the_next_item_runs(tmp_path, monkeypatch):
    report = Report(tmp_path, {"device": "none"}, compared=True)

    def monotonic():  # the time is over as soon as the item that hangs has begun
        return time.monotonic() + 1000 * any(item["name"] == "hangs" for item in report.items)

    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=monotonic, sleep=time.sleep))
    worker.watch("tests.worlds.gpu.faults", "cpu", True, report, "x", 500, tmp_path / "gpu.log")
    items = {i["name"]: i for i in json.loads((tmp_path / "gpu.json").read_text())["items"]}
    assert {name: item["status"] for name, item in items.items()} == {
        "raises": "failed", "wrong": "wrong", "dies": "failed", "good": "done", "hangs": "out of time",
        "the rest of tests.worlds.gpu.faults": "out of time"}
    assert items["raises"]["error"] == "ValueError: planted" and items["raises"]["figures"][0]["value"] == 2.0
    assert items["wrong"]["error"] == "beyond its bound: beyond, no number" and "status 3" in items["dies"]["error"]
    assert "| x | train semantic, torch | 700,000 tokens/s | 350,000 | 396,000 | 1.77 |" in (tmp_path / "gpu.md").read_text()
    assert not report.good


def test_pieces_are_small_whole_and_the_newest_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "PIECE", 1000)
    build = tmp_path / "store" / "codec" / "abc" / "0001"
    for step in (1, 2, 3):
        for path, data in ((f"checkpoints/{step:08d}-0001/export/model.safetensors", b"w" * 700),
                           (f"checkpoints/{step:08d}-0001/codec.safetensors", b"m" * 700),
                           (f"commits/{step:08d}.json",
                            json.dumps({"step": step, "folder": f"{step:08d}-0001", "best_step": 2}).encode())):
            (build / path).parent.mkdir(parents=True, exist_ok=True)
            (build / path).write_bytes(data)
    (build.parent / "recipe.json").write_text("{}")
    (tmp_path / "store.tar.99").write_bytes(b"older")
    assert published.pack(tmp_path / "store", ["codec", "lm_coarse"], tmp_path) > 5
    pieces = sorted(tmp_path.glob("store.tar.*"))
    assert all(p.stat().st_size <= 1000 for p in pieces) and tmp_path / "store.tar.99" not in pieces
    published.unpack(tmp_path, tmp_path / "other")
    there = {str(p.relative_to(tmp_path / "other" / "codec" / "abc")) for p in (tmp_path / "other").rglob("*") if p.is_file()}
    assert there == {"recipe.json", *(f"0001/commits/0000000{n}.json" for n in (1, 2, 3)),
                     "0001/checkpoints/00000002-0001/export/model.safetensors",
                     "0001/checkpoints/00000003-0001/export/model.safetensors",
                     "0001/checkpoints/00000003-0001/codec.safetensors"}
    pieces[1].write_bytes(b"torn")
    with pytest.raises(ValueError, match="copy all pieces again"):
        published.unpack(tmp_path, tmp_path / "third")
    assert not (tmp_path / "third").exists()
