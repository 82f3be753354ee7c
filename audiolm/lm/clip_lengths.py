"""The lengths of a split's clips in semantic frames, as arrays: what a plan of 60,000 hours is made from.

Of the manifest a few columns are read, a batch of rows at a time.  On the way every shard's clips and lengths are
compared with those of the token stores, so that tokens of another manifest are refused before anything is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from audiolm import store
from audiolm.config.corpus import ClipFilter
from audiolm.data.audio import SAMPLE_RATE_HZ, samples_at
from audiolm.data.tokens import TokenError, TokenStore, clips_digest

COLUMNS = ["id", "origin", "source", "split", "sample_rate", "frames", "shard"]


@dataclass(frozen=True)
class ClipLengths:
    """Clip c has frames[c] semantic frames and is row rows[c] of its shard; shard shards[s] holds clips firsts[s] to
    firsts[s + 1], those that `where` takes."""

    frames: np.ndarray
    rows: np.ndarray
    shards: np.ndarray
    firsts: np.ndarray

    def shard_of(self, clip: int) -> int:
        return int(self.shards[np.searchsorted(self.firsts, clip, side="right") - 1])


def read_lengths(manifest_path: str, split: str, where: ClipFilter | None, hop: int, stores: Sequence[TokenStore]) -> ClipLengths:
    """Raises TokenError where a store holds other clips than the manifest, or clips of another length."""
    speeds = stores[0].speeds if split == "train" else ()
    frames, rows, shards, numbers = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)], [], []
    for k, ids, samples, taken in _shards(manifest_path, split, where):
        ids = [*ids, *(f"{i}@{speed}" for speed in speeds for i in ids)]  # a shard's copies stand behind its clips
        samples = np.concatenate([samples, *(samples_at(samples, round(speed * SAMPLE_RATE_HZ)) for speed in speeds)])
        taken = np.tile(taken, 1 + len(speeds))
        lengths = np.maximum(1, -(-samples // hop))
        digest = clips_digest(ids, lengths * hop)
        for tokens in stores:
            if k >= tokens.shards or tokens.files[k]["digest"] != digest:
                raise TokenError(f"{_difference(tokens, k, ids, lengths * hop)}; run the token steps again on this manifest")
        if taken.any():
            frames.append(lengths[taken].astype(np.int32))
            rows.append(np.flatnonzero(taken).astype(np.int32))
            shards.append(k)
            numbers.append(len(rows[-1]))
    return ClipLengths(np.concatenate(frames), np.concatenate(rows), np.array(shards, np.int64),
                   np.concatenate([[0], np.cumsum(numbers, dtype=np.int64)]))


def _shards(manifest_path: str, split: str, where: ClipFilter | None) -> Iterator[tuple[int, list[str], np.ndarray, np.ndarray]]:
    """(number, ids, samples at 16 kHz, whether `where` takes it) of the clips of each shard, in the manifest's order."""
    fs, p = store.open_fs(store.join(manifest_path, "clips.parquet"))
    held: list[tuple[list[str], np.ndarray, np.ndarray]] = []
    number = -1
    with fs.open(p, "rb") as f:
        for batch in pq.ParquetFile(f).iter_batches(65_536, columns=COLUMNS):
            batch = batch.filter(pc.equal(batch["split"], split))
            shard, ids = batch["shard"].to_numpy(), batch["id"]
            samples = samples_at(batch["frames"].to_numpy(), batch["sample_rate"].to_numpy())
            taken = np.ones(len(samples), bool)
            if where is not None and where.source is not None:
                named = [pc.is_in(batch[n], value_set=pa.array(where.source, pa.string())) for n in ("origin", "source")]
                taken = pc.or_(*named).to_numpy(zero_copy_only=False)
            cuts = [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(shard)]
            for a, b in zip(cuts, cuts[1:], strict=False):
                if a < b and shard[a] != number and held:
                    yield number, *_joined(held)
                    held = []
                if a < b:
                    number = int(shard[a])
                    held.append((ids[a:b].to_pylist(), samples[a:b], taken[a:b]))
    if held:
        yield number, *_joined(held)


def _joined(parts: list[tuple[list[str], np.ndarray, np.ndarray]]) -> tuple[list[str], np.ndarray, np.ndarray]:
    ids, samples, taken = zip(*parts, strict=True)
    return [i for part in ids for i in part], np.concatenate(samples), np.concatenate(taken)


def _difference(tokens: TokenStore, k: int, ids: list[str], samples: np.ndarray) -> str:
    if k >= tokens.shards:
        return f"the manifest has a shard {k}, {tokens.path} holds {tokens.shards}"
    found = tokens.read(k, ["id", "n_frames"])
    for row, name in enumerate(ids):
        if row >= len(found["id"]) or found["id"][row] != name:
            return f"clip {name} of the manifest is not row {row} of shard {k} of {tokens.path}"
        have, expected = int(found["n_frames"][row]), int(samples[row]) // tokens.spec["hop"]
        if have != expected:
            return f"clip {name} has {have} frames in {tokens.path}, its length in the manifest gives {expected}"
    return f"shard {k} of {tokens.path} has {len(found['id'])} clips, the manifest has {len(ids)}"
