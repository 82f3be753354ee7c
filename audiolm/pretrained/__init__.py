"""Published models, shipped with the package: no network and no download.

A folder audiolm/pretrained/NAME holds one model: export/model.safetensors (float16) and export/config.json, as
`tokenizers.artifact.read_export` reads them; README.md, its model card; recipe.json, the config it was trained with.
`workflows/codec.py publish` writes all but the card.
"""

from __future__ import annotations

import os

ROOT = os.path.dirname(os.path.abspath(__file__))
DEFAULT_CODEC = "speech-16k"  # the codec of the commands where neither an option nor a run names one


def names() -> tuple[str, ...]:
    """The names of the published models, sorted. A folder without export/config.json is none."""
    return tuple(sorted(n for n in os.listdir(ROOT) if os.path.exists(os.path.join(ROOT, n, "export", "config.json"))))


def path(name: str) -> str:
    """The folder of a published model, which loads like a build. Raises ValueError that lists the names."""
    if name not in names():
        raise ValueError(f"there is no published model {name!r}; published are: {', '.join(names()) or 'none'}")
    return os.path.join(ROOT, name)


def resolve(place: str, folder: str = "") -> str:
    """The folder of a published model where `place` is its bare name, else `place` unchanged.

    A file or folder of that name in `folder` (the working folder) wins: what a user made is never hidden by a name. Everything
    with a slash is a path or URI.
    """
    return path(place) if place in names() and not os.path.exists(os.path.join(folder, place)) else place
