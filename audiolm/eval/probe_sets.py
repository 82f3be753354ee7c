"""Spoken pairs of which one is right, read from a gold.csv: ZeroSpeech 2021's layout (sWUGGY, sBLIMP) and its likes.

Columns, whichever are there: filename (below the gold's folder; ZeroSpeech leaves its ending out), correct or is_word (1, 0),
voice, pair_id or id (with type and subtype where sentences are numbered within them), and frequency (how often the right word
occurs where models learn) or frequency_band.  What is right is paired with what is wrong by id and voice, in the file's order.
"""

from __future__ import annotations

import csv
import io
import posixpath
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from audiolm import store
from audiolm.data.sources import AUDIO

BANDS = {"oov": 0, "1-5": 5, "6-20": 20, "21-100": 100, ">100": float("inf")}  # the most; ZeroSpeech's script has 5 in 6-20
WORDS = ("is_word", "frequency", "frequency_band")  # columns that only words have
SENTENCES = ("subtype", "transcription")


@dataclass(frozen=True)
class Pair:
    """A right and a wrong recording (paths) of one voice; what several voices say has one id. `band` of words alone."""

    id: str
    voice: str
    right: str
    wrong: str
    band: str | None

    @property
    def known(self) -> bool:
        """In the vocabulary."""
        return self.band not in (None, "oov")


@dataclass(frozen=True)
class ProbeSet:
    """`kind`: words, sentences or stories; `official`: has ZeroSpeech's columns. `trigrams`: of a pair's id by how much phone
    trigrams favour the right word, where a pairs.csv beside the gold says so (its column d3)."""

    kind: str
    official: bool
    pairs: tuple[Pair, ...]
    trigrams: Mapping[str, float]


def read_probes(place: str) -> ProbeSet:
    """The pairs of a gold.csv, or of the one in a folder. Raises FileNotFoundError; ValueError for what cannot be paired."""
    gold = place if place.endswith(".csv") else store.join(place, "gold.csv")
    rows, folder = _table(gold), posixpath.dirname(gold)
    columns = rows[0].keys() if rows else ()
    right = next((c for c in ("correct", "is_word") if c in columns), None)
    name = next((c for c in ("pair_id", "id") if c in columns), None)
    if "filename" not in columns or not right or not name:
        raise ValueError(f"{gold}: columns {', '.join(columns) or 'none'}; filename, correct (or is_word) and pair_id (or id) "
                         "are needed, as in ZeroSpeech 2021's gold.csv")
    ending = {posixpath.splitext(n)[0]: n for n in store.names(folder) if n.lower().endswith(AUDIO)}
    groups: dict[tuple[str, str], tuple[list, list]] = defaultdict(lambda: ([], []))
    for row in rows:
        within = [row[c] for c in ("type", "subtype") if name == "id" and c in columns]
        groups["/".join([*within, row[name]]), row.get("voice", "")][row[right].strip() in ("1", "1.0")].append(row)
    pairs = []
    for (pair, voice), (wrong, good) in groups.items():
        if len(wrong) != len(good):
            raise ValueError(f"{gold}: pair {pair!r} of voice {voice!r} has {len(good)} right and {len(wrong)} wrong "
                             "recordings; each right one needs a wrong one")
        pairs += [Pair(pair, voice, *(_path(gold, folder, ending, r["filename"]) for r in (a, b)), band_of(a))
                  for a, b in zip(good, wrong, strict=True)]
    kind = next((k for k, own in (("words", WORDS), ("sentences", SENTENCES)) if any(c in columns for c in own)), "stories")
    beside = store.join(folder, "pairs.csv")
    trigrams = {r["pair_id"]: float(r["d3"]) for r in _table(beside) if r.get("d3")} if store.exists(beside) else {}
    return ProbeSet(kind, "frequency" in columns or "transcription" in columns, tuple(pairs), trigrams)


def band_of(row: Mapping[str, str]) -> str | None:
    """The frequency band of a right word; None where the gold has none."""
    if row.get("frequency", "").lower() in ("", "nan"):
        return row.get("frequency_band") or None
    count = float(row["frequency"])
    return next(band for band, most in BANDS.items() if count <= most)


def _table(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(store.get(path).decode("utf-8-sig"))))


def _path(gold: str, folder: str, ending: Mapping[str, str], filename: str) -> str:
    if filename.lower().endswith(AUDIO):
        return store.join(folder, filename)
    if filename not in ending:
        raise ValueError(f"{gold} names {filename!r}, and {folder} has no such audio ({', '.join(AUDIO)}): put it there")
    return store.join(folder, ending[filename])
