"""The manifest: every usable clip of a corpus with its speaker, split, source and place in the shards.

`build_manifest` is the step.  It leaves, whole: clips.parquet (a row a clip, its parts nested), rejected.parquet
(what cannot be used and why) and listing.parquet (every file with size, stamp and a hash of its first and last
64 KB).  The same corpus, config and seed give the same bytes, whatever the number of workers.
start, frames, offset are frames at the clip's own rate; `samples` are at 16 kHz.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from audiolm import store
from audiolm.config.corpus import ClipFilter
from audiolm.data.audio import LOSSLESS, SAMPLE_RATE_HZ, _read, open_sound, resample, samples_at
from audiolm.data.sources import locate


@dataclass(frozen=True)
class Part:
    """A stretch [start, start + frames) of a file, at `offset` inside its clip."""

    id: str
    uri: str
    start: int
    frames: int
    offset: int
    text: str | None


@dataclass(frozen=True)
class Clip:
    """A row of the manifest; `origin` is the corpus source whose root its uris are relative to. One of another `speed` is a
    copy that stands in token stores alone; frames and parts are the original's."""

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
    """The clips of a manifest's folder in order of (shard, row); `where.source` takes a source's name or label."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(store.get(store.join(manifest_path, "clips.parquet"))))
    if split:
        table = table.filter(pc.equal(table["split"], split))
    columns = [table[n].to_pylist() for n in table.column_names]
    clips = []
    for values in zip(*columns, strict=True):
        row = dict(zip(table.column_names, values, strict=True))
        if _wanted(where, row["source"], row["origin"]):
            clips.append(Clip(**{**row, "parts": tuple(Part(**p) for p in row["parts"])}))
    return clips


def token_clips(manifest_path: str, speeds: Sequence[float], split: str | None = None,
                where: ClipFilter | None = None) -> list[Clip]:
    """The rows of a token store: `read_clips`, and after a shard's own the copies of its train clips, a speed after the other,
    with ids `{id}@{speed}`."""
    found = []
    for _, members in groupby(read_clips(manifest_path, split), key=lambda c: c.shard):
        own = list(members)
        found += own
        for k, speed in enumerate(speeds if own[0].split == "train" else (), 1):
            found += [replace(c, id=f"{c.id}@{speed}", row=k * len(own) + c.row, speed=speed) for c in own]
    return [c for c in found if _wanted(where, c.source, c.origin)]


def _wanted(where: ClipFilter | None, source: str, origin: str) -> bool:
    return where is None or where.source is None or not {source, origin}.isdisjoint(where.source)


def clips_parquet(clips: list[Clip]) -> bytes:
    import pyarrow as pa

    part = [("id", "string"), ("uri", "string"), ("start", "int64"), ("frames", "int64"), ("offset", "int64"),
            ("text", "string")]
    parts = pa.list_(pa.struct([(n, pa.type_for_alias(t)) for n, t in part]))
    rows = [{**vars(c), "parts": [vars(p) for p in c.parts]} for c in clips]
    return _parquet(rows, [("id", "string"), ("origin", "string"), ("source", "string"), ("speaker", "string"),
                           ("split", "string"), ("sample_rate", "int64"), ("frames", "int64"), ("parts", parts),
                           ("shard", "int64"), ("row", "int64")])


def _parquet(rows: list[dict], columns: list[tuple]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(n, pa.type_for_alias(t) if isinstance(t, str) else t) for n, t in columns])
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
    return sink.getvalue()


def speed_hz(speed: float) -> int:
    """The rate at which 16 kHz audio is heard at another speed; whole for speeds of three decimals."""
    return round(SAMPLE_RATE_HZ * speed)


def read_clip(clip: Clip, roots: dict[str, str], start: int = 0, samples: int | None = None) -> np.ndarray:
    """wav_T float32 mono at 16 kHz: the whole clip (`clip.samples`), or `samples` of it from `start`. A copy at another
    speed is the clip resampled as a whole, so its pitch moves too.

    Raises FileNotFoundError where a file is gone, ValueError where it is no longer what the manifest saw or where the
    piece lies outside the clip."""
    end = clip.samples if samples is None else start + samples
    if not 0 <= start <= end <= clip.samples:
        raise ValueError(f"clip {clip.id}: samples {start} to {end} asked for, it has {clip.samples}")
    if clip.origin not in roots:
        raise ValueError(f"clip {clip.id} comes from source {clip.origin!r}; corpus.sources are {sorted(roots)}")
    if clip.speed != 1:
        return resample(read_clip(replace(clip, speed=1.0), roots), speed_hz(clip.speed), SAMPLE_RATE_HZ)[start:end]
    same = clip.sample_rate == SAMPLE_RATE_HZ  # then only the parts that the piece touches are needed
    pieces, skipped = [], 0
    for part in clip.parts:
        if same and (part.offset >= end or part.offset + part.frames <= start):
            skipped += part.frames if part.offset < start else 0
            continue
        path, first, last = locate(roots[clip.origin], part.uri), 0, part.frames
        with open_sound(path) as f:
            if same and f.format in LOSSLESS:  # and of those only the frames; elsewhere a jump may change the sound
                first, last = max(0, start - part.offset), min(part.frames, end - part.offset)
                skipped += first
            wav_T, rate = _read(f, part.start + first, last - first), f.samplerate
        if rate != clip.sample_rate or len(wav_T) != last - first:
            raise ValueError(f"{path} is no longer what the manifest saw: {len(wav_T)} frames at {rate} Hz from frame "
                             f"{part.start + first}, expected {last - first} at {clip.sample_rate}; raise corpus.revision")
        pieces.append(wav_T)
    wav_T = np.concatenate([*pieces, np.zeros(0, np.float32)])
    return resample(wav_T, clip.sample_rate, SAMPLE_RATE_HZ)[start - skipped:end - skipped]
