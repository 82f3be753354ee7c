"""Test sets: single utterances of a manifest's clips, chosen by id, and their audio.

A clip may join several utterances; here each is a Clip of its own, `{origin}/{part id}`.  Choices depend on manifest and seed
alone, never on a model; `frozen` keeps them in a file, so that every checkpoint is scored on the same ones.
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
from audiolm.data.containers.layout import ENDINGS
from audiolm.eval.metrics.abx import Items, read_items
from audiolm.generate.prompts import whole_frames
from audiolm.tokenizers import codec_files
from audiolm.tokenizers.base import SAMPLE_RATE

HELD_OUT = ("test", "dev")
MIN_S, MAX_S = 4.0, 10.0  # 2209.03143, IV-B: utterances of 4 to 10 s


def utterances(manifest: str, split: str | None = None, where: ClipFilter | None = None) -> list[Clip]:
    """Every part of the manifest's clips as a Clip of its own."""
    return [replace(c, id=f"{c.origin}/{p.id}", frames=p.frames, parts=(replace(p, offset=0),))
            for c in read_clips(manifest, split, where) for p in c.parts]


def with_text(manifest: str, n: int, seed: int = 0, least_s: float = MIN_S, most_s: float = MAX_S,
              where: ClipFilter | None = None) -> list[Clip]:
    """At most n utterances with text that last least_s to most_s, of the test split (dev where it has none), speakers in turn.

    Raises ValueError where there are none."""
    for split in HELD_OUT:
        fit = [c for c in utterances(manifest, split, where) if c.text and least_s <= c.seconds <= most_s]
        if fit:
            return in_turn(fit, n, seed)
    raise ValueError(f"no held-out utterance of {least_s:g} to {most_s:g} s has a text: give the corpus transcripts and a test "
                     "or dev share")


def to_continue(manifest: str, n: int, seed: int = 0, least_s: float = 6.0, where: ClipFilter | None = None,
                most_s: float = MAX_S) -> list[Clip]:
    """At most n held-out utterances (test and dev) of at least least_s, speakers in turn, for prompts and their continuations.

    Where there are fewer, as of music, long ones give their stretches of most_s. Raises ValueError where there are none."""
    fit = [c for split in HELD_OUT for c in utterances(manifest, split, where) if c.seconds >= least_s]
    if len(fit) < n:
        fit = [s for c in fit for s in stretches(c, most_s)]
    if not fit:
        raise ValueError(f"no held-out utterance lasts {least_s:g} s: ask for less, or give the corpus a test or dev share")
    return in_turn(fit, n, seed)


def stretches(clip: Clip, seconds: float = MAX_S) -> list[Clip]:
    """The whole stretches of so many seconds of an utterance, {id}#0 and on, without text; itself where it has but one."""
    (part,), frames = clip.parts, round(seconds * clip.sample_rate)
    n = clip.frames // frames
    return [replace(clip, id=f"{clip.id}#{i}", frames=frames,
                    parts=(replace(part, start=part.start + i * frames, frames=frames, text=None),))
            for i in range(n)] if n > 1 else [clip]


