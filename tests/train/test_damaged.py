"""A training whose newest checkpoint is damaged goes on from the one before it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from audiolm.dag.execute import StepFailed
from audiolm.dag.plan import plan
from audiolm.metrics_log import read_build
from audiolm.pipeline.cli import table
from audiolm.store import get, join
from audiolm.tokenizers.artifact import ArtifactError
from audiolm.train import checkpoint
from audiolm.train import commits as train_commits
from audiolm.train.commits import commits, newest, path_of, steps_kept
from tests.worlds.training import build, training_step


def losses(artifact):
    return {r["step"]: r["metrics"]["loss"] for r in read_build(artifact.folder) if "loss" in r["metrics"]}


def spoil(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how in ("lost", "folder"):
        path.unlink()
        if how == "folder":
            path.mkdir()
        return
    data[len(data) // 2] ^= 1
    path.write_bytes({"cut": data[:-100], "half": data[:len(data) // 2], "empty": b"",
                      "zeros": bytes(len(data))}.get(how, data))


@pytest.mark.parametrize("how", ["flipped", "cut", "half", "empty", "zeros", "lost", "folder"])
def test_the_one_before_it_is_taken_with_a_remark_and_the_result_is_the_same(tmp_path, how, caplog):
    whole = build(training_step(), str(tmp_path / "a"))
    with pytest.raises(StepFailed, match="planted at step 8"):
        build(training_step(fail_at=8), str(tmp_path / "b"))
    folder = join(training_step().root(str(tmp_path / "b")), "0001")
    commit = newest(folder)
    older = [c["step"] for c in commits(folder) if not c.get("pruned")][-2]
    file = Path(folder, "checkpoints", commit["folder"], "model.safetensors")
    spoil(file, how)
    if how not in ("lost", "folder"):
        with pytest.raises(ArtifactError, match=f"{file} is damaged"):
            checkpoint.load(folder, commit, "model")
    resumed = build(training_step(), str(tmp_path / "b"))
    (note,) = resumed.facts["notes"]
    assert f"step {commit['step']} is damaged ({file})" in note and note in caplog.text
    assert older + 1 in losses(resumed)  # the first step of an attempt is logged
    ours, theirs = losses(resumed), losses(whole)
    assert {step: ours[step] for step in theirs} == theirs
    assert get(join(resumed.path, "export", "model.safetensors")) == get(join(whole.path, "export", "model.safetensors"))


def stopped(store: str, **changes) -> str:
    """The build's folder of a run that was stopped at step 7, behind checkpoints of steps 3, 5 and 6."""
    with pytest.raises(StepFailed, match="planted at step 7"):
        build(training_step(fail_at=7, keep=9, **changes), store)
    folder = join(training_step(keep=9, **changes).root(store), "0001")
    assert [c["step"] for c in commits(folder)] == [3, 5, 6]
    return folder


@pytest.mark.parametrize("how", ["empty", "half", "zeros"])
def test_a_commit_that_the_disk_has_cut_off_counts_as_none(tmp_path, how, capsys):
    """The plan reads it too, and the step's next commit has its name."""
    whole = build(training_step(keep=9), str(tmp_path / "a"))
    folder = stopped(str(tmp_path / "b"))
    spoil(Path(path_of(folder, 6)), how)
    (row,) = plan([training_step(keep=9)], str(tmp_path / "b"))
    assert "goes on from step 5" in table([row], run=True) and steps_kept(folder) == 5
    resumed = build(training_step(keep=9), str(tmp_path / "b"))
    (note,) = resumed.facts["notes"]
    assert note == f"the checkpoint of step 6 is damaged ({path_of(folder, 6)}): went on from step 5, the newest whole one"
    assert get(join(resumed.path, "export", "model.safetensors")) == get(join(whole.path, "export", "model.safetensors"))
    assert [c["step"] for c in commits(folder)][:3] == [3, 5, 6]


def test_with_no_other_it_begins_anew_and_names_each(tmp_path):
    whole = build(training_step(keep=9), str(tmp_path / "a"))
    folder = stopped(str(tmp_path / "b"))
    for path in Path(folder, "checkpoints").glob("*/*.safetensors"):
        spoil(path, "cut")
    resumed = build(training_step(keep=9), str(tmp_path / "b"))
    assert len(resumed.facts["notes"]) == 3 and all("went on from the start" in n for n in resumed.facts["notes"])
    assert get(join(resumed.path, "export", "model.safetensors")) == get(join(whole.path, "export", "model.safetensors"))


@pytest.mark.parametrize("export", ["best", "last"])
def test_the_best_is_looked_at_where_a_run_ends_with_it(tmp_path, export):
    """Else a whole training ends with an error about the checkpoint that it was for."""
    folder = stopped(str(tmp_path), export=export)
    commit = newest(folder)
    assert (commit["step"], commit["best_step"]) == (6, 5)
    file = Path(folder, "checkpoints", commits(folder)[1]["folder"], "model.safetensors")
    spoil(file, "cut")
    resumed = build(training_step(keep=9, export=export), str(tmp_path))
    notes = resumed.facts.get("notes", [])
    assert notes == ([f"the checkpoint of step {n} is damaged ({file}): went on from step 3, the newest whole one"
                      for n in (6, 5)] if export == "best" else [])
    assert resumed.facts["steps"] == 12


def test_what_a_disk_cannot_read_is_damaged_and_a_store_that_is_away_is_not(tmp_path, monkeypatch):
    folder = stopped(str(tmp_path))
    read = train_commits.sha256

    def failing(number):
        def digest(path):
            if "00000006" in path:
                raise OSError(number, os.strerror(number), path)
            return read(path)

        monkeypatch.setattr(train_commits, "sha256", digest)

    failing(errno.ENETUNREACH)
    with pytest.raises(OSError, match="unreachable"):
        train_commits.drop_damaged(folder)
    assert newest(folder)["step"] == 6
    failing(errno.EIO)
    assert len(train_commits.drop_damaged(folder)) == 1 and newest(folder)["step"] == 5


def test_a_longer_run_begins_from_a_whole_checkpoint_of_the_shorter_one(tmp_path):
    short = build(training_step(keep=9), str(tmp_path))
    shared = [c for c in commits(short.folder) if "trunk" in c]
    spoil(Path(short.folder, "checkpoints", shared[-1]["folder"], "model.safetensors"), "cut")
    long = build(training_step(steps=15, keep=9), str(tmp_path))
    assert "notes" not in long.facts and commits(long.folder)[1]["step"] == shared[-2]["step"]  # behind its best
    again = build(training_step(steps=15, keep=9), str(tmp_path / "anew"))
    assert get(join(long.path, "export", "model.safetensors")) == get(join(again.path, "export", "model.safetensors"))
