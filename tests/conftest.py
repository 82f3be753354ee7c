"""Shared fixtures: stores on a local disk and on a real S3 server, and where the optional speech data lie."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)  # small products on busy cores are far slower on two
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# For every process of a test's own Ray cluster: a token nobody else has, and (the last, on Linux too) loopback alone.
CLOSED = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """SeaweedFS, a real S3 server whose conditional writes are atomic; its endpoint and keys stand in the environment."""
    with seaweedfs(tmp_path_factory.mktemp("s3")) as url:
        yield url


@contextlib.contextmanager
def seaweedfs(folder: Path):
    """A server with its data in `folder` and one bucket, `tests`."""
    import boto3
    import s3fs
    from botocore.exceptions import BotoCoreError, ClientError

    keys = {"name": "test", "credentials": [{"accessKey": "key", "secretKey": "secret"}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [keys]}))
    ports = {name: free_port() for name in ("s3", "master", "volume", "filer")}
    server = subprocess.Popen(
        [f"{sysconfig.get_path('scripts')}/weed", "server", "-s3", f"-dir={folder}", "-ip=127.0.0.1",
         f"-s3.config={folder / 's3.json'}", "-volume.max=100", "-master.volumeSizeLimitMB=64",
         "-s3.port.iceberg=0", "-s3.port.lance=0",  # else fixed ports, and so one server a machine
         *(f"-{name}.port={port}" for name, port in ports.items()),
         *(f"-{name}.port.grpc={free_port()}" for name in ports)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{ports['s3']}"
    settings = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_ENDPOINT_URL": url,
                "AWS_DEFAULT_REGION": "us-east-1"}
    keep = {k: os.environ.get(k) for k in settings}
    os.environ.update(settings)
    s3fs.S3FileSystem.clear_instance_cache()
    deadline = time.monotonic() + 60
    while True:
        try:
            boto3.client("s3").create_bucket(Bucket="tests")
            break
        except (BotoCoreError, ClientError):
            assert time.monotonic() < deadline and server.poll() is None, "the S3 server did not come up"
            time.sleep(0.3)
    yield url
    server.kill()
    server.wait()
    s3fs.S3FileSystem.clear_instance_cache()
    for key, value in keep.items():
        os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path):
    """A store URI, on a local disk and on S3 in turn."""
    if request.param == "local":
        return str(tmp_path / "store")
    request.getfixturevalue("s3_server")
    return f"s3://tests/{tmp_path.name}-{time.time_ns()}"


class RecordingOut:
    """What a step function sees, without a driver: for tests that call one."""

    class step:  # noqa: N801
        name = "step"

    def __init__(self, path):
        self.path, self.inline, self.forced, self.attempt = str(path), True, False, 1
        self.logged, self.seen, self.kin = [], [], []
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


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> str:
    """A codec build of the smallest width."""
    from tests.tiny_codec import built_codec

    return built_codec(str(tmp_path_factory.mktemp("codec")))


@pytest.fixture(scope="session")
def codec(built):
    """Its tokenizer."""
    from audiolm.tokenizers.acoustic import load_codec

    return load_codec(built)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory) -> Path:
    """MLflow takes seconds to lay out a database: once, then copied."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def ready(tmp_path, empty_database) -> Path:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return tmp_path
