"""The clips of a split as arrays of numbers, and each as a `Clip` when it is asked for: 16 bytes a clip in memory.

`shard_sizes` sums a token store's rows up by shard, of which its steps plan their tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow.compute as pc

from audiolm.config.corpus import ClipFilter
from audiolm.data.audio import samples_at
from audiolm.data.clip_groups import ClipGroups
from audiolm.data.clips import Clip, clips_of

KEPT = 32  # row groups, a few MB each: the shards of a window of crops, and those of the next


@dataclass(frozen=True)
class ClipTable:
    """Clip i has samples[i] at 16 kHz (int64) and lies in shard shards[i] (int32); table[i] reads it whole."""

    samples: np.ndarray
    shards: np.ndarray
    read: Callable[[int], Clip]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Clip:
        return self.read(i)


def read_clip_table(manifest_path: str, split: str, where: ClipFilter | None = None) -> ClipTable:
    """The clips of a split that `where` takes, in order of (shard, row). Threads may ask for clips at the same time."""
    groups, samples, shards, rows = ClipGroups(manifest_path), [np.zeros(0, np.int64)], [np.zeros(0, np.int32)], []
    for table, places in groups.scan(["frames", "sample_rate", "shard"], split, where):
        samples.append(samples_at(table["frames"].to_numpy(), table["sample_rate"].to_numpy()))
        shards.append(table["shard"].to_numpy().astype(np.int32))
        rows.append(places.astype(np.int32))
    rows_C, group = np.concatenate([np.zeros(0, np.int32), *rows]), lru_cache(KEPT)(groups.read)

    def read(i: int) -> Clip:
        """Clip i: one row of its row group, which stays in memory for the clips beside it."""
        row = int(rows_C[i])
        g = int(np.searchsorted(groups.firsts, row, side="right")) - 1
        return clips_of(group(g).slice(row - int(groups.firsts[g]), 1))[0]

    return ClipTable(np.concatenate(samples), np.concatenate(shards), read)


def shard_sizes(manifest_path: str, speeds: Sequence[float] = ()) -> tuple[np.ndarray, np.ndarray]:
    """(rows, seconds of audio) of each shard of a token store: its clips and, in a train shard, their copies at `speeds`.

    Raises ValueError unless the shards are 0, 1, 2, ..."""
    found = []
    for table, _ in ClipGroups(manifest_path).scan(["frames", "sample_rate", "shard", "split"]):
        numbers, of = np.unique(table["shard"].to_numpy(), return_inverse=True)
        train = pc.equal(table["split"], "train").to_numpy()
        audio_s = table["frames"].to_numpy() / table["sample_rate"].to_numpy()
        found.append((numbers, np.bincount(of, 1 + len(speeds) * train),
                      np.bincount(of, audio_s * (1 + sum(1 / speed for speed in speeds) * train))))
    numbers, rows, seconds = map(np.concatenate, zip(*found, strict=True))
    rows_S, seconds_S = np.bincount(numbers, rows).astype(np.int64), np.bincount(numbers, seconds)
    if not rows_S.all():
        raise ValueError(f"{manifest_path}: no clip lies in shard {int(np.argmin(rows_S))} of {len(rows_S)}; build it anew "
                         "with --force manifest")
    return rows_S, seconds_S
