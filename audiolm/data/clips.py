"""Clips: rows of the manifest (clips.parquet), and their audio as 16 kHz samples.

`start`, `frames` and `offset` count frames at the clip's own rate; `samples` count at 16 kHz.
Shapes: wav_T float32 mono at 16 kHz.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import pyarrow as pa

from audiolm import store
from audiolm.config.corpus import ClipFilter
from audiolm.data.audio import SAMPLE_RATE_HZ, open_sound, read_frames, resample, samples_at
from audiolm.data.clip_groups import ROWS, ClipGroups, finished_groups, groups_bytes
from audiolm.data.parquet import table_bytes
from audiolm.data.sources import locate


@dataclass(frozen=True)
class Part:
    """A stretch [start, start + frames) of a file, at `offset` inside its clip; `channel` where their mean is no sound."""

    id: str
    uri: str
    start: int
    frames: int
    offset: int
    text: str | None
    channel: int | None = None
    hash: str = ""  # audio_check.content_hash of the file, as the manifest saw it


@dataclass(frozen=True)
class Clip:
    """A row of the manifest; its uris are relative to the root of the corpus source `origin`.

    A clip of another `speed` is a copy that only token stores hold; its frames and parts are the original's."""

    id: str
    origin: str
    source: str
    speaker: str
    split: str
    sample_rate: int
    frames: int
    parts: tuple[Part, ...]
    shard: int = -1
    row: int = -1
    speed: float = 1.0

    @property
    def samples(self) -> int:
        """Length at 16 kHz."""
        n = samples_at(self.frames, self.sample_rate)
        return n if self.speed == 1 else samples_at(n, speed_hz(self.speed))

    @property
    def seconds(self) -> float:
        return self.frames / self.sample_rate / self.speed

    @property
    def text(self) -> str | None:
        """The parts' texts, or None where one has none."""
        texts = [p.text for p in self.parts]
        return None if None in texts else " ".join(texts)


def read_clips(manifest_path: str, split: str | None = None, where: ClipFilter | None = None) -> list[Clip]:
    """The clips of a manifest's folder in order of (shard, row); `where.source` takes a source's name or label.

    A clip takes 1.5 kB: for the train split of a large corpus read `clip_table.read_clip_table`."""
    return [clip for table, _ in ClipGroups(manifest_path).scan(None, split, where) for clip in clips_of(table)]


def token_clips(manifest_path: str, speeds: Sequence[float], split: str | None = None,
                where: ClipFilter | None = None) -> list[Clip]:
    """The rows of a token store: `read_clips`, and after each train shard's clips their copies, speed after speed.

    A copy's id is `{id}@{speed}`."""
    rows = []
    for _, members in groupby(read_clips(manifest_path, split), key=lambda c: c.shard):
        rows += _with_copies(list(members), speeds)
    # Filtered last: a clip's row is its place in the whole shard.
    named = None if where is None or where.source is None else set(where.source)
    return [c for c in rows if named is None or not named.isdisjoint((c.source, c.origin))]


def shard_clips(manifest_path: str, shard: int, speeds: Sequence[float] = ()) -> list[Clip]:
    """The clips of one shard of a finished manifest, and a train shard's copies at other speeds behind them."""
    return _with_copies(clips_of(finished_groups(manifest_path).shard(shard)), speeds)


def _with_copies(own: list[Clip], speeds: Sequence[float]) -> list[Clip]:
    """The clips of one shard and, of a train shard, their copies."""
    return own + [replace(c, id=f"{c.id}@{speed}", row=k * len(own) + c.row, speed=speed)
                  for k, speed in enumerate(speeds if own and own[0].split == "train" else (), 1) for c in own]


def clips_of(table: pa.Table) -> list[Clip]:
    """Rows of clips.parquet as clips."""
    return [Clip(**{**row, "parts": tuple(Part(**p) for p in row["parts"])}) for row in table.to_pylist()]


