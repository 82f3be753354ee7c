"""Audio that a corpus holds more than once: overlapping stretches of a recording, in other rows, files or sources.

A recording is known by its content, so that links and copies count, or by its path where it has no content hash.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from audiolm.data.units import Unit

SLACK_S = 0.01  # that neighbours may overlap: tables round to hundredths
HELD_OUT_FIRST = ("test", "dev", "train")
NAMED = 3  # examples in a remark


def overlapping(units: list[Unit], contents: Mapping[tuple[str, str], str]) -> list[list[int]]:
    """Groups of units that overlap, directly or by way of others. `contents`: {(origin, uri): hash of the file}."""
    groups = []
    for members in _by_recording(units, contents).values():
        group, end = [], 0
        for i in sorted(members, key=lambda i: units[i].start):
            if group and units[i].start >= end - SLACK_S * units[i].sample_rate:
                groups.append(group)
                group = []
            group.append(i)
            end = max(end if len(group) > 1 else 0, units[i].start + units[i].frames)
        groups.append(group)
    return [group for group in groups if len(group) > 1]


def share_splits(units: list[Unit], splits: list[str | None], given: list[str | None], groups: list[list[int]]) -> list[str]:
    """Gives all of a group one split, in place, unless no train or dev clip would be left; returns the remark on what it did.

    A split that the corpus gives comes before one that was drawn, and of given ones that which is held out: a test set stays
    whole.  Of drawn ones it is train, so that a jingle in every file does not hold everything out."""
    moved, before = [], list(splits)
    for group in (g for g in groups if len({splits[i] for i in g}) > 1):
        split = next((s for s in HELD_OUT_FIRST if s in {given[i] for i in group}), "train")
        moved += [units[i] for i in group if splits[i] != split]
        for i in group:
            splits[i] = split
    if not moved:
        return []
    text = f"{len(moved)} pieces are the same audio as others, in another row, file or source, and"
    if {"train", "dev"} & set(before) <= set(splits):
        return [f"{text} take their split, so that none is trained on and held out: {_names(moved)}"]
    splits[:] = before
    return [f"{text} are both TRAINED ON AND HELD OUT, as nothing else is left for one of the two: {_names(moved)}"]


def repeated(units: list[Unit], contents: Mapping[tuple[str, str], str]) -> list[str]:
    """The remark on stretches that are there more than once, from end to end; training hears them as often."""
    again = []
    for members in _by_recording(units, contents).values():
        seen = Counter()
        for i in members:
            seen[units[i].start, units[i].frames] += 1
            again += [units[i]] if seen[units[i].start, units[i].frames] > 1 else []
    return [f"{len(again)} pieces are there more than once, as doubled rows or copies of a file, and count as often: "
            f"{_names(again)}"] if again else []


def _by_recording(units: list[Unit], contents: Mapping[tuple[str, str], str]) -> dict[str, list[int]]:
    """The numbers of the units of each recording that has several."""
    found: dict[str, list[int]] = {}
    for i, u in enumerate(units):
        found.setdefault(contents.get((u.found.origin, u.found.uri)) or u.found.path, []).append(i)
    return {recording: members for recording, members in found.items() if len(members) > 1}


def _names(units: list[Unit]) -> str:
    names = [f"{u.found.origin}/{u.found.uri} at {u.start / u.sample_rate:.2f} s" for u in units[:NAMED]]
    return ", ".join(names) + (" ..." if len(units) > NAMED else "")
