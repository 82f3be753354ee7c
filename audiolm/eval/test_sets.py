"""Which recordings the tables of speech judge: single utterances of a manifest's clips, chosen by id, and their audio.

A clip may join several utterances; here each is a Clip of its own, `{origin}/{part id}`.  Choices follow from manifest and
seed alone, never from a model; `frozen` keeps them in a file, so that every checkpoint is judged on the same ones.
wav_T: float32 mono at 16 kHz, whole 40 ms frames.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from audiolm import rng, store
from audiolm.config.corpus import ClipFilter
from audiolm.data.audio import SAMPLE_RATE_HZ, decode, resample
from audiolm.data.clips import Clip, read_clip, read_clips
from audiolm.data.sources import AUDIO
from audiolm.eval.metrics.abx import Items
from audiolm.generate.prompts import whole_frames
from audiolm.tokenizers import codec_files
from audiolm.tokenizers.base import SAMPLE_RATE

HELD_OUT = ("test", "dev")
LEAST_S, MOST_S = 4.0, 10.0  # paper IV-B: utterances of 4 to 10 s


def utterances(manifest: str, split: str | None = None, where: ClipFilter | None = None) -> list[Clip]:
    """Every part of the manifest's clips as a Clip of its own."""
    return [replace(c, id=f"{c.origin}/{p.id}", frames=p.frames, parts=(replace(p, offset=0),))
            for c in read_clips(manifest, split, where) for p in c.parts]


def with_text(manifest: str, n: int, seed: int = 0, least_s: float = LEAST_S, most_s: float = MOST_S,
              where: ClipFilter | None = None) -> list[Clip]:
    """n utterances with text that last least_s to most_s, of the test split (dev where it has none), speakers in turn; fewer
    where there are fewer. Raises ValueError where there are none."""
    for split in HELD_OUT:
        fit = [c for c in utterances(manifest, split, where) if c.text and least_s <= c.seconds <= most_s]
        if fit:
            return in_turn(fit, n, seed)
    raise ValueError(f"no held-out utterance of {least_s:g} to {most_s:g} s has a text: give the corpus transcripts and a test "
                     "or dev share")


def to_continue(manifest: str, n: int, seed: int = 0, least_s: float = 6.0, where: ClipFilter | None = None) -> list[Clip]:
    """n held-out utterances (test and dev) of at least least_s, speakers in turn, for prompts and what follows them. Raises
    ValueError where there are none."""
    fit = [c for split in HELD_OUT for c in utterances(manifest, split, where) if c.seconds >= least_s]
    if not fit:
        raise ValueError(f"no held-out utterance lasts {least_s:g} s: ask for less, or give the corpus a test or dev share")
    return in_turn(fit, n, seed)


def of_speakers(manifest: str, train: int, test: int, seed: int = 0, least_s: float = LEAST_S, where: ClipFilter | None = None,
                most_speakers: int = 300) -> tuple[list[Clip], list[Clip]]:
    """(training, test) utterances of at least least_s for a speaker classifier: of each speaker `train` and `test` of them,
    disjoint, from the one source that has the most such speakers (of equals the one whose name comes first). Speakers of any
    split know and are known; tested on are those that no model was trained on, where there are two, as in the paper.

    Raises ValueError where no source has two speakers with so many.
    """
    sources: dict[str, dict[str, list[Clip]]] = {}
    for clip in utterances(manifest, where=where):
        if clip.seconds >= least_s:
            sources.setdefault(clip.source, {}).setdefault(clip.speaker, []).append(clip)
    rich = {s: {k: v for k, v in of.items() if len(v) >= train + test} for s, of in sources.items()}
    source = max(sorted(rich), key=lambda s: len(rich[s]), default=None)
    if source is None or len(rich[source]) < 2:
        raise ValueError(f"no source has two speakers with {train + test} utterances of {least_s:g} s: ask for fewer, or give "
                         "recordings of speakers with more")
    held = sorted(k for k, own in rich[source].items() if own[0].split in HELD_OUT)
    names = (held + sorted(rich[source].keys() - set(held)))[:most_speakers]
    tested = held if len(held) > 1 else names
    drawn = {k: in_turn(rich[source][k], train + test, seed) for k in names}
    return [c for k in names for c in drawn[k][test:]], [c for k in names if k in tested for c in drawn[k][:test]]


def in_turn(clips: Sequence[Clip], n: int, seed: int) -> list[Clip]:
    """At most n clips, drawn by seed, one of each speaker before a second of any."""
    order = rng.generator(seed, "utterances").permutation(len(clips))
    turn: Counter[str] = Counter()
    placed = []
    for place, i in enumerate(order):
        placed.append((turn[clips[i].speaker], place, clips[i]))
        turn[clips[i].speaker] += 1
    return [clip for _, _, clip in sorted(placed, key=lambda x: x[:2])[:n]]


def frozen(path: str, manifest: str, choose: Callable[[], Sequence[Clip]]) -> list[Clip]:
    """The utterances whose ids stand in the JSON file `path`; what `choose()` gives, written there, where there is none.
    Raises ValueError for an id that the manifest has not."""
    if (ids := store.get_json(path)) is None:
        chosen = list(choose())
        store.put_json(path, [c.id for c in chosen])
        return chosen
    by_id = {c.id: c for c in utterances(manifest)}
    if missing := [i for i in ids if i not in by_id]:
        raise ValueError(f"{path} names {len(missing)} utterances that {manifest} has not, {missing[0]} say: give the manifest "
                         "that it was made of, or remove the file")
    return [by_id[i] for i in ids]


def read(clips: Sequence[Clip], roots: Mapping[str, str], most_s: float = MOST_S) -> list[tuple[Clip, np.ndarray]]:
    """(clip, wav_T) of the start of each clip, at most most_s."""
    return [(c, whole_frames(read_clip(c, dict(roots), 0, min(c.samples, round(most_s * SAMPLE_RATE))))) for c in clips]


def groups_of(items: Items, wanted: tuple[str, ...] | None, manifest: str,
              where: ClipFilter) -> tuple[dict[str, tuple[str, ...]], list[str]]:
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
    found = {posixpath.splitext(posixpath.basename(name))[0]: path for name, path in codec_files.find_files(list(folders), AUDIO)}
    if missing := sorted(wanted - set(found)):
        raise ValueError(f"{field}: {len(missing)} of the items' {len(wanted)} files lie nowhere below "
                         f"{', '.join(folders)}; the first is {missing[0]}")
    return {name: found[name] for name in sorted(wanted)}