def of_speakers(manifest: str, train: int, test: int, seed: int = 0, least_s: float = MIN_S, where: ClipFilter | None = None,
                most_speakers: int = 300) -> tuple[list[Clip], list[Clip]]:
    """(training, test) utterances of at least least_s for a speaker classifier, `train` and `test` of each speaker, disjoint.

    They come from the source with the most such speakers (of equals the first by name). The classifier trains on speakers of
    any split; it is tested on those that no model was trained on, where there are two, as in the paper.
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
    """At most n clips in an order drawn by seed, one of each speaker before a second of any."""
    order = rng.generator(seed, "utterances").permutation(len(clips))
    drawn: Counter[str] = Counter()  # clips of each speaker so far: the turn of the next one
    turns = []
    for place, i in enumerate(order):
        turns.append((drawn[clips[i].speaker], place, clips[i]))
        drawn[clips[i].speaker] += 1
    return [clip for _, _, clip in sorted(turns, key=lambda x: x[:2])[:n]]


def frozen(path: str, manifest: str, choose: Callable[[], Sequence[Clip]]) -> list[Clip]:
    """The utterances whose ids the JSON file `path` lists; without that file those of `choose()`, whose ids it then gets.

    Raises ValueError for an id that the manifest lacks."""
    if (ids := store.get_json(path)) is None:
        chosen = list(choose())
        store.put_json(path, [c.id for c in chosen])
        return chosen
    known = utterances(manifest)
    by_id = {c.id: c for c in known}
    if not by_id.keys() >= set(ids):
        by_id |= {s.id: s for c in known for s in stretches(c)}
    if missing := [i for i in ids if i not in by_id]:
        raise ValueError(f"{path} names {len(missing)} utterances that {manifest} has not, {missing[0]} say: give the manifest "
                         "that it was made of, or remove the file")
    return [by_id[i] for i in ids]


def read(clips: Sequence[Clip], roots: Mapping[str, str], most_s: float = MAX_S) -> list[tuple[Clip, np.ndarray]]:
    """(clip, wav_T) of each clip, cut to its first most_s seconds."""
    return [(c, whole_frames(read_clip(c, dict(roots), 0, min(c.samples, round(most_s * SAMPLE_RATE))))) for c in clips]


def groups_of(items: Items, wanted: tuple[str, ...] | None, manifest: str,
              where: ClipFilter) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """({"held_out", "test", "seen": speakers of the items}, remarks); a group without speakers is absent.

    A speaker is seen (test) where a train (test) clip names them or is cut from one of their files. The others are held out,
    those of dev clips and those of no clip; choices, as of a layer, are made on them. `wanted` takes their place; a remark
    names those of them that are trained on."""
    speakers = set(items.speaker.tolist())

    def of(split: str) -> set[str]:
        clips = read_clips(manifest, split, where)
        files = {posixpath.splitext(posixpath.basename(p.uri))[0] for c in clips for p in c.parts}
        return speakers & {c.speaker for c in clips} | set(items.speaker[np.isin(items.file, list(files))].tolist())

    seen, test = of("train"), of("test")
    held_out = set(wanted) if wanted else speakers - seen - test
    groups = {"held_out": held_out, "test": test - seen - held_out, "seen": seen - held_out}
    wrong = sorted(held_out & seen)
    remarks = [f"semantic.abx.speakers holds {', '.join(wrong)}, who are trained on: what is called held out is partly seen"]
    return {name: tuple(sorted(g)) for name, g in groups.items() if g}, remarks if wrong else []


def wav_of(path: str) -> np.ndarray:
    """wav_T at the pipeline's rate."""
    return resample(*decode(path), SAMPLE_RATE_HZ)


def items_and_audio(path: str, folders: Sequence[str], speakers: Sequence[str] | None,
                    field: str = "semantic.abx.audio") -> tuple[Items, dict[str, str]]:
    """(the triphones of an item file, of `speakers` alone where some are given, {file id: path of its audio}).

    Raises ValueError for a speaker without items, and as `audio_paths`."""
    items = read_items(path)
    items = items.of(speakers) if speakers else items
    return items, audio_paths(tuple(folders), set(items.file.tolist()), field)


def audio_paths(folders: tuple[str, ...], wanted: set[str], field: str = "semantic.abx.audio") -> dict[str, str]:
    """{file id of the items: path}. Raises ValueError naming `field` and a file that is in none of the folders."""
    paths = {posixpath.splitext(posixpath.basename(name))[0]: path
             for name, path in codec_files.find_files(list(folders), ENDINGS)}
    if missing := sorted(wanted - set(paths)):
        raise ValueError(f"{field}: {len(missing)} of the items' {len(wanted)} files lie nowhere below "
                         f"{', '.join(folders)}; the first is {missing[0]}")
    return {name: paths[name] for name in sorted(wanted)}
