"""What dead attempts leave: files aside, unfinished uploads and checkpoints without a commit; the living keep theirs."""

from __future__ import annotations

import os

import pytest

from audiolm.dag import execute
from audiolm.dag.execute import StepFailed
from audiolm.store import exists, is_local, join, open_fs, put_json
from audiolm.train import commits
from tests.worlds.training import build, training_step

ASIDE = f"export/model.safetensors.{'0f' * 16}.tmp"


def begin(folder):
    """A write that its writer did not finish."""
    fs, p = open_fs(join(folder, ASIDE))
    if is_local(folder):
        os.makedirs(os.path.dirname(p), exist_ok=True)
        with open(p, "w") as f:
            f.write("part")
    else:
        bucket, key, _ = fs.split_path(p)
        fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)


def begun(folder):
    fs, p = open_fs(folder)
    if is_local(folder):
        return os.path.exists(f"{p}/{ASIDE}")
    bucket, key, _ = fs.split_path(p)
    return bool(fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key).get("Uploads"))


def there(checkpoints, folder):
    return exists(join(checkpoints, folder, "model.safetensors"))


def test_the_surely_dead_goes_and_all_else_stays(store, monkeypatch):
    path, other = join(training_step().root(store), "0001"), join(store, "other", "0001")
    checkpoints = join(path, "checkpoints")
    with pytest.raises(StepFailed, match="planted at step 8"):
        build(training_step(fail_at=8), store)
    for folder in (path, other):
        begin(folder)
    for attempt in (1, 4):  # of a dead attempt, and of one that is still to come
        put_json(join(checkpoints, f"00000007-{attempt:04d}", "model.safetensors"), {})
    committed = [c["folder"] for c in commits.commits(path) if not c.get("pruned")]

    with pytest.raises(StepFailed, match="planted at step 8"):  # the first attempt may still be writing
        build(training_step(fail_at=8), store)
    assert begun(path) and begun(other) and there(checkpoints, "00000007-0001")

    for module in (execute, commits):
        monkeypatch.setattr(module, "QUIET_S", -2.0)  # whole seconds on some stores
    with pytest.raises(StepFailed, match="planted at step 8"):
        build(training_step(fail_at=8), store)
    assert not begun(path) and begun(other)
    assert not there(checkpoints, "00000007-0001") and all(there(checkpoints, f) for f in ["00000007-0004", *committed])
    assert build(training_step(), store).facts["steps"] == 12
