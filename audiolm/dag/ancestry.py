"""Whether builds belong together: each names the builds it was made of, those name theirs, and so on.

Steps that lie side by side, as in a run's index, are one system only where these records lead to the builds beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache

from audiolm.dag.outputs import build_id, build_of
from audiolm.store import get_json, join


class MixedRun(ValueError):
    """Steps that are no one system; the text names both builds."""


def ancestors(build: str) -> list[tuple[str, str]]:
    """(step, FINGERPRINT.BUILD) of all that a build, given by its folder, was made of; nearest first."""
    return list(_ancestors(build, _inputs))


def misfits(steps: Mapping[str, str]) -> dict[str, str]:
    """{step: reason} of the steps, {name: folder of outputs}, that were made of another build of a step beside them."""
    ids, inputs = {name: build_id(path) for name, path in steps.items()}, cache(_inputs)
    found = {}
    for name, path in steps.items():
        other = next(((s, made) for s, made in _ancestors(build_of(path), inputs) if ids.get(s, made) != made), None)
        if other:
            found[name] = f"{name} ({path}) was made of {other[0]} {other[1]}, not of {ids[other[0]]}"
    return found


def check_one_run(steps: Mapping[str, str]) -> None:
    """Raises MixedRun where a step was made of another build than the one beside it."""
    if found := misfits(steps):
        raise MixedRun(f"{next(iter(found.values()))}: take all steps of one run, or run the pipeline again")


def _ancestors(build: str, inputs: Callable[[str], Mapping[str, str]]) -> Iterator[tuple[str, str]]:
    store, seen, todo = build.rsplit("/", 3)[0], set(), [build]
    while todo:
        for step in inputs(todo.pop(0)).items():
            if step not in seen:
                seen.add(step)
                yield step
                todo.append(join(store, step[0], *step[1].split(".")))


def _inputs(build: str) -> Mapping[str, str]:
    """The inputs by a build's record; none where it has no record, as a published system."""
    return (get_json(join(build, "done.json")) or get_json(join(build, "build.json")) or {}).get("inputs", {})
