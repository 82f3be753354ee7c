"""Commits of a build's checkpoints, and the commit that a run begins from.

`commits/{step:08d}.json` makes a checkpoint count: {"step", "folder" (below checkpoints/), "sha256" (of each of its files),
"best_step", "best_loss", ...}, and "pruned" once the folder is gone.  One of the trunk, the steps before the decay, has
"trunk": best_step and best_loss by the validations that a run of any length makes.  Runs that differ in length alone have the
same trunk and continue each other's; a run first copies what it takes.
Apart from checkpoint.py, because a plan reads commits and must not import torch.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable

from audiolm.dag.lease import check_lease
from audiolm.dag.outputs import sha256
from audiolm.dag.stored_builds import take_into_use
from audiolm.metrics_log import read_build
from audiolm.store import QUIET_S, READERS, at_once, copy, files, get_json, join, modified, names, put, put_json, remove


def path_of(build: str, step: int) -> str:
    return join(build, "commits", f"{step:08d}.json")


def folder_of(step: int, attempt: int) -> str:
    """A checkpoint's folder below checkpoints/: two attempts at one step never write to the same place."""
    return f"{step:08d}-{attempt:04d}"


def commits(build: str) -> list[dict]:
    """Every commit, oldest first, pruned ones too."""
    return [c for n in names(join(build, "commits")) if (c := _commit(build, n))]


def _commit(build: str, name: str) -> dict | None:
    """The commit in a file; None for one that a full or failing disk has cut off."""
    try:
        return get_json(join(build, "commits", name)) or None
    except ValueError:
        return None


def newest(build: str) -> dict | None:
    """The last commit whose checkpoint exists."""
    found = (_commit(build, name) for name in reversed(names(join(build, "commits"))))  # read one by one: the first will do
    return next((c for c in found if c and not c.get("pruned")), None)


def steps_kept(build: str) -> int:
    """The steps that a build's newest checkpoint holds, 0 without one."""
    commit = newest(build)
    return commit["step"] if commit else 0


def drop_damaged(build: str, with_best: bool = False) -> list[str]:
    """Removes commits, newest first, until one and its checkpoint's files are whole; returns a remark about each.

    `with_best`: those of its best checkpoint too, as a run needs that ends with it.  The driver alone calls this."""
    dropped = []
    for name in reversed(names(join(build, "commits"))):
        path, commit = join(build, "commits", name), _commit(build, name)
        if commit and commit.get("pruned"):
            continue
        file = _damaged(build, commit, with_best) if commit else path
        if file is None:
            break
        remove(path)
        dropped.append((int(name.removesuffix(".json")), file))
    origin = f"step {steps_kept(build)}, the newest whole one" if newest(build) else "the start, as there is no other"
    return [f"the checkpoint of step {step} is damaged ({file}): went on from {origin}" for step, file in dropped]


def _damaged(build: str, commit: dict, with_best: bool = False) -> str | None:
    """The first file of a checkpoint, or of its best, that is missing, cannot be read or differs from its digest."""
    for name, expected in commit["sha256"].items():
        path = join(build, "checkpoints", commit["folder"], name)
        try:
            if sha256(path) != expected:
                return path
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return path
        except OSError as e:
            if e.errno != errno.EIO:  # of a disk: the file's blocks are gone
                raise
            return path
    if not with_best or commit["best_step"] in (None, commit["step"]):
        return None
    name = f"{commit['best_step']:08d}.json"
    best = _commit(build, name)
    return _damaged(build, best) if best and not best.get("pruned") else join(build, "commits", name)


