"""Splits: train, dev or test for every usable stretch of audio, by speaker, before anything is joined.

First come the speakers named by corpus.hold_out, then the splits that the corpus itself gives.  A speaker whose other
audio has a split keeps that.  The rest is split by speaker within each source, by hours, drawn from (seed, "split",
source).  If no dev clip results, dev speakers of the largest train source are held out, and test speakers where there
is neither.  A corpus of one speaker is split by chapter, file or piece.  A source of one speaker within a larger corpus
is train, so that dev and test speakers stay unseen.
"""

from __future__ import annotations

from dataclasses import dataclass

from audiolm import rng
from audiolm.config.base import ConfigError
from audiolm.config.corpus import CorpusConfig
from audiolm.data.sources import Found


@dataclass(frozen=True)
class Unit:
    """A usable stretch of one file: piece `piece` of `pieces` of row `row` of the sorted listing; `channel` as in Part."""

    row: int
    found: Found
    sample_rate: int
    start: int
    frames: int
    piece: int
    pieces: int
    channel: int | None = None

    @property
    def seconds(self) -> float:
        return self.frames / self.sample_rate

    @property
    def speaker(self) -> str:
        """The speaker's name; an unnamed speaker is its file."""
        return self.found.speaker or self.found.uri

    @property
    def group(self) -> tuple[str, str]:
        """The source whose hours are shared out."""
        return self.found.origin, self.found.source

    @property
    def chapter(self) -> tuple[str | None, ...]:
        """The chapter whose utterances may be joined, with all that makes it unique."""
        return (*self.group, self.found.speaker, self.found.chapter)


def assign(units: list[Unit], corpus: CorpusConfig, seed: int) -> tuple[list[str], list[str]]:
    """(the split of every unit, remarks for the user). Raises ConfigError where nothing is left to train on."""
    named = {speaker: split for split, speakers in corpus.hold_out.items() for speaker in speakers}
    if unknown := sorted(set(named) - {u.speaker for u in units}):
        raise ConfigError(f"corpus.hold_out names {unknown}, who have no audio in this corpus; its speakers are "
                          f"{', '.join(sorted({u.speaker for u in units})[:10])} ...")
    splits: list[str | None] = [named.get(u.speaker, u.found.split) for u in units]
    # A speaker with any split keeps it everywhere, so that no held-out voice is trained on.
    known: dict[tuple[str, str], str] = {}
    for u, split in zip(units, splits, strict=True):
        if split and u.found.speaker:
            known.setdefault((u.found.origin, u.speaker), split)
    remarks, shares = [], {"dev": corpus.dev, "test": corpus.test}
    alone = len({(u.found.origin, u.speaker) for u in units}) == 1
    for group in sorted({u.group for u, s in zip(units, splits, strict=True) if s is None}):
        free = []
        for i, u in enumerate(units):
            if u.group == group and splits[i] is None:
                splits[i] = known.get((u.found.origin, u.speaker))
                if splits[i] is None:
                    free.append(i)
        if not free:
            continue
        what, n, _ = _split_by_hours(units, splits, free, shares, seed, alone)
        if alone:
            remarks.append(f"one speaker only: split by {what}, so held-out clips are of a speaker that was trained on")
        elif n == 1:
            remarks.append(f"source {group[1]}: one speaker only, all of it is train")
        # Later sources of the same corpus source keep to the split that was drawn here.
        for u, split in ((units[i], splits[i]) for i in free if not alone and units[i].found.speaker):
            known.setdefault((u.found.origin, u.speaker), split)
    if "dev" not in splits and corpus.dev > 0:
        missing = {k: v for k, v in shares.items() if k == "dev" or not {"dev", "test"} & set(splits)}
        remarks.append(_hold_out_of_train(units, splits, missing, seed))
    elif "dev" not in splits:
        remarks.append("no dev clip: corpus.dev is 0 and the corpus names none")
    if units and "train" not in splits:
        raise ConfigError(f"corpus {corpus.name!r} has no train clip, only {sorted(set(splits))}; say in "
                          "corpus.sources.splits which folders are train, such as splits: {dev-clean: train}, "
                          "or leave corpus.sources.split out")
    return splits, remarks


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


def _split_by_hours(units: list[Unit], splits: list[str | None], chosen: list[int], shares: dict[str, float], seed: int,
                    alone: bool) -> tuple[str, int, dict]:
    """Splits the chosen units of one source in place; returns (what was kept whole, how many of them, those held out).

    Speakers are kept whole; in a corpus of one speaker, the largest of chapters, files or pieces that come to three."""
    levels = [(lambda u: u.found.chapter or "", "chapter"), (lambda u: u.found.uri, "file"),
              (lambda u: (u.found.uri, u.start), "piece")]
    key, what = (lambda u: u.speaker), "speaker"
    if alone:
        key, what = next((lv for lv in levels if len({lv[0](units[i]) for i in chosen}) >= 3), levels[-1])
    seconds: dict = {}
    for i in chosen:
        seconds[key(units[i])] = seconds.get(key(units[i]), 0.0) + units[i].seconds
    held = hold_out(seconds, shares, seed, "/".join(units[chosen[0]].group))
    for i in chosen:
        splits[i] = held.get(key(units[i]), "train")
    return what, len(seconds), held


def _hold_out_of_train(units: list[Unit], splits: list[str | None], shares: dict[str, float], seed: int) -> str:
    """Moves speakers out of the largest train source, in place; returns the remark."""
    train: dict[tuple[str, str], list[int]] = {}
    for i, split in enumerate(splits):
        if split == "train":
            train.setdefault(units[i].group, []).append(i)
    if not train:
        return "no dev clip, and no train clip to hold out"
    # A source of several speakers is preferred: one of a single speaker would lose it from training.
    many = {g: ids for g, ids in train.items() if len({units[i].speaker for i in ids}) > 1}
    group, chosen = max((many or train).items(), key=lambda item: (sum(units[i].seconds for i in item[1]), item[0]))
    what, _, held = _split_by_hours(units, splits, chosen, shares, seed, alone=not many)
    if not held:
        return "no dev clip: there is only one piece of audio to train on"
    counts = ", ".join(f"{list(held.values()).count(s)} as {s}" for s in shares)
    return f"the corpus names no dev: held out of source {group[1]} by {what}: {counts}"
