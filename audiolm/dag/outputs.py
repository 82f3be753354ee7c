"""Outputs of a build's attempts: each attempt writes into a folder of its own, and done.json names the one that counts.

A driver that was suspended and wakes up so changes nothing of what another attempt has published.  An attempt that takes a
build over begins with a copy of what the one before it left: by links on a local disk, by the server on an object store.
files.json holds the size and SHA-256 of each file of a finished attempt; `damaged` compares, and `take_back` makes a build
unfinished without what is damaged, so that the step's next attempt makes that again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from audiolm.dag.lease import is_dead, read_attempt
from audiolm.store import QUIET_S, copy, exists, files, get_json, join, modified, pieces, put_json, remove

FILES = "files.json"
READERS = 8  # hashing releases the GIL, and an object store answers each request late


def path_of(build: str, attempt: int) -> str:
    return join(build, f"{attempt:04d}")


def build_of(path: str) -> str:
    """The build's folder, of an attempt's outputs."""
    return path.rstrip("/").rpartition("/")[0]


def build_id(path: str) -> str:
    """FINGERPRINT.BUILD, as done.json names inputs, of an attempt's outputs."""
    return ".".join(build_of(path).split("/")[-2:])


def inherit(build: str, attempt: int) -> None:
    """Fills an attempt's folder with what the newest one before it has written.

    An attempt that was not filled itself wrote nothing: then the one before it is taken.
    """
    earlier = range(attempt - 1, 0, -1)
    last = next((n for n in earlier if n == 1 or exists(_filled(build, n))), None)
    while last and files(path_of(build, last)):
        try:
            copy(path_of(build, last), path_of(build, attempt))
            break
        except FileNotFoundError:  # its owner is alive and removed something: list again
            continue
    put_json(_filled(build, attempt), {"from": last})
    sweep(build, attempt, published=False)


def sweep(build: str, attempt: int, published: bool) -> None:
    """Removes the folders of failed and dead attempts; once `attempt` is published, of those that were silent for QUIET_S too.

    Before that a silent one may wake up and publish.  One that was published once stays, for those who read it.
    """
    own = modified(_record(build, attempt))
    for n in range(1, attempt):
        record = read_attempt(build, n)
        ended = record["state"] in ("failed", "stopped") or (record["state"] == "running" and (
            is_dead(record) or (published and own - modified(_record(build, n)) > QUIET_S)))
        if ended:
            remove(path_of(build, n))


def _record(build: str, attempt: int) -> str:
    return join(build, "attempts", f"{attempt:04d}.json")


def _filled(build: str, attempt: int) -> str:
    """The file that marks an attempt's folder as filled; copies of it have another attempt's name."""
    return join(path_of(build, attempt), f"filled-{attempt:04d}.json")


def seal(path: str) -> None:
    """Writes files.json, once all outputs are there."""
    found = files(path)
    put_json(join(path, FILES), {n: [found[n], d] for n, d in _digests(path, found) if n != FILES})


def damaged(path: str) -> list[str]:
    """Names of an attempt's files that are missing, or are not what files.json says."""
    try:
        expected, found = get_json(join(path, FILES)), files(path)
    except ValueError:
        expected = None
    if expected is None:
        return [FILES]
    same = [n for n, (size, _) in expected.items() if found.get(n) == size]
    whole = {n for n, digest in _digests(path, same) if digest == expected[n][1]}
    return [n for n in expected if n not in whole]


def take_back(path: str, bad: list[str], part: str) -> None:
    """Makes a finished build unfinished, without its damaged files; without all outputs where one is no `part` (a prefix).

    The publication goes last: a repair that breaks off is found again.
    """
    if part and all(n == FILES or n.startswith(part) for n in bad):
        for name in (*bad, FILES):
            remove(join(path, name))
    else:
        remove(path)
    remove(join(build_of(path), "done.json"))


def sha256(path: str) -> str:
    """Of a file's bytes, in hexadecimal. Raises FileNotFoundError."""
    digest = hashlib.sha256()
    for piece in pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def _digests(path: str, found: Iterable[str]) -> list[tuple[str, str]]:
    """(name, SHA-256) of files below a folder."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda name: (name, sha256(join(path, name))), found))
