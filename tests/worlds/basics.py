"""Parts that many tests need: the checkout, a free port, the context of a step without its driver."""

from __future__ import annotations

import socket
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEADER = "#file onset offset #phone prev-phone next-phone speaker\n"  # the first line of an ABX item file


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class RecordingOut:
    """A step's context without a driver, for tests that call a step function: it records metrics and progress."""

    name = "step"

    def __init__(self, path):
        self.path, self.inline, self.forced, self.attempt = str(path), True, False, 1
        self.build = str(path)
        self.logged, self.seen, self.siblings = [], [], []
        self.metrics_path = f"{path}/metrics-0001.jsonl"

    def check(self):
        pass

    def log(self, step, metrics):
        self.logged.append((step, metrics))

    def progress(self, done, total, unit, note=""):
        self.seen.append((done, total, unit))
