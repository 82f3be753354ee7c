"""What the steps that measure ABX share: which items, which speakers, where the audio is. Imports no torch."""

from __future__ import annotations

import hashlib
import posixpath

from audiolm import store
from audiolm.config import ConfigError
from audiolm.config_semantic import Abx, AbxSet


def abx_set(abx: Abx) -> AbxSet:
    """With the hash of the item file. Raises ConfigError where it is missing."""
    try:
        data = store.get(abx.items)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise ConfigError(f"semantic.abx.items: {abx.items} does not exist; give a ZeroSpeech item file, or leave semantic.abx "
                          "out and choose layer and k by number") from e
    return AbxSet(items=abx.items, audio=abx.audio, digest=hashlib.sha256(data).hexdigest()[:16], speakers=abx.speakers)


def held_out_speakers(items, wanted: tuple[str, ...] | None, manifest: str) -> list[str]:
    """`wanted`, else the items' speakers whom the manifest does not train on. Raises ValueError where none is left."""
    from audiolm.data.manifest import read_clips

    if wanted is not None:
        return list(wanted)
    seen = {c.speaker for c in read_clips(manifest, "train")}
    found = sorted(set(items.speaker.tolist()) - seen)
    if not found:
        raise ValueError("semantic.abx: every speaker of the item file is trained on: hold some out with "
                         "corpus.hold_out.dev=[...], or name semantic.abx.speakers")
    return found


def audio_paths(folders: tuple[str, ...], wanted: set[str]) -> dict[str, str]:
    """{file id of the items: path}. Raises ValueError naming files that lie nowhere."""
    from audiolm.data.sources import AUDIO
    from audiolm.tokenizers import files

    found = {posixpath.splitext(posixpath.basename(name))[0]: path for name, path in files.find(list(folders), AUDIO)}
    if missing := sorted(wanted - set(found)):
        raise ValueError(f"semantic.abx.audio: {len(missing)} of the items' {len(wanted)} files lie nowhere below "
                         f"{', '.join(folders)}; the first is {missing[0]}")
    return {name: found[name] for name in sorted(wanted)}