def clips_parquet(clips: list[Clip]) -> bytes:
    """clips.parquet: a row a clip, its parts nested; row groups of whole shards of one split (data/clip_groups.py)."""
    part = pa.struct([("id", "string"), ("uri", "string"), ("start", "int64"), ("frames", "int64"), ("offset", "int64"),
                      ("text", "string"), ("channel", "int64"), ("hash", "string")])
    schema = pa.schema([("id", "string"), ("origin", "string"), ("source", "string"), ("speaker", "string"),
                        ("split", "string"), ("sample_rate", "int64"), ("frames", "int64"), ("parts", pa.list_(part)),
                        ("shard", "int64"), ("row", "int64")])
    groups: list[list[Clip]] = []
    for _, shard in groupby(clips, key=lambda c: (c.split, c.shard)):
        members = list(shard)
        if not groups or len(groups[-1]) + len(members) > ROWS or groups[-1][0].split != members[0].split:
            groups.append([])
        groups[-1] += members
    return groups_bytes((pa.Table.from_pylist([{**vars(c), "parts": [vars(p) for p in c.parts]} for c in group], schema)
                         for group in groups), schema)


def parquet_bytes(rows: list[dict], columns: list[tuple]) -> bytes:
    """A Parquet file of the rows; `columns` are (name, Arrow type or its name)."""
    return table_bytes(pa.Table.from_pylist(rows, schema=pa.schema(columns)))


def speed_hz(speed: float) -> int:
    """The rate that 16 kHz audio is taken to have to change its speed; exact for speeds of three decimals."""
    return round(SAMPLE_RATE_HZ * speed)


def read_clip(clip: Clip, roots: dict[str, str], start: int = 0, samples: int | None = None) -> np.ndarray:
    """wav_T float32 mono at 16 kHz: the whole clip (`clip.samples`), or `samples` of it from `start`.

    A copy at another speed is the clip resampled as a whole, so its pitch moves too.  Raises FileNotFoundError for a
    file that is gone, ValueError for one that changed since the manifest and for a piece outside the clip."""
    return store.persist(f"clip {clip.id}", lambda: _read_clip(clip, roots, start, samples))


def _read_clip(clip: Clip, roots: dict[str, str], start: int, samples: int | None) -> np.ndarray:
    end = clip.samples if samples is None else start + samples
    if not 0 <= start <= end <= clip.samples:
        raise ValueError(f"clip {clip.id}: samples {start} to {end} asked for, it has {clip.samples}")
    if clip.origin not in roots:
        raise ValueError(f"clip {clip.id} comes from source {clip.origin!r}; corpus.sources are {sorted(roots)}")
    if clip.speed != 1:
        return resample(_read_clip(replace(clip, speed=1.0), roots, 0, None), speed_hz(clip.speed), SAMPLE_RATE_HZ)[start:end]
    # At another rate the whole clip is decoded: only resampling all of it gives the same samples for every piece.
    same_rate = clip.sample_rate == SAMPLE_RATE_HZ
    pieces, skipped = [], 0  # skipped: samples of the clip before the first piece
    for part in clip.parts:
        if same_rate and (part.offset >= end or part.offset + part.frames <= start):
            skipped += part.frames if part.offset < start else 0
            continue
        path, first, last = locate(roots[clip.origin], part.uri), 0, part.frames
        with open_sound(path) as f:
            # A jump may change the samples of lossy audio, so those parts are decoded from their start.
            if same_rate and f.exact:
                first, last = max(0, start - part.offset), min(part.frames, end - part.offset)
                skipped += first
            wav_T, rate = read_frames(f, part.start + first, last - first, part.channel), f.rate
        if rate != clip.sample_rate or len(wav_T) != last - first:
            raise ValueError(f"{path} is no longer what the manifest saw: {len(wav_T)} frames at {rate} Hz from frame "
                             f"{part.start + first}, expected {last - first} at {clip.sample_rate}; raise corpus.revision")
        pieces.append(wav_T)
    wav_T = np.concatenate([*pieces, np.zeros(0, np.float32)])
    return resample(wav_T, clip.sample_rate, SAMPLE_RATE_HZ)[start - skipped:end - skipped]
