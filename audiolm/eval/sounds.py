"""What a generation asks for, under which names, and what of it is done (eval.sound_task makes the rest).

A sample is NAME-N.wav (16 kHz, 16-bit PCM) with its NAME-N.json (`settings`: all that the sound depends on; and how it
went) in one folder, its picture and its prompt as the model heard it below page/.  The wav comes last and whole, so a
sample whose wav is there is done.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from audiolm import store
from audiolm.data.look import look, told
from audiolm.data.sources import AUDIO
from audiolm.tokenizers import files

if TYPE_CHECKING:
    from audiolm.lm.draw import Draw

LOOKS = 16  # files looked at together


@dataclass(frozen=True)
class Asked:
    """What all samples of a command share."""

    run: str
    index: str
    models: tuple[tuple[str, str], ...]  # folder by step
    mode: str
    draws: tuple[tuple[str, Draw], ...]  # by stage
    seed: int
    seconds: float | None = None  # None where the prompt's length decides
    prompt_s: float | None = None  # 0: all of a file
    whole: bool = False
    long: bool = False


@dataclass(frozen=True)
class Sample:
    name: str  # NAME of the files
    number: int  # from 1
    prompt: str = ""  # as it was given; "" for none
    place: str = ""  # where it is read: absolute
    digest: str = ""  # of its bytes

    @property
    def file(self) -> str:
        return f"{self.name}-{self.number}"


def name_prompts(inputs: Sequence[str]) -> list[tuple[str, str]]:
    """(NAME, path as given) of files and of the audio files below folders; names that come twice get a hash of their path.

    Raises ValueError for a folder without audio.
    """
    found = {path: posixpath.splitext(name)[0].replace("/", "-") for name, path in files.find(inputs, AUDIO)}
    often = Counter(found.values())
    return [(f"{name}-{hashlib.sha256(path.encode()).hexdigest()[:6]}" if often[name] > 1 else name, path)
            for path, name in found.items()]


def look_at(prompts: Sequence[tuple[str, str]], count: int) -> tuple[list[Sample], list[str]]:
    """`count` samples of each prompt, and a line for each that is missing or no audio."""
    def one(path: str) -> tuple[str, str]:
        try:
            return look(path)[0], ""
        except Exception as e:  # noqa: BLE001  whatever a file or a place raises, the others have their turn
            return "", told(path, e)

    with ThreadPoolExecutor(LOOKS) as pool:
        looked = list(pool.map(one, [path for _, path in prompts]))
    good = [(name, path, digest) for (name, path), (digest, wrong) in zip(prompts, looked, strict=True) if not wrong]
    return ([Sample(name, n, path, store.absolute(path), digest) for name, path, digest in good
             for n in range(1, count + 1)], [wrong for _, wrong in looked if wrong])


def settings(asked: Asked, sample: Sample) -> dict[str, Any]:
    """All that a sample's sound depends on, as its JSON has it."""
    return {"mode": asked.mode, "prompt": sample.prompt, "prompt_hash": sample.digest, "prompt_s": asked.prompt_s,
            "sample": sample.number, "seconds": asked.seconds, "seed": asked.seed, "whole": asked.whole, "long": asked.long,
            "draws": {stage: asdict(draw) for stage, draw in asked.draws}, "models": dict(asked.models)}


def records(folder: str) -> dict[str, dict[str, Any]]:
    """The JSON of each sample in a folder whose wav is there, by file name without its ending."""
    there = set(store.names(folder))
    names = [name for name in sorted(n[:-5] for n in there if n.endswith(".json")) if f"{name}.wav" in there]

    def one(name: str) -> dict | None:
        try:
            found = store.get_json(store.join(folder, f"{name}.json"))
        except ValueError:
            return None
        return found if isinstance(found, dict) and "settings" in found else None

    with ThreadPoolExecutor(LOOKS) as pool:
        return {name: found for name, found in zip(names, pool.map(one, names), strict=True) if found}


def left(asked: Asked, samples: Sequence[Sample], folder: str, force: bool) -> list[Sample]:
    """The samples that are not done yet, all with `force`. Raises ValueError for a file of other settings or not ours."""
    there, made = set(store.names(folder)), records(folder)
    todo = []
    for sample in samples:
        path, old = store.join(folder, f"{sample.file}.wav"), made.get(sample.file)
        if force or f"{sample.file}.wav" not in there:
            todo.append(sample)
            continue
        fix = "name another --out, or make it anew with --force"
        if old is None:
            raise ValueError(f"{path} is there and was not made by generate.py: {fix}")
        new = json.loads(json.dumps(settings(asked, sample)))
        if other := [k for k in new if new[k] != old["settings"].get(k)]:
            k = other[0]
            raise ValueError(f"{path} was made with another {k} ({old['settings'].get(k)}, now {new[k]}): {fix}")
    return todo
