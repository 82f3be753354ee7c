"""Lengths of a split's clips in semantic frames, as arrays that also hold a corpus of 60,000 hours.

A few columns of the manifest are read, a row group at a time.  Each shard's clips and lengths are compared with the
token stores by digest, so tokens of another manifest are refused before anything is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np

from audiolm.config.corpus import ClipFilter
from audiolm.data.audio import SAMPLE_RATE_HZ, samples_at
from audiolm.data.clip_groups import ClipGroups, passes
from audiolm.data.tokens import TokenError, TokenStore, clips_digest, run_starts

COLUMNS = ["id", "origin", "source", "sample_rate", "frames", "shard"]


@dataclass(frozen=True)
class ClipLengths:
    """Arrays by clip, numbered over the clips that `where` takes: clip c has frames[c] semantic frames and is row rows[c]
    of its shard; shard shards[s] holds the clips firsts[s] to firsts[s + 1]."""

    frames: np.ndarray
    rows: np.ndarray
    shards: np.ndarray
    firsts: np.ndarray

    def shard_of(self, clip: int) -> int:
        return int(self.shards[np.searchsorted(self.firsts, clip, side="right") - 1])


def read_lengths(manifest_path: str, split: str, where: ClipFilter | None, hop: int,
                 stores: Sequence[TokenStore]) -> ClipLengths:
    """Lengths of a split's clips in frames of `hop` samples at 16 kHz, without those that a store rejected.

    Raises TokenError where a store holds other clips than the manifest, or clips of another length.
    """
    speeds = stores[0].speeds if split == "train" else ()
    frames, rows, shards, counts = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)], [], []
    for k, runs in groupby(_manifest_runs(manifest_path, split, where), key=lambda run: run[0]):
        _, ids, samples, taken = zip(*runs, strict=True)
        ids, samples, taken = sum(ids, []), np.concatenate(samples), np.concatenate(taken)
        # a token store holds a shard's clips and behind them their copies at other speeds
        ids = [*ids, *(f"{i}@{speed}" for speed in speeds for i in ids)]
        at_speeds = [samples_at(samples, round(speed * SAMPLE_RATE_HZ)) for speed in speeds]
        samples, taken = np.concatenate([samples, *at_speeds]), np.tile(taken, 1 + len(speeds))
        lengths = np.maximum(1, -(-samples // hop))
        digest = clips_digest(ids, lengths * hop)
        for tokens in stores:
            if k >= tokens.shards or tokens.files[k]["digest"] != digest:
                raise TokenError(f"{_difference(tokens, k, ids, lengths * hop)}; run the token steps again on this manifest")
            if rejected := tokens.files[k]["rejected"]:
                taken = taken & ~np.isin(ids, rejected)
        if taken.any():
            frames.append(lengths[taken].astype(np.int32))
            rows.append(np.flatnonzero(taken).astype(np.int32))
            shards.append(k)
            counts.append(len(rows[-1]))
    return ClipLengths(np.concatenate(frames), np.concatenate(rows), np.array(shards, np.int64),
                       np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]))


def _manifest_runs(manifest_path: str, split: str,
                   where: ClipFilter | None) -> Iterator[tuple[int, list[str], np.ndarray, np.ndarray]]:
    """(shard, ids, samples at 16 kHz, True where `where` takes the clip) of runs of one shard, in the manifest's order."""
    for table, _ in ClipGroups(manifest_path).scan(COLUMNS, split):
        shard, ids = table["shard"].to_numpy(), table["id"]
        samples = samples_at(table["frames"].to_numpy(), table["sample_rate"].to_numpy())
        taken = passes(table, None, where)
        starts = np.flatnonzero(run_starts(shard)).tolist()
        for a, b in pairwise([*starts, len(shard)] if starts else []):
            yield int(shard[a]), ids[a:b].to_pylist(), samples[a:b], taken[a:b]


def _difference(tokens: TokenStore, k: int, ids: list[str], samples: np.ndarray) -> str:
    """Text that names the first clip in which shard k of a store and the manifest differ."""
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
