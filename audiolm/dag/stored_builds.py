"""Builds as a store holds them, whichever config made them: their sizes, ages and relatives, and their removal.

Removal is safe against a run that begins meanwhile, without a lock.  A run that goes on from a build first writes into it
(its claim, or used.json) and then looks whether the build's record is there.  `remove_build` first takes the record away and
then looks whether something was written since: then it puts the record back.  One of the two sees the other.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from audiolm.dag.lease import is_dead, is_here
from audiolm.store import (
    at_once,
    exists,
    files,
    get_json,
    is_local,
    join,
    listing,
    names,
    open_fs,
    put_json,
    remove,
    remove_unfinished,
)

Key = tuple[str, str, str]  # (step, fingerprint, build)

USED = "used.json"  # when a run took the build as it was last
REMOVED = "removed.json"  # of a build that is being removed: nobody takes its number

_FILE = re.compile(r"([0-9a-f]{12})/(\d{4,})/(.+)")
_REFERENCE = re.compile(r"([\w.-]+)/([0-9a-f]{12})/(\d{4,})(?:/(\d{4,}))?(?![\w-])")


@dataclass
class StoredBuild:
    """A build's files in numbers, `parts` by folder: outputs of an attempt ("0001"), or a checkpoint."""

    key: Key
    folder: str
    size: int = 0  # bytes
    written: float = 0.0  # its last write or use by a run, by the store's clock
    parts: dict[str, tuple[int, float]] = field(default_factory=dict)  # (bytes, last write)
    records: dict[str, dict | None] = field(default_factory=dict)  # build.json, done.json and the newest attempt's

    @property
    def record(self) -> dict:
        return self.records.get("build.json") or {}

    @property
    def done(self) -> dict | None:
        return self.records.get("done.json")

    @property
    def attempt(self) -> dict:
        """The record of the newest attempt."""
        return next((r for n, r in self.records.items() if n.startswith("attempts/") and r), {})

    @property
    def id(self) -> str:
        return "/".join(self.key)

    @property
    def at_work(self) -> bool:
        """True where the owner of the newest attempt is a living process of this machine, however silent."""
        return self.attempt.get("state") == "running" and is_here(self.attempt) and not is_dead(self.attempt)


def stored_builds(store: str) -> dict[Key, StoredBuild]:
    """All builds of a store. Whatever has not the layout of a build is passed over."""
    found: dict[Key, StoredBuild] = {}
    for step in names(store):
        top = join(store, step)
        if not any(re.fullmatch("[0-9a-f]{12}", name) for name in names(top)):
            continue
        for name, (size, written) in listing(top).items():
            if match := _FILE.fullmatch(name):
                fingerprint, number, file = match.groups()
                build = found.setdefault((step, fingerprint, number),
                                         StoredBuild((step, fingerprint, number), join(top, fingerprint, number)))
                _count(build, file, size, written)
    records = [(build, name) for build in found.values() for name in build.records]
    for (build, name), record in zip(records, at_once(lambda r: _record(*r), records), strict=True):
        build.records[name] = record
    return found


def _count(build: StoredBuild, file: str, size: int, written: float) -> None:
    build.size += size
    build.written = max(build.written, written)
    part = re.match(r"\d{4,}(?=/)|checkpoints/[^/]+(?=/)", file)
    if part:
        before = build.parts.get(part[0], (0, 0.0))
        build.parts[part[0]] = before[0] + size, max(before[1], written)
    elif file in ("build.json", "done.json"):
        build.records[file] = None
    elif file.startswith("attempts/"):  # they come in order
        build.records = {n: r for n, r in build.records.items() if not n.startswith("attempts/")} | {file: None}


def _record(build: StoredBuild, name: str) -> dict | None:
    try:
        return get_json(join(build.folder, name))
    except ValueError:  # a full or failing disk cut it off
        return None


def references(text: str) -> set[tuple[Key, str | None]]:
    """(build, its attempt or None) of every path within a text that leads into a build, whatever the store's place."""
    return {((step, fingerprint, number), attempt or None) for step, fingerprint, number, attempt in _REFERENCE.findall(text)}


def with_relatives(roots: dict[Key, str], builds: dict[Key, StoredBuild]) -> dict[Key, str]:
    """{build: reason} of the roots, of all that they were made of, and of trunks that a training of theirs shares."""
    kept, todo = {}, [key for key in roots if key in builds]
    reasons = dict(roots)
    while todo:
        key = todo.pop()
        if key in kept:
            continue
        kept[key], build = reasons[key], builds[key]
        for step, made in {**build.record.get("inputs", {}), **(build.done or {}).get("inputs", {})}.items():
            other = (step, *made.split("."))
            if other in builds and other not in kept:
                reasons.setdefault(other, f"made {build.id}")
                todo.append(other)
        for other in builds.values():
            if _shares_trunk(build, other) and other.key not in kept:
                reasons.setdefault(other.key, f"shares its trunk with {build.id}")
                todo.append(other.key)
    return kept


def _shares_trunk(a: StoredBuild, b: StoredBuild) -> bool:
    """True where `b` has checkpoints that a training of the length of `a` could continue."""
    same = all(a.record.get(k) == b.record.get(k) for k in ("trunk", "inputs"))
    return (a.key[0] == b.key[0] and "trunk" in a.record and same and any(p.startswith("checkpoints/") for p in b.parts))


def take_into_use(builds: Iterable[str]) -> str | None:
    """Notes in builds' folders that a run goes on from them; returns one that was removed meanwhile, None without one."""
    builds = list(builds)
    at_once(lambda build: put_json(join(build, USED), {"time": time.time()}), builds)
    there = at_once(lambda build: exists(join(build, "build.json")), builds)
    return next((build for build, found in zip(builds, there, strict=True) if not found), None)


def remove_build(build: StoredBuild, before: float) -> bool:
    """Removes a build; False, and all stays, where a run wrote into it at `before` or later (by the store's clock)."""
    put_json(join(build.folder, REMOVED), {"build": build.id})
    for name in ("done.json", "build.json"):
        remove(join(build.folder, name))
    if any(written >= before for name, (_, written) in listing(build.folder).items() if name != REMOVED):
        for name in ("build.json", "done.json"):
            if build.records.get(name):
                put_json(join(build.folder, name), build.records[name])
        remove(join(build.folder, REMOVED))
        return False
    remove_unfinished(build.folder, before)
    for name in names(build.folder):
        if name != REMOVED:
            remove(join(build.folder, name))
    remove(build.folder)
    root = build.folder.rpartition("/")[0]
    if files(root).keys() <= {"recipe.json"}:
        remove(join(root, "recipe.json"))
        if is_local(root):
            with suppress(OSError):  # another build was opened there
                os.rmdir(open_fs(root)[1])
    return True