def starting_point(build: str | None, siblings: Iterable[str], trunk_steps: int, verified: bool = False
                   ) -> tuple[str, dict] | None:
    """(build, commit) that a run continues: its own build's newest, or a sibling's where that is further.

    A sibling is a build of the same trunk.  Its checkpoints count up to `trunk_steps`, the run's own decay start, while
    their best still exists; `verified`: while their files are whole, which takes a look at every byte.
    """
    own = newest(build) if build else None
    further = [(step, b) for step, b in _kept_by(list(siblings), trunk_steps) if own is None or step > own["step"]]
    for i in range(0, len(further), READERS):  # read at once, as those of a decay are passed over
        some = further[i:i + READERS]
        for (_, other), commit in zip(some, at_once(lambda f: _commit(f[1], f"{f[0]:08d}.json"), some), strict=True):
            if not commit or commit.get("pruned") or "trunk" not in commit or not (needed := _with_best(other, commit)):
                continue
            if not (verified and any(_damaged(other, n) for n in needed)):
                return other, commit
    return (build, own) if own else None


def _kept_by(builds: list[str], at_most: int) -> list[tuple[int, str]]:
    """(step, build) of the commits up to a step whose checkpoints are there, furthest first: by one listing for all builds,
    which are of one training step."""
    if not builds:
        return []
    top = builds[0].rsplit("/", 2)[0]
    order = {build[len(top) + 1:]: i for i, build in enumerate(builds)}
    committed, kept = set(), set()
    for name in files(top):
        build, _, rest = name.rpartition("/commits/") if "/commits/" in name else name.partition("/checkpoints/")
        if build in order and rest:
            (committed if rest.endswith(".json") and "/" not in rest else kept).add((build, rest[:8]))
    found = [(int(step), build) for build, step in committed & kept if int(step) <= at_most]
    return [(step, join(top, build)) for step, build in sorted(found, key=lambda f: (-f[0], order[f[1]]))]


def remove_uncommitted(build: str, attempt: int) -> None:
    """Removes checkpoints of dead attempts that no commit names, or that were marked as pruned and not yet removed.

    An attempt is dead once its record was not written for QUIET_S, by the store's clock; `attempt` is the caller's own.
    """
    live = {c["folder"] for c in commits(build) if not c.get("pruned")}
    records = {n: modified(join(build, "attempts", f"{n:04d}.json")) for n in range(1, attempt + 1)}
    for folder in names(join(build, "checkpoints")):
        owner = int(folder.rpartition("-")[2])
        if folder not in live and owner < attempt and records[attempt] - records[owner] > QUIET_S:
            remove(join(build, "checkpoints", folder))


def _with_best(build: str, commit: dict) -> list[dict]:
    """The commits without which a run cannot continue from one: the best first, the one itself last; [] if one is gone."""
    steps = sorted({commit["trunk"]["best_step"] or commit["step"], commit["step"]})
    needed = [_commit(build, f"{step:08d}.json") for step in steps]
    return needed if all(c and not c.get("pruned") for c in needed) else []


def copy_trunk(build: str, attempt: int, siblings: Iterable[str], trunk_steps: int) -> None:
    """Copies a sibling's checkpoint, its best, and the metrics up to it into the run's own build, where it is further.

    The driver alone calls this, before workers start.  The sibling's own run may prune what is being copied: the
    search then begins again.
    """
    while (point := starting_point(build, siblings, trunk_steps, verified=True)) and point[0] != build:
        source, commit = point
        if take_into_use([source]):  # removed by --gc since it was found
            continue
        needed = _with_best(source, commit)
        try:
            for c in needed:
                copy(join(source, "checkpoints", c["folder"]), join(build, "checkpoints", folder_of(c["step"], attempt)))
        except FileNotFoundError:
            if _with_best(source, commit):
                raise
        if not needed or needed != _with_best(source, commit):
            continue
        rows = [json.dumps(r) for r in read_build(source) if r["step"] <= commit["step"]]
        put(join(build, "metrics-0000.jsonl"), "".join(f"{r}\n" for r in rows).encode())
        check_lease(build, attempt)
        # Commits come last, the best before the newest: a copy that breaks off leaves no commit without its best.
        for c in needed:
            put_json(path_of(build, c["step"]), {**c, **c["trunk"], "folder": folder_of(c["step"], attempt)})
