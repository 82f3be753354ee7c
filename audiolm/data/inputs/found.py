"""Found: one sound of a corpus source, with what its path, its row or its container says of it."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass

from audiolm.data.containers.layout import ENDINGS
from audiolm.data.inputs.walk import Entry, Fault

# What is audio by its name and is left out, with a line that counts it.
LIKE_AUDIO = (".mkv", ".mov", ".3gp", ".wma", ".amr", ".awb", ".ape", ".wv", ".tta", ".alac", ".ac3", ".eac3", ".dts", ".mpc",
              ".mpga", ".spx", ".ogv", ".ogx", ".voc", ".gsm", ".dsf", ".ra", ".rm")


@dataclass(frozen=True)
class Found:
    """A sound, or the stretch of one that a user's table names; start and duration in seconds.

    `name` is that of a sound within a container, `fault` (reason, detail) why it cannot be used.
    A `container` holds sounds, which a scan finds."""

    origin: str
    uri: str
    path: str
    size: int
    stamp: str
    source: str
    speaker: str | None = None
    chapter: str | None = None
    split: str | None = None
    text: str | None = None
    start: float | None = None
    duration: float | None = None
    name: str = ""
    fault: Fault | None = None
    container: bool = False

    @property
    def key(self) -> str:
        """The name that the sound has wherever it lies: in a tar, that of the member."""
        return self.name or self.uri


def found_of(origin: str, e: Entry) -> Found:
    """The sound of a listed file."""
    return Found(origin, e.uri, e.path, e.size, e.stamp, origin, fault=e.fault)


def is_audio(uri: str) -> bool:
    return uri.lower().endswith(ENDINGS)


def is_like_audio(uri: str) -> bool:
    return uri.lower().endswith((*ENDINGS, *LIKE_AUDIO))


def ending(uri: str) -> str:
    return posixpath.splitext(uri)[1].lower()


def by_folders(name: str, speaker: str) -> tuple[str | None, str | None]:
    """(speaker, chapter) of SPEAKER/CHAPTER/file (`grandparent`) or SPEAKER/file (`parent`).

    The chapter is the folder whose utterances may be joined."""
    parts = name.split("/")
    up = {"none": 0, "parent": 1, "grandparent": 2}[speaker]
    found = parts[-1 - up] if up and len(parts) > up else None
    return found, posixpath.dirname(name) if up == 2 and found else None
