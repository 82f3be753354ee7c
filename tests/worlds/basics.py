"""Shared fixtures: stores on a local disk and on a real S3 server, and where the optional speech data lie."""

from __future__ import annotations

import socket
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class RecordingOut:
    """What a step function sees, without a driver: for tests that call one."""

    name = "step"

    name = "step"

    def __init__(self, path):
        self.path, self.inline, self.forced, self.attempt = str(path), True, False, 1
        self.logged, self.seen, self.siblings = [], [], []
        self.metrics_path = f"{path}/metrics-0001.jsonl"

    def check(self):
        pass

    def log(self, step, metrics):
        self.logged.append((step, metrics))

    def progress(self, done, total, unit, note=""):
        self.seen.append((done, total, unit))
