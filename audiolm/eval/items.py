"""Which recordings the tables of speech judge: single utterances of a manifest's clips, chosen by id, and their audio.

A clip may join several utterances; here each is a Clip of its own, `{origin}/{part id}`.  Choices follow from manifest and
seed alone, never from a model; `frozen` keeps them in a file, so that every checkpoint is judged on the same ones.
wav_T: float32 mono at 16 kHz, whole 40 ms frames.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from audiolm import rng, store
from audiolm.config import Where
from audiolm.data.audio import read_clip
from audiolm.data.manifest import Clip, read_clips
from audiolm.lm.generation import whole_frames
from audiolm.tokenizers.base import SAMPLE_RATE

HELD_OUT = ("test", "dev")
LEAST_S, MOST_S = 4.0, 10.0  # paper IV-B: utterances of 4 to 10 s


def utterances(manifest: str, split: str | None = None, where: Where | None = None) -> list[Clip]:
    """Every part of the manifest's clips as a Clip of its own."""
    return [replace(c, id=f"{c.origin}/{p.id}", frames=p.frames, parts=(replace(p, offset=0),))
            for c in read_clips(manifest, split, where) for p in c.parts]


def with_text(manifest: str, n: int, seed: int = 0, least_s: float = LEAST_S, most_s: float = MOST_S,
              where: Where | None = None) -> list[Clip]:
    """n utterances with text that last least_s to most_s, of the test split (dev where it has none), speakers in turn; fewer
    where there are fewer. Raises ValueError where there are none."""
    for split in HELD_OUT:
        fit = [c for c in utterances(manifest, split, where) if c.text and least_s <= c.seconds <= most_s]
        if fit:
            return in_turn(fit, n, seed)
    raise ValueError(f"no held-out utterance of {least_s:g} to {most_s:g} s has a text: give the corpus transcripts and a test "
                     "or dev share")


def to_continue(manifest: str, n: int, seed: int = 0, least_s: float = 6.0, where: Where | None = None) -> list[Clip]:
    """n held-out utterances (test and dev) of at least least_s, speakers in turn, for prompts and what follows them. Raises
    ValueError where there are none."""
    fit = [c for split in HELD_OUT for c in utterances(manifest, split, where) if c.seconds >= least_s]
    if not fit:
        raise ValueError(f"no held-out utterance lasts {least_s:g} s: ask for less, or give the corpus a test or dev share")
    return in_turn(fit, n, seed)


def of_speakers(manifest: str, train: int, test: int, seed: int = 0, least_s: float = LEAST_S, where: Where | None = None,
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
