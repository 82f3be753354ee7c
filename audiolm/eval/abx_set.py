"""What the steps that measure ABX share: which speakers, and where their audio is."""

from __future__ import annotations

import posixpath

import numpy as np

from audiolm.config_train import Where
from audiolm.data.audio import SAMPLE_RATE_HZ, decode, resample
from audiolm.data.manifest import read_clips
from audiolm.data.sources import AUDIO
from audiolm.eval.abx import Items
from audiolm.tokenizers import files


def groups_of(items: Items, wanted: tuple[str, ...] | None, manifest: str,
              where: Where) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """({"held_out", "test", "seen": speakers of the items}, remarks); a group without speakers is absent.

    A speaker is seen (test) where a train (test) clip names them, or is cut from a file that the items call theirs; the others
    are held out, those of dev clips and those of no clip: what is chosen is chosen on them. `wanted` takes their place; the
    remark names those of them that are trained on."""
    speakers = set(items.speaker.tolist())

    def of(split: str) -> set[str]:
        clips = read_clips(manifest, split, where)
        files_ = {posixpath.splitext(posixpath.basename(p.uri))[0] for c in clips for p in c.parts}
        return speakers & {c.speaker for c in clips} | set(items.speaker[np.isin(items.file, list(files_))].tolist())

    seen, test = of("train"), of("test")
    held = set(wanted) if wanted else speakers - seen - test
    groups = {"held_out": held, "test": test - seen - held, "seen": seen - held}
    wrong = sorted(held & seen)
    remarks = [f"semantic.abx.speakers holds {', '.join(wrong)}, who are trained on: what is called held out is partly seen"]
    return {name: tuple(sorted(g)) for name, g in groups.items() if g}, remarks if wrong else []


def wav_of(path: str) -> np.ndarray:
    """wav_T at the pipeline's rate."""
    return resample(*decode(path), SAMPLE_RATE_HZ)


def audio_paths(folders: tuple[str, ...], wanted: set[str], field: str = "semantic.abx.audio") -> dict[str, str]:
    """{file id of the items: path}. Raises ValueError naming `field` and a file that lies nowhere."""
    found = {posixpath.splitext(posixpath.basename(name))[0]: path for name, path in files.find(list(folders), AUDIO)}
    if missing := sorted(wanted - set(found)):
        raise ValueError(f"{field}: {len(missing)} of the items' {len(wanted)} files lie nowhere below "
                         f"{', '.join(folders)}; the first is {missing[0]}")
    return {name: found[name] for name in sorted(wanted)}
