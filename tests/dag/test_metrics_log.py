"""Metrics files: whole lines, continued files, offsets, object stores."""

from __future__ import annotations

import json

import fsspec
import pytest

from audiolm import metrics_log, store
from audiolm.metrics_log import MetricsFile, read_build, read_from


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    if request.param == "local":
        yield str(tmp_path)
        return
    yield f"memory://{tmp_path.name}"
    fsspec.filesystem("memory").store.clear()


def test_rows_come_back_in_order_and_only_once(folder):
    path = f"{folder}/metrics-0001.jsonl"
    f = MetricsFile(path)
    f.add(1, {"loss": 2.5, "lr": 1})
    f.flush()
    rows, offset = read_from(path)
    assert [(r["step"], r["metrics"]) for r in rows] == [(1, {"loss": 2.5, "lr": 1.0})]
    assert rows[0]["time"] > 1e9
    assert read_from(path, offset) == ([], offset)
    f.add(2, {"loss": 2.0})
    f.close()
    rows, _ = read_from(path, offset)
    assert [r["step"] for r in rows] == [2]


def test_a_later_writer_continues_the_file(folder):
    path = f"{folder}/metrics-0001.jsonl"
    for step in (1, 2):
        f = MetricsFile(path)
        f.add(step, {"loss": step})
        f.close()
    assert [r["step"] for r in read_from(path)[0]] == [1, 2]


def test_a_half_line_is_never_returned_and_never_spoils_the_next(tmp_path):
    path = tmp_path / "metrics-0001.jsonl"
    whole = json.dumps({"step": 1, "time": 5.0, "metrics": {"a": 1.0}}) + "\n"
    path.write_text(whole + '{"step": 2, "ti')
    rows, offset = read_from(str(path))
    assert [r["step"] for r in rows] == [1] and offset == len(whole)
    f = MetricsFile(str(path))  # the first writer died in that line
    f.add(3, {"a": 3.0})
    f.close()
    assert [r["step"] for r in read_from(str(path), offset)[0]] == [3]


def test_a_missing_file_has_no_rows(folder):
    assert read_from(f"{folder}/metrics-0009.jsonl", 0) == ([], 0)


def test_bounded_reads_return_every_row_once(tmp_path):
    path = str(tmp_path / "metrics-0001.jsonl")
    f = MetricsFile(path)
    for i in range(50):
        f.add(i, {"loss": float(i)})
    f.close()
    seen, offset = [], 0
    while True:
        rows, after = read_from(path, offset, max_bytes=300)
        if after == offset:
            break
        seen += [r["step"] for r in rows]
        offset = after
    assert seen == list(range(50))


def test_an_object_store_is_not_rewritten_at_every_row(monkeypatch):
    puts = []
    monkeypatch.setattr(store, "put", lambda path, data: puts.append(data))
    now = [100.0]
    monkeypatch.setattr(metrics_log.time, "monotonic", lambda: now[0])
    f = MetricsFile("memory://b/metrics-0001.jsonl")
    for step in range(10):
        f.add(step, {"loss": 1.0})
        now[0] += 1.0
    assert puts == []
    now[0] += 10.0
    f.add(10, {"loss": 1.0})
    assert len(puts) == 1 and puts[0].count(b"\n") == 11
    f.flush()
    assert len(puts) == 1
    f.add(11, {"loss": 1.0})
    f.close()
    assert len(puts) == 2 and puts[1].count(b"\n") == 12


def test_a_build_reads_as_one_run_with_the_newest_attempt_ahead(folder):
    for attempt, steps in ((1, (10, 20, 30)), (2, (30, 40))):
        f = MetricsFile(f"{folder}/metrics-{attempt:04d}.jsonl")
        for s in steps:
            f.add(s, {"loss": s + attempt / 10})
        f.close()
    assert [(r["step"], r["metrics"]["loss"]) for r in read_build(folder)] == [(10, 10.1), (20, 20.1), (30, 30.2), (40, 40.2)]
