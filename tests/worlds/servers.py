"""Real servers for tests: S3 (SeaweedFS), MLflow, and the settings of a closed Ray cluster."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path

from tests.worlds.basics import free_port

START_S = 240.0  # a server starts in seconds, on a busy machine in minutes
# For every process of a test's own Ray cluster: a token nobody else has, and (the last, on Linux too) loopback alone.
CLOSED = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


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
    deadline = time.monotonic() + START_S
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


class MLflowServer:
    """An `mlflow server` that a test starts, stops for a while and kills."""

    def __init__(self, folder: Path):
        self.folder = folder
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.process = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
             "--artifacts-destination", str(self.folder / "artifacts"), "--host", "127.0.0.1", "--port", str(self.port),
             "--workers", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"})
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=1)
                return
            except OSError:
                assert self.process.poll() is None, "the server ended"
                time.sleep(0.1)
        raise AssertionError("the server did not come up")

    def freeze(self, frozen: bool):
        os.killpg(self.process.pid, signal.SIGSTOP if frozen else signal.SIGCONT)

    def kill(self):
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, 9)
            self.process.wait()
