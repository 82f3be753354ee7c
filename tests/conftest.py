"""Shared fixtures: stores on a local disk and on a real S3 server, and where the optional speech data lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)  # small products on busy cores are far slower on two
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="session")
def s3_server():
    """A real S3 server for the session (moto): its endpoint is in the environment while tests run."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keep = {k: os.environ.get(k) for k in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL",
                                           "AWS_DEFAULT_REGION")}
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test",
                      AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}", AWS_DEFAULT_REGION="us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    yield f"http://127.0.0.1:{port}"
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()
    for key, value in keep.items():
        os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path):
    """A store URI, on a local disk and on S3 in turn."""
    if request.param == "local":
        return str(tmp_path / "store")
    request.getfixturevalue("s3_server")
    import s3fs

    bucket = f"b{abs(hash(str(tmp_path)))}"
    s3fs.S3FileSystem().mkdir(bucket)
    return f"s3://{bucket}/store"


class RecordingOut:
    """What a step function sees, without a driver: for tests that call one."""

    class step:  # noqa: N801
        name = "step"

    def __init__(self, path):
        self.path, self.inline, self.attempt, self.logged, self.seen = str(path), True, 1, [], []
        self.metrics_path = f"{path}/metrics-0001.jsonl"

    def check(self):
        pass

    def log(self, step, metrics):
        self.logged.append((step, metrics))

    def progress(self, done, total, unit, note=""):
        self.seen.append((done, total, unit))


@pytest.fixture
def recording_out(tmp_path):
    return RecordingOut(tmp_path / "out")
