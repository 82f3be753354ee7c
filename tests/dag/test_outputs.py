"""Outputs of attempts: taken over whole, sealed, compared, taken back."""

from __future__ import annotations

import pytest

from audiolm.dag.execute import StepFailed, execute
from audiolm.dag.outputs import damaged, take_back
from audiolm.dag.plan import plan
from audiolm.dag.step import Status, Step
from audiolm.store import get, get_json, join, names, put, remove

N = 4


def shards(config, inputs, out):
    """Writes shards that are not there, and a table; fails before shard `fail_at`."""
    there, made = names(out.path), []
    for k in range(N):
        if k == FAIL["at"]:
            raise ValueError("planted")
        if f"shard-{k}" not in there:
            put(join(out.path, f"shard-{k}"), f"{k} of attempt {out.attempt}".encode())
            made.append(k)
    put(join(out.path, "ui", "table"), f"attempt {out.attempt}".encode())
    return {"made": made}


FAIL = {"at": None}


def go(store, **more):
    step = Step("shards", shards, **more)
    execute(plan([step], store), store, inline=True)
    return plan([step], store)[0].state.artifact


@pytest.fixture(autouse=True)
def _whole():
    FAIL["at"] = None


def test_a_failed_attempts_whole_files_are_taken_over_and_its_folder_goes(store):
    for at in (2, 3):
        FAIL["at"] = at
        with pytest.raises(StepFailed, match="planted"):
            go(store)
    FAIL["at"] = None
    artifact = go(store)
    assert artifact.facts["made"] == [3] and artifact.path == join(artifact.folder, "0003")
    assert [get(join(artifact.path, f"shard-{k}"))[-1:] for k in range(N)] == [b"1", b"1", b"2", b"3"]
    assert [n for n in names(artifact.folder) if n.isdigit()] == ["0003"]
    assert get_json(join(artifact.folder, "done.json"))["attempt"] == 3


@pytest.mark.parametrize(("spoiled", "made"), [("shard-1", [1]), ("ui/table", [0, 1, 2, 3]), ("files.json", [])])
@pytest.mark.parametrize("how", ["flipped", "cut", "lost"])
def test_what_is_damaged_is_named_and_made_again(store, spoiled, made, how):
    artifact = go(store, part="shard-")
    assert damaged(artifact.path) == []
    path = join(artifact.path, spoiled)
    data = get(path)
    remove(path)
    if how != "lost":
        put(path, data[:-1] if how == "cut" else bytes([data[0] ^ 1, *data[1:]]))
    assert damaged(artifact.path) == [spoiled]
    take_back(artifact.path, [spoiled], "shard-")
    assert plan([Step("shards", shards)], store)[0].state.status is Status.LOST
    again = go(store, part="shard-")
    assert again.facts["made"] == made and again.build == artifact.build and damaged(again.path) == []


def test_what_was_made_of_a_repaired_build_stays_done(store):
    first = Step("shards", shards)
    steps = [first, Step("after", lambda config, inputs, out: {"from": inputs["shards"].path}, {}, (first,))]
    execute(plan(steps, store), store, inline=True)
    take_back(plan(steps, store)[0].state.artifact.path, ["ui/table"], "")
    assert [r.run for r in plan(steps, store)] == [True, False]
    execute(plan(steps, store), store, inline=True)
    assert [r.run for r in plan(steps, store)] == [False, False]
