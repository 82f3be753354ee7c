"""Part (e): training steps of a pipeline from their newest checkpoints, saved every minute in pieces that travel.

Pieces are one tar, cut; pieces.json has their digests.  It holds the steps' builds: of checkpoints the newest one and the
export of the best, which is what the same step needs to go on elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from audiolm.config.load import load_config
from audiolm.train.commits import commits
from tests.bench.figures import Figure
from tests.bench.gpu_parts.report import Report

ROOT = Path(__file__).resolve().parents[3]
PIECE = 15 * 2**20  # bytes; what comes back from a lent machine is files below 16 MB
SAVE_S = 60.0


def train(config: str | None, overrides: list[str], steps: str, report: Report, deadline: float, log: Path) -> None:
    """Runs each step for its share of the time that is left, and keeps its pieces in the report's folder."""
    names = [name for name in steps.split(",") if name]
    if not config or not names:
        report.begin("e", "training of a pipeline")
        return report.end("skipped", 0.0, "no --config and --train say what to train")
    store = Path(load_config(config, overrides).store).absolute()
    for i, name in enumerate(names):
        seconds = (deadline - time.monotonic()) / (len(names) - i)
        report.begin("e", f"training of {name}")
        began = time.monotonic()
        if seconds < 1:
            report.end("out of time", 0.0)
            continue
        before = _newest(store, name)
        status = _run(config, overrides, name, seconds, log, lambda: pack(store, names, report.out))
        pack(store, names, report.out)
        after = _newest(store, name)
        for figure in _figures(name, before, after):
            report.figure(figure)
        # killed at the end of its time, which is how an unfinished training ends here
        good = status == 0 or (status is None and after != before)
        why = f"status {status}, see {log.name}" if status else "no checkpoint in its time: lower train.save_every"
        report.end("done" if good else "failed", time.monotonic() - began, None if good else why)


def _run(config: str, overrides: list[str], step: str, seconds: float, log: Path, save) -> int | None:
    """The exit status of one step of the pipeline, None where its time ended first; `save` is called every minute."""
    command = [sys.executable, str(ROOT / "workflows" / "full_pipeline.py"), config, *overrides, "tracking=none", "--inline",
               "--only", step]
    over = threading.Event()

    def keep() -> None:
        while not over.wait(SAVE_S):
            save()

    saver = threading.Thread(target=keep)
    with log.open("ab") as out:
        child = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT)
        saver.start()
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            child.kill()
            child.wait()
            over.set()
            saver.join()


def _newest(store: Path, step: str) -> dict | None:
    """The furthest commit of a step, over its builds."""
    found = [json.loads(path.read_text()) for path in store.glob(f"{step}/*/*/commits/*.json")]
    return max(found, key=lambda commit: commit["step"], default=None)


def _figures(name: str, before: dict | None, after: dict | None) -> Iterator[Figure]:
    if after:
        yield Figure(f"{name}: steps in all", after["step"], "steps")
        yield Figure(f"{name}: steps now", after["step"] - (before["step"] if before else 0), "steps")
        if "loss" in after.get("validation", {}):
            yield Figure(f"{name}: validation loss", after["validation"]["loss"], "")


def pack(store: Path, steps: list[str], out: Path) -> int:
    """Writes pieces of the steps' builds into `out` in place of older ones; returns how many."""
    with tempfile.TemporaryFile() as whole:
        with tarfile.open(fileobj=whole, mode="w") as tar:
            for path in _kept(store, steps):
                try:
                    tar.add(path, path.relative_to(store))
                except FileNotFoundError:  # a checkpoint that the training has just replaced
                    continue
        whole.seek(0)
        pieces = []
        while data := whole.read(PIECE):
            name = f"store.tar.{len(pieces):02d}"
            (out / f"{name}.tmp").write_bytes(data)
            os.replace(out / f"{name}.tmp", out / name)
            pieces.append({"name": name, "sha256": hashlib.sha256(data).hexdigest()})
    (out / "pieces.json").write_text(json.dumps(pieces, indent=1))
    for extra in set(out.glob("store.tar.*")) - {out / piece["name"] for piece in pieces}:
        extra.unlink()
    return len(pieces)


def _kept(store: Path, steps: list[str]) -> Iterator[Path]:
    for build in sorted(path for step in steps for path in store.glob(f"{step}/*/*") if path.is_dir()):
        there = commits(str(build))
        newest, best = (there[-1]["folder"], there[-1].get("best_step")) if there else (None, None)
        best = next((c["folder"] for c in there if c["step"] == best), None)
        yield from sorted(build.parent.glob("*.json"))
        for path in sorted(p for p in build.rglob("*") if p.is_file()):
            inside = path.relative_to(build).parts
            if inside[0] != "checkpoints" or inside[1] == newest or inside[1:3] == (best, "export"):
                yield path


def unpack(pieces: str, store: str) -> int:
    """Writes the files of the pieces into a store; returns how many. Raises ValueError for pieces that are not whole."""
    folder = Path(pieces)
    with tempfile.TemporaryFile() as whole:
        for piece in json.loads((folder / "pieces.json").read_text()):
            data = (folder / piece["name"]).read_bytes()
            if hashlib.sha256(data).hexdigest() != piece["sha256"]:
                raise ValueError(f"{folder / piece['name']} is not the piece that pieces.json names: copy all pieces again")
            whole.write(data)
        whole.seek(0)
        with tarfile.open(fileobj=whole) as tar:
            tar.extractall(store, filter="data")
            return len(tar.getmembers())
