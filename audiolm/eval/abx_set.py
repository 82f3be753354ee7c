"""What the steps that measure ABX share: which speakers, and where their audio is."""

from __future__ import annotations

import posixpath

from audiolm.data.manifest import read_clips
from audiolm.data.sources import AUDIO
from audiolm.tokenizers import files


def held_out_speakers(items, wanted: tuple[str, ...] | None, manifest: str) -> list[str]:
    """`wanted`, else the items' speakers whom the manifest does not train on. Raises ValueError where none is left."""
    if wanted is not None:
        return list(wanted)
    seen = {c.speaker for c in read_clips(manifest, "train")}
    found = sorted(set(items.speaker.tolist()) - seen)
    if not found:
        raise ValueError("semantic.abx: every speaker of the item file is trained on: hold some out with "
                         "corpus.hold_out.dev=[...], or name semantic.abx.speakers")
    return found


def audio_paths(folders: tuple[str, ...], wanted: set[str], field: str = "semantic.abx.audio") -> dict[str, str]:
    """{file id of the items: path}. Raises ValueError naming `field` and a file that lies nowhere."""
    found = {posixpath.splitext(posixpath.basename(name))[0]: path for name, path in files.find(list(folders), AUDIO)}
    if missing := sorted(wanted - set(found)):
        raise ValueError(f"{field}: {len(missing)} of the items' {len(wanted)} files lie nowhere below "
                         f"{', '.join(folders)}; the first is {missing[0]}")
    return {name: found[name] for name in sorted(wanted)}
