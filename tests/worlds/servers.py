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
import threading
import time
import urllib.request
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.worlds.basics import free_port

START_S = 240.0  # a server starts in seconds, on a busy machine in minutes
# For every process of a test's own Ray cluster: a token nobody else has, and (the last, on Linux too) loopback alone.
CLOSED = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


AWS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": ""}


@contextlib.contextmanager
def seaweedfs(folder: Path):
    """A server with its data in `folder` and one bucket, `tests`."""
    import s3fs

    keys = {"name": "test", "credentials": [{"accessKey": "key", "secretKey": "secret"}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [keys]}))
    keep, server, deadline = {k: os.environ.get(k) for k in AWS}, None, time.monotonic() + START_S
    try:
        while not server or server.poll() is not None:  # it ends where another process took one of its ports meanwhile
            assert time.monotonic() < deadline, "the S3 server ends when it is started"
            server, url = _weed(folder)
            os.environ.update(AWS | {"AWS_ENDPOINT_URL": url})
            s3fs.S3FileSystem.clear_instance_cache()
            _make_bucket(server, deadline)
        yield url
    finally:
        server.kill()
        server.wait()
        s3fs.S3FileSystem.clear_instance_cache()
        for key, value in keep.items():
            os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)


def _weed(folder: Path) -> tuple[subprocess.Popen, str]:
    """A starting server and its URL."""
    ports = {name: free_port() for name in ("s3", "master", "volume", "filer")}
    return subprocess.Popen(
        [f"{sysconfig.get_path('scripts')}/weed", "server", "-s3", f"-dir={folder}", "-ip=127.0.0.1",
         f"-s3.config={folder / 's3.json'}", "-volume.max=100", "-master.volumeSizeLimitMB=64",
         "-s3.port.iceberg=0", "-s3.port.lance=0",  # else fixed ports, and so one server a machine
         *(f"-{name}.port={port}" for name, port in ports.items()),
         *(f"-{name}.port.grpc={free_port()}" for name in ports)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), f"http://127.0.0.1:{ports['s3']}"


def _make_bucket(server: subprocess.Popen, deadline: float) -> None:
    """Waits for a server, or for its end, and makes the bucket."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    while server.poll() is None:
        try:
            boto3.client("s3").create_bucket(Bucket="tests")
            return
        except (BotoCoreError, ClientError):
            assert time.monotonic() < deadline, "the S3 server did not come up"
            time.sleep(0.3)


class FaultyS3:
    """A proxy before a real S3 server that plants faults; an S3 client reaches it at `url`.

    `fault(method, path, headers)` names each request's fault, or None: "lose" passes the request on and drops the answer,
    "reset" drops both, "cut" sends half the answer, "hang" holds the request until `released` is set and drops it then, a
    status such as "503" is answered.
    """

    def __init__(self, upstream: str):
        self.fault: Callable[[str, str, dict], str | None] = lambda method, path, headers: None
        self.upstream, self.released = upstream.removeprefix("http://"), threading.Event()
        self.planted: list[tuple[str, str, str]] = []  # (fault, method, path)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(self):
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self):
                headers = dict(self.headers)
                fault = proxy.fault(self.command, self.path, headers)
                if fault:
                    proxy.planted.append((fault, self.command, self.path))
                if fault == "hang":  # the body stays unread: a client that sends a large one is stuck within it
                    proxy.released.wait()
                if fault in ("reset", "hang"):
                    self.close_connection = True
                    return
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                try:
                    status, answered, data = (int(fault), [], b"") if fault and fault.isdigit() else proxy.ask(self, body)
                except (OSError, HTTPException):
                    status, answered, data = 503, [], b""
                if fault == "lose":
                    self.close_connection = True
                    return
                self.send_response_only(status)
                for name, value in answered:
                    if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                        self.send_header(name, value)
                length = dict(answered).get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
                self.send_header("Content-Length", length)
                self.end_headers()
                self.wfile.write(data[:len(data) // 2] if fault == "cut" else data)
                self.close_connection = self.close_connection or fault == "cut"

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

            def log_message(self, *args):
                pass

        return Handler

    def ask(self, request, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """The real server's answer; the host's name stays, as it is part of the signature."""
        upstream = HTTPConnection(self.upstream, timeout=60)
        try:
            headers = {k: v for k, v in request.headers.items() if k.lower() != "expect"}
            upstream.request(request.command, request.path, body, headers)
            answer = upstream.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            upstream.close()


@contextlib.contextmanager
def faulty_s3(upstream: str):
    """A FaultyS3 that the environment's S3 clients talk to while the block runs."""
    import s3fs

    proxy, before = FaultyS3(upstream), os.environ["AWS_ENDPOINT_URL"]
    os.environ["AWS_ENDPOINT_URL"] = proxy.url
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        yield proxy
    finally:
        proxy.close()
        os.environ["AWS_ENDPOINT_URL"] = before
        s3fs.S3FileSystem.clear_instance_cache()


class MLflowServer:
    """An `mlflow server` that a test starts, stops for a while and kills; its rows are in `backend`, by default SQLite."""

    def __init__(self, folder: Path, backend: str | None = None, artifacts: str | None = None):
        self.backend, self.artifacts = backend or f"sqlite:///{folder}/mlflow.db", artifacts or str(folder / "artifacts")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.process = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--artifacts-destination", self.artifacts, "--host", "127.0.0.1",
             "--port", str(self.port), "--workers", "1"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_BACKEND_STORE_URI": self.backend,
                 "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})  # else eight more processes, for jobs that nobody asks for
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
