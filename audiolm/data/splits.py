"""Splits: train, dev or test for every usable stretch of audio, by speaker, before anything is joined.

First come the speakers named by corpus.hold_out, then the splits that the corpus itself gives.  A speaker whose other
audio has a split keeps that.  The rest is split by speaker within each source, by hours, drawn from (seed, "split",
source).  If no dev clip results, dev speakers of the largest train source are held out, and test speakers where there
is neither.  A corpus of one speaker is split by chapter, file or piece.  A source of one speaker within a larger corpus
is train, so that dev and test speakers stay unseen.  Names that differ in case or spaces alone are one speaker.  Stretches
of one recording that overlap, copies of a file included, share a split (overlaps.py).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

from audiolm import rng
from audiolm.config.base import ConfigError
from audiolm.config.corpus import CorpusConfig
from audiolm.data.overlaps import overlapping, repeated, share_splits
from audiolm.data.units import Unit


def assign(units: list[Unit], corpus: CorpusConfig, seed: int,
           contents: Mapping[tuple[str, str], str] | None = None) -> tuple[list[str], list[str]]:
    """(the split of every unit, remarks for the user). `contents`: {(origin, uri): hash of the file}, for copies of a file.

    Raises ConfigError where nothing is left to train on."""
    groups = overlapping(units, contents or {})
    people = _who_share_audio(units, _people(units), groups)
    given = _given(units, people, corpus)
    splits = list(given)
    # A speaker with any split keeps it everywhere, so that no held-out voice is trained on.
    known: dict[tuple[str, str], str] = {}
    for u, who, split in zip(units, people, splits, strict=True):
        if split and u.found.speaker:
            known.setdefault((u.found.origin, who), split)
    remarks, shares = repeated(units, contents or {}), {"dev": corpus.dev, "test": corpus.test}
    alone = len({(u.found.origin, who) for u, who in zip(units, people, strict=True)}) == 1
    draw = _Draw(units, people, {i: group[0] for group in groups for i in group}, seed)
    for group in sorted({u.group for u, s in zip(units, splits, strict=True) if s is None}):
        free = []
        for i, u in enumerate(units):
            if u.group == group and splits[i] is None:
                splits[i] = known.get((u.found.origin, people[i]))
                if splits[i] is None:
                    free.append(i)
        if not free:
            continue
        what, n, _ = draw.split_by_hours(splits, free, shares, alone)
        if alone:
            remarks.append(f"one speaker only: split by {what}, so held-out clips are of a speaker that was trained on")
        elif n == 1:
            remarks.append(f"source {group[1]}: one speaker only, all of it is train")
        # Later sources of the same corpus source keep to the split that was drawn here.
        for i in (i for i in free if not alone and units[i].found.speaker):
            known.setdefault((units[i].found.origin, people[i]), splits[i])
    if "dev" not in splits and corpus.dev > 0:
        missing = {k: v for k, v in shares.items() if k == "dev" or not {"dev", "test"} & set(splits)}
        remarks.append(_hold_out_of_train(draw, splits, missing))
    elif "dev" not in splits:
        remarks.append("no dev clip: corpus.dev is 0 and the corpus names none")
    remarks += share_splits(units, splits, given, groups)
    if units and "train" not in splits:
        fewer = "; or name fewer speakers in corpus.hold_out" if corpus.hold_out else ""
        raise ConfigError(f"corpus {corpus.name!r} has no train clip, only {sorted(set(splits))}; say in "
                          "corpus.sources.splits which folders are train, such as splits: {dev-clean: train}, "
                          f"or leave corpus.sources.split out{fewer}")
    return splits, remarks + _same_names(units, people, splits)


def _people(units: list[Unit]) -> list[str]:
    """The speaker of each unit: one name for those of a source that differ in case, spaces or Unicode form alone."""
    names: dict[tuple[str, str], str] = {}
    for u in units:
        if u.found.speaker:
            key = u.found.origin, _folded(u.speaker)
            names[key] = min(u.speaker, names.get(key, u.speaker))
    return [names.get((u.found.origin, _folded(u.speaker)), u.speaker) if u.found.speaker else u.speaker for u in units]


def _who_share_audio(units: list[Unit], people: list[str], groups: list[list[int]]) -> list[str]:
    """The people, those of a source as one who have the same audio, as under two names; unless fewer than three are left."""
    merged = {(u.found.origin, who): who for u, who in zip(units, people, strict=True)}

    def root(origin: str, who: str) -> str:
        while (up := merged[origin, who]) != who:
            who = up
        return who

    for group in groups:
        for i, j in zip(group, group[1:], strict=False):
            if (origin := units[i].found.origin) == units[j].found.origin:
                a, b = sorted((root(origin, people[i]), root(origin, people[j])))
                merged[origin, b] = a
    together = [root(u.found.origin, who) for u, who in zip(units, people, strict=True)]
    return together if len({(u.found.origin, who) for u, who in zip(units, together, strict=True)}) >= 3 else people


def _folded(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _given(units: list[Unit], people: list[str], corpus: CorpusConfig) -> list[str | None]:
    """The splits by corpus.hold_out, else those that the corpus itself gives. Raises ConfigError for an unknown speaker."""
    named = {_folded(speaker): split for split, speakers in corpus.hold_out.items() for speaker in speakers}
    own = [_folded(u.speaker) for u in units]
    there = set(own)
    if unknown := sorted(s for speakers in corpus.hold_out.values() for s in speakers if _folded(s) not in there):
        raise ConfigError(f"corpus.hold_out names {unknown}, who have no audio in this corpus; its speakers are "
                          f"{', '.join(sorted({u.speaker for u in units})[:10])} ...")
    # Held out with them: what a person said under another name.
    under = {(u.found.origin, who): named[name] for u, who, name in zip(units, people, own, strict=True) if name in named}
    return [named.get(name) or under.get((u.found.origin, who)) or u.found.split
            for u, who, name in zip(units, people, own, strict=True)]


def _same_names(units: list[Unit], people: list[str], splits: list[str]) -> list[str]:
    """The remark on speakers whose name is in train and is held out, as in two sources, or by the corpus' own splits."""
    sets: dict[str, set[str]] = {}
    for u, who, split in zip(units, people, splits, strict=True):
        if u.found.speaker:
            sets.setdefault(who, set()).add("train" if split == "train" else "held out")
    both = sorted(who for who, found in sets.items() if len(found) > 1)
    if not both or len(sets) == 1:
        return []
    more = " ..." if len(both) > 5 else ""
    return [f"{len(both)} speakers' names are in train and are held out: {', '.join(both[:5])}{more}; if they are the same "
            "people, name them in corpus.hold_out"]


