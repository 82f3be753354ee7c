"""Sets of spoken pairs, a right and a wrong recording each, read from folders in their published layouts.

* sWUGGY and sBLIMP of ZeroSpeech 2021: a gold.csv with id, filename, voice and correct; words have frequency, phones and
  length besides, sentences type, subtype and transcription.
* Spoken and topic StoryCloze of TWIST (2305.13009): no table.  NUMBER_STORY_correct.wav and, with the next number,
  NUMBER_STORY_incorrect.wav are a pair.
* Sets of one's own: a gold.csv with filename, correct (or is_word) and pair_id.
"""

from __future__ import annotations

import csv
import io
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from audiolm import store
from audiolm.data.containers.layout import ENDINGS

# Least frequency of each band. The scorer's bands are [0, 1), [1, 5), [5, 20), ...: 5 is in "6-20", whatever its name says.
BANDS = {"oov": 0, "1-5": 1, "6-20": 5, "21-100": 20, ">100": 100}
WORDS = ("is_word", "frequency", "frequency_band")  # columns that only words have
SENTENCES = ("subtype", "transcription")
STORY = re.compile(r"(\d+)_(.+)_(correct|incorrect)")


@dataclass(frozen=True)
class Pair:
    """A right and a wrong recording (paths) of one voice; pairs of several voices share an id.

    Words have a frequency `band` and a `length` in phones, sentences a `type`: what ZeroSpeech's tables are grouped by."""

    id: str
    voice: str
    right: str
    wrong: str
    band: str | None = None
    length: int | None = None
    type: str | None = None

    @property
    def known(self) -> bool:
        """True for a word in the vocabulary."""
        return self.band not in (None, "oov")


@dataclass(frozen=True)
class ProbeSet:
    """`kind`: words, sentences or stories; `official`: has ZeroSpeech's columns. `trigrams`: by pair id, by how much phone
    trigrams favour the right word, from the column d3 of a pairs.csv beside the gold."""

    kind: str
    official: bool
    pairs: tuple[Pair, ...]
    trigrams: Mapping[str, float]

    @property
    def files(self) -> list[str]:
        """The recordings: right, wrong, right, ..."""
        return [path for p in self.pairs for path in (p.right, p.wrong)]


def read_probes(place: str) -> ProbeSet:
    """The pairs of a gold.csv or of a folder. Raises FileNotFoundError; ValueError for recordings without a partner."""
    gold = place if place.endswith(".csv") else store.join(place, "gold.csv")
    if gold != place and not store.exists(gold):
        return _stories(place)
    rows, folder = _table(gold), posixpath.dirname(gold)
    columns = rows[0].keys() if rows else ()
    right = next((c for c in ("correct", "is_word") if c in columns), None)
    name = next((c for c in ("pair_id", "id") if c in columns), None)
    if "filename" not in columns or not right or not name:
        raise ValueError(f"{gold}: columns {', '.join(columns) or 'none'}; filename, correct (or is_word) and pair_id (or id) "
                         "are needed, as in ZeroSpeech 2021's gold.csv")
    groups: dict[tuple[str, str], tuple[list, list]] = defaultdict(lambda: ([], []))
    for row in rows:
        within = [row[c] for c in ("type", "subtype") if name == "id" and c in columns]
        groups["/".join([*within, row[name]]), row.get("voice", "")][row[right].strip() in ("1", "1.0")].append(row)
    pairs, path = [], _finder(gold)
    for (pair, voice), (wrong, good) in groups.items():
        if len(wrong) != len(good):
            raise ValueError(f"{gold}: pair {pair!r} of voice {voice!r} has {len(good)} right and {len(wrong)} wrong "
                             "recordings; each right one needs a wrong one")
        pairs += [Pair(pair, voice, path(a["filename"]), path(b["filename"]), band_of(a), _length(a), a.get("type") or None)
                  for a, b in zip(good, wrong, strict=True)]
    kinds = (("words", WORDS), ("sentences", SENTENCES))
    kind = next((kind for kind, names in kinds if any(c in columns for c in names)), "stories")
    beside = store.join(folder, "pairs.csv")
    trigrams = {r["pair_id"]: float(r["d3"]) for r in _table(beside) if r.get("d3")} if store.exists(beside) else {}
    return ProbeSet(kind, "frequency" in columns or "transcription" in columns, tuple(pairs), trigrams)


def _stories(folder: str) -> ProbeSet:
    """The pairs of a folder in StoryCloze's layout, in the order of their numbers."""
    found = {n: m for n in store.names(folder) if n.lower().endswith(ENDINGS)
             and (m := STORY.fullmatch(posixpath.splitext(n)[0]))}
    if not found:
        raise FileNotFoundError(f"{folder}: neither gold.csv (ZeroSpeech 2021) nor 0_STORY_correct.wav and "
                                "1_STORY_incorrect.wav (StoryCloze of TWIST): give the folder that holds them")
    by_right = {(int(m[1]) - (m[3] == "incorrect"), m[2], m[3]): store.join(folder, n) for n, m in found.items()}
    pairs = []
    for number, story in sorted({key[:2] for key in by_right}):
        right, wrong = (by_right.get((number, story, which)) for which in ("correct", "incorrect"))
        if right is None or wrong is None:
            partner = f"{number}_{story}_correct" if right is None else f"{number + 1}_{story}_incorrect"
            raise ValueError(f"{right or wrong} has no partner {partner} in its folder: put it there")
        pairs.append(Pair(f"{number}_{story}", "", right, wrong))
    return ProbeSet("stories", True, tuple(pairs), {})


def band_of(row: Mapping[str, str]) -> str | None:
    """The frequency band of a right word; None where the gold has none."""
    if row.get("frequency", "").lower() in ("", "nan"):
        return row.get("frequency_band") or None
    count = float(row["frequency"])
    return [band for band, least in BANDS.items() if count >= least][-1]


def _length(row: Mapping[str, str]) -> int | None:
    """The phones of a right word; None for what is no word."""
    if length := row.get("length"):
        return int(float(length))
    return len(row["phones"].split()) if row.get("phones") else None


def _table(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(store.get(path).decode("utf-8-sig"))))


def _finder(gold: str) -> Callable[[str], str]:
    """The path of a gold's filename, which may lack its ending. Each folder is listed once."""
    top = posixpath.dirname(gold)

    @cache
    def listed(folder: str) -> dict[str, str]:
        audio = [n for n in store.names(folder) if n.lower().endswith(ENDINGS)]
        return {key: n for n in audio for key in (n, posixpath.splitext(n)[0])}

    def find(filename: str) -> str:
        below, name = posixpath.split(filename)
        folder = store.join(top, below) if below else top
        if name not in listed(folder):
            raise ValueError(f"{gold} names {filename!r}, and {folder} has no such audio ({', '.join(ENDINGS)}): put it there")
        return store.join(folder, listed(folder)[name])

    return find
