"""A training whose newest checkpoint is damaged goes on from the one before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from audiolm.dag.execute import StepFailed
from audiolm.metrics_log import read_build
from audiolm.store import get, join
from audiolm.tokenizers.artifact import ArtifactError
from audiolm.train import checkpoint
from audiolm.train.commits import commits, newest
from tests.worlds.training import build, training_step


def losses(artifact):
    return {r["step"]: r["metrics"]["loss"] for r in read_build(artifact.folder) if "loss" in r["metrics"]}


def spoil(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "lost":
        path.unlink()
        return
    data[len(data) // 2] ^= 1
    path.write_bytes(data[:-100] if how == "cut" else data)


@pytest.mark.parametrize("how", ["flipped", "cut", "lost"])
def test_the_one_before_it_is_taken_with_a_remark_and_the_result_is_the_same(tmp_path, how, caplog):
    whole = build(training_step(), str(tmp_path / "a"))
    with pytest.raises(StepFailed, match="planted at step 8"):
        build(training_step(fail_at=8), str(tmp_path / "b"))
    folder = join(training_step().root(str(tmp_path / "b")), "0001")
    commit = newest(folder)
    older = [c["step"] for c in commits(folder) if not c.get("pruned")][-2]
    file = Path(folder, "checkpoints", commit["folder"], "model.safetensors")
    spoil(file, how)
    if how != "lost":
        with pytest.raises(ArtifactError, match=f"{file} is damaged"):
            checkpoint.load(folder, commit, "model")
    resumed = build(training_step(), str(tmp_path / "b"))
    (note,) = resumed.facts["notes"]
    assert f"step {commit['step']} is damaged ({file})" in note and note in caplog.text
    assert older + 1 in losses(resumed)  # the first step of an attempt is logged
    ours, theirs = losses(resumed), losses(whole)
    assert {step: ours[step] for step in theirs} == theirs
    assert get(join(resumed.path, "export", "model.safetensors")) == get(join(whole.path, "export", "model.safetensors"))