def hold_out(seconds: dict, shares: dict[str, float], seed: int, name: str) -> dict:
    """{key: "dev" or "test"} of the keys held out so that their seconds come near the shares; the others are train.

    A share above 0 gets at least one key as long as one is left to train on.  The draw is a function of (seed, name)."""
    keys = sorted(seconds)
    order = [keys[i] for i in rng.generator(seed, f"split {name}").permutation(len(keys))]
    total, held = sum(seconds.values()), {}
    for split, share in shares.items():
        left, got, chosen = [k for k in order if k not in held], 0.0, []
        if share == 0 or len(left) < 2:
            continue
        for k in left:
            # Taken where it brings the sum nearer to the share; one key at least is left for training.
            if len(chosen) + 1 < len(left) and seconds[k] < 2 * (share * total - got):
                chosen.append(k)
                got += seconds[k]
        chosen = chosen or [min(left, key=lambda k: seconds[k])]  # every key is too large: the smallest
        held.update(dict.fromkeys(chosen, split))
    return held


@dataclass(frozen=True)
class _Draw:
    """Draws of a corpus. `together`: {unit: the first unit of those that it overlaps}."""

    units: list[Unit]
    people: list[str]
    together: dict[int, int]
    seed: int

    def split_by_hours(self, splits: list[str | None], chosen: list[int], shares: dict[str, float],
                       alone: bool) -> tuple[str, int, dict]:
        """Splits the chosen units of one source in place; returns (what was kept whole, how many of them, those held out).

        Speakers are kept whole; in a corpus of one speaker, the largest of chapters, files or pieces that come to three."""
        units = self.units
        levels = [(lambda i: units[i].found.chapter or "", "chapter"), (lambda i: units[i].found.key, "file"),
                  (lambda i: (units[j := self.together.get(i, i)].found.key, units[j].start), "piece")]
        key, what = (lambda i: self.people[i]), "speaker"
        if alone:
            key, what = next((lv for lv in levels if len({lv[0](i) for i in chosen}) >= 3), levels[-1])
        seconds: dict = {}
        for i in chosen:
            seconds[key(i)] = seconds.get(key(i), 0.0) + units[i].seconds
        held = hold_out(seconds, shares, self.seed, "/".join(units[chosen[0]].group))
        for i in chosen:
            splits[i] = held.get(key(i), "train")
        return what, len(seconds), held


def _hold_out_of_train(draw: _Draw, splits: list[str | None], shares: dict[str, float]) -> str:
    """Moves speakers out of the largest train source, in place; returns the remark."""
    units, train = draw.units, {}
    for i, split in enumerate(splits):
        if split == "train":
            train.setdefault(units[i].group, []).append(i)
    if not train:
        return "no dev clip, and no train clip to hold out"
    # A source of several speakers is preferred: one of a single speaker would lose it from training.
    many = {g: ids for g, ids in train.items() if len({draw.people[i] for i in ids}) > 1}
    group, chosen = max((many or train).items(), key=lambda item: (sum(units[i].seconds for i in item[1]), item[0]))
    what, _, held = draw.split_by_hours(splits, chosen, shares, alone=not many)
    if not held:
        return "no dev clip: there is only one piece of audio to train on"
    counts = ", ".join(f"{list(held.values()).count(s)} as {s}" for s in shares)
    return f"the corpus names no dev: held out of source {group[1]} by {what}: {counts}"
