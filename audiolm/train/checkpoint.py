"""Canonical training checkpoints: safetensors by parameter name plus JSON, the same for every engine and world size.

`checkpoints/{step:08d}-{attempt:04d}/` holds one safetensors file a module; it counts once its commit is written (see
commits.py, which is apart from this file because a plan reads commits and must not import torch).  Where a module's weights
are the step's export they are in the folder's `export/`, as in a finished step's outputs: one copy serves resume and
inference, and inference reads no moments.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import safetensors.torch

from audiolm.dag.lease import LeaseLost, check_lease
from audiolm.store import get, join, put, put_json, remove
from audiolm.tokenizers.artifact import ArtifactError, write_export
from audiolm.train.commits import commits, folder_of, path_of
from audiolm.train.engine import Saved, is_weight

WEIGHTS = "export/model.safetensors"


def save(build: str, attempt: int, step: int, states: Mapping[str, Saved], record: dict,
         export: tuple[str, dict[str, Any]] | None = None) -> dict:
    """Writes one checkpoint and returns its commit; rank 0 alone.

    `export`: the module whose weights are the export, and the export's config.
    Raises LeaseLost when another worker owns the build.
    """
    name_of, states = folder_of(step, attempt), dict(states)
    folder, digests = join(build, "checkpoints", name_of), {}
    if export:
        name, config = export
        weights = {k: v for k, v in states[name].items() if is_weight(k)}
        states[name] = {k: v for k, v in states[name].items() if k not in weights}
        # An export has bare names: the commit tells buffers from parameters.
        record = {**record, "export": name, "buffers": [k for k in weights if k.startswith("buffer/")]}
        digests[WEIGHTS] = write_export(folder, {k.partition("/")[2]: v for k, v in weights.items()}, config)
    for name, state in states.items():
        data = safetensors.torch.save(dict(state))
        digests[f"{name}.safetensors"] = hashlib.sha256(data).hexdigest()
        put(join(folder, f"{name}.safetensors"), data)
    # The lease is checked between the last file and the commit: a worker that lost its build leaves a folder without one.
    check_lease(build, attempt)
    commit = {"folder": name_of, "step": step, "sha256": digests, **record}
    try:
        put_json(path_of(build, step), commit, exclusive=True)
        return commit
    except FileExistsError as e:
        raise LeaseLost(f"{build}: another attempt committed step {step}") from e


def load(build: str, commit: dict, name: str) -> Saved:
    """A module's canonical state, from the checkpoint of a commit. Raises ArtifactError for a damaged file."""
    state = _read(build, commit, f"{name}.safetensors")
    if commit.get("export") == name:
        for k, v in _read(build, commit, WEIGHTS).items():
            state[f"buffer/{k}" if f"buffer/{k}" in commit["buffers"] else f"param/{k}"] = v
    return state


def _read(build: str, commit: dict, file: str) -> Saved:
    path = join(build, "checkpoints", commit["folder"], file)
    data = get(path)
    if hashlib.sha256(data).hexdigest() != commit["sha256"][file]:
        raise ArtifactError(f"{path} is damaged: it is not what the commit of step {commit['step']} names; the same "
                            "command goes on from an older one; --force trains the step anew")
    return safetensors.torch.load(data)


class Saver:
    """Writes checkpoints in a thread, one at a time: a second waits for the first. Rank 0 alone.

    A failure surfaces at the next call and at the end, which waits; a process that dies loses only the checkpoint in flight.
    `flush` brings the metrics to the store before each commit, as a run that continues from it begins with the next step's.
    Kept are the last `keep` checkpoints, the best, and for good those of step `pin` (the trunk's end) and of its best.
    """

    def __init__(self, build: str, attempt: int, keep: int, pin: int, export: tuple[str, dict[str, Any]] | None,
                 flush: Callable[[], None] = lambda: None):
        self.build, self.attempt, self.keep, self.pin, self.export, self.flush = build, attempt, keep, pin, export, flush
        self._live = [c for c in commits(build) if not c.get("pruned")]
        self._pool, self._pending = ThreadPoolExecutor(1, "saver"), Future()
        self._pending.set_result(None)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind, *rest) -> None:
        self._pool.shutdown()
        if kind is None:  # an error of the training itself comes first
            self.wait()

    def check(self) -> None:
        """Raises the last checkpoint's error, if it has failed by now."""
        if self._pending.done():
            self.wait()

    def wait(self) -> None:
        self._pending.result()

    def save(self, step: int, states: Mapping[str, Saved], record: dict) -> None:
        """Takes over the states: nobody may change them afterwards."""
        self.wait()
        self._pending = self._pool.submit(self._write, step, states, record)

    def _write(self, step: int, states: Mapping[str, Saved], record: dict) -> None:
        self.flush()
        self._live.append(save(self.build, self.attempt, step, states, record, self.export))
        kept = {record["best_step"], self.pin}
        kept |= {c["trunk"]["best_step"] for c in self._live if c["step"] == self.pin and "trunk" in c}
        check_lease(self.build, self.attempt)
        for commit in self._live[:-self.keep]:
            if commit["step"] not in kept:
                # The commit is marked before the folder goes, so that no reader picks a checkpoint that is half removed.
                put_json(path_of(self.build, commit["step"]), {**commit, "pruned": True})
                remove(join(self.build, "checkpoints", commit["folder"]))
                self._live.remove(commit)
