"""Which checkpoints a build has, and where a run begins: light, for plans too (DESIGN 1.6).

`commits/{step:08d}.json` makes a checkpoint count: {"step", "folder" (below checkpoints/), "best_step", "best_loss", ...},
"pruned" once it is gone.  One of the constant phase has "trunk": its best_step and best_loss by validations that a run of
any length makes.  Runs that differ in length alone (dag.kin) continue each other's: what they take is copied first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from audiolm.dag.lease import check_lease
from audiolm.metrics_log import read_build
from audiolm.store import copy, get_json, join, names, put, put_json


def path_of(build: str, step: int) -> str:
    return join(build, "commits", f"{step:08d}.json")


def folder_of(step: int, attempt: int) -> str:
    return f"{step:08d}-{attempt:04d}"


def latest_first(build: str, at_most: int | None = None) -> Iterator[dict]:
    """The commits whose checkpoints are there."""
    for name in reversed(names(join(build, "commits"))):
        if at_most is None or int(name[:8]) <= at_most:
            commit = get_json(join(build, "commits", name))
            if commit and not commit.get("pruned"):
                yield commit


def commits(build: str) -> list[dict]:
    """Every commit, oldest first, pruned ones too."""
    return [c for n in names(join(build, "commits")) if (c := get_json(join(build, "commits", n)))]


def newest(build: str) -> dict | None:
    return next(latest_first(build), None)


def start(build: str | None, kin: Iterable[str], trunk_steps: int) -> tuple[str, dict] | None:
    """(build, commit) that a run goes on from: its own build's newest, or one of its trunk's where that is further.

    Of another build count checkpoints up to `trunk_steps`, the run's own decay start, whose best is still there.
    """
    own = newest(build) if build else None
    found = (build, own) if own else None
    for other in kin:
        usable = (c for c in latest_first(other, trunk_steps) if "trunk" in c and _with_best(other, c))
        commit = next(usable, None)
        if commit and (found is None or commit["step"] > found[1]["step"]):
            found = (other, commit)
    return found


def _with_best(build: str, commit: dict) -> list[dict]:
    """The commits to take so that a run can go on from one: the best first, the one itself last; [] where one is gone."""
    steps = sorted({commit["trunk"]["best_step"] or commit["step"], commit["step"]})
    found = [get_json(path_of(build, step)) for step in steps]
    return found if all(c and not c.get("pruned") for c in found) else []


def take_over(build: str, attempt: int, kin: Iterable[str], trunk_steps: int) -> None:
    """Copies what the run goes on from, and its best, into its own build, with the metrics until there. Driver only."""
    while (found := start(build, kin, trunk_steps)) and found[0] != build:
        source, commit = found
        wanted = _with_best(source, commit)
        try:
            for c in wanted:
                copy(join(source, "checkpoints", c["folder"]), join(build, "checkpoints", folder_of(c["step"], attempt)))
        except FileNotFoundError:
            if _with_best(source, commit):
                raise
        if not wanted or wanted != _with_best(source, commit):
            continue  # its own run pruned one meanwhile
        rows = [json.dumps(r) for r in read_build(source) if r["step"] <= commit["step"]]
        put(join(build, "metrics-0000.jsonl"), "".join(f"{r}\n" for r in rows).encode())
        check_lease(build, attempt)
        for c in wanted:
            put_json(path_of(build, c["step"]), {**c, **c["trunk"], "folder": folder_of(c["step"], attempt)})
