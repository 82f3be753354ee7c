"""Published models, shipped with the package: no network and no download.

A folder audiolm/pretrained/NAME holds one codec or one whole system.  A codec: export/model.safetensors (float16) and
export/config.json, as `tokenizers.artifact.read_export` reads them, and recipe.json, the config it was trained with.  A
system: NAME.json, a run's index whose paths lead to the exports of its steps, STEP/export, beside it.  README.md is the model
card.  `workflows/codec.py publish` and `workflows/publish.py` write all but the card.
"""

from __future__ import annotations

import os

ROOT = os.path.dirname(os.path.abspath(__file__))
DEFAULT_CODEC = "speech-16k"  # the codec of the commands where neither an option nor a run names one
DEFAULT_SYSTEM = "small"  # the system of the commands where there is no run


def codecs() -> tuple[str, ...]:
    """The names of the published codecs, sorted. A folder without export/config.json is none."""
    return tuple(sorted(n for n in os.listdir(ROOT) if os.path.exists(os.path.join(ROOT, n, "export", "config.json"))))


def systems() -> tuple[str, ...]:
    """The names of the published systems, sorted."""
    return tuple(sorted(n for n in os.listdir(ROOT) if os.path.exists(_index(n))))


def names() -> tuple[str, ...]:
    """The names of all published models, sorted."""
    return tuple(sorted((*codecs(), *systems())))


def path(name: str) -> str:
    """A published codec's folder, which loads like a build, or a published system's index, which is like a run's.

    Raises ValueError that lists the names.
    """
    if name in systems():
        return _index(name)
    if name not in codecs():
        raise ValueError(f"there is no published model {name!r}; published are: {', '.join(names()) or 'none'}")
    return os.path.join(ROOT, name)


def _index(name: str) -> str:
    return os.path.join(ROOT, name, f"{name}.json")


def resolve(place: str, folder: str = "") -> str:
    """The place of a published model (`path`) where `place` is its bare name, else `place` unchanged.

    A file or folder of that name in `folder` (the working folder) wins: what a user made is never hidden by a name. Everything
    with a slash is a path or URI.
    """
    return path(place) if place in names() and not os.path.exists(os.path.join(folder, place)) else place
