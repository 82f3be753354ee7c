"""Canonical training checkpoints: safetensors by parameter name plus JSON, the same for every engine (DESIGN 1.6).

`checkpoints/{step:08d}-{attempt:04d}/` holds one safetensors file a module; `commits/{step:08d}.json`, created
exclusively after the lease was checked, makes it count.  A checkpoint is found by its commit, never by listing folders.
"""

from __future__ import annotations

from collections.abc import Mapping

import safetensors.torch

from audiolm.lease import LeaseLost, check_lease
from audiolm.store import get, get_json, join, names, put, put_json, remove

Saved = dict  # name -> tensor


def save(build: str, attempt: int, step: int, states: Mapping[str, Saved], record: dict) -> None:
    """Writes and commits one checkpoint; rank 0 only. Raises LeaseLost when another worker owns the build."""
    folder = f"{step:08d}-{attempt:04d}"
    for name, state in states.items():
        put(join(build, "checkpoints", folder, f"{name}.safetensors"), safetensors.torch.save(dict(state)))
    check_lease(build, attempt)
    try:
        put_json(join(build, "commits", f"{step:08d}.json"), {"folder": folder, "step": step, **record}, exclusive=True)
    except FileExistsError as e:
        raise LeaseLost(f"{build}: another attempt committed step {step}") from e


def commits(build: str) -> list[dict]:
    """Every commit, oldest first, pruned ones too."""
    return [c for n in names(join(build, "commits")) if (c := get_json(join(build, "commits", n)))]


def newest(build: str) -> dict | None:
    return next((c for c in reversed(commits(build)) if not c.get("pruned")), None)


def load(build: str, commit: dict, name: str) -> Saved:
    return safetensors.torch.load(get(join(build, "checkpoints", commit["folder"], f"{name}.safetensors")))


def prune(build: str, attempt: int, keep: int, best_step: int | None) -> None:
    """Keeps the last `keep` and the best; a pruned checkpoint's commit says so before its folder goes."""
    check_lease(build, attempt)
    live = [c for c in commits(build) if not c.get("pruned")]
    for commit in live[:-keep]:
        if commit["step"] != best_step:
            put_json(join(build, "commits", f"{commit['step']:08d}.json"), {**commit, "pruned": True})
            remove(join(build, "checkpoints", commit["folder"]))
