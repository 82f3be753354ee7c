"""The index of a token store: `shards.parquet`, written once every shard is there, with a row for each.

A store of 60,000 shards is so opened by one listing and one file.  A row holds what the shard's footer says of it, the
size of its file and, of a semantic store, n_dedup of its clips; the metadata is what all shards share.
S: shards, R: rows (clips and their copies) of all shards, Q: levels, V: codes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from audiolm import store
from audiolm.data import parquet

NAME = "shards.parquet"
KEY = b"audiolm.tokens"  # of the metadata of an index, and of every shard
ROW_GROUP = 4096  # shards
FIELDS = ["size", "clips", "frames", "digest", "rejected"]


class TokenError(ValueError):
    """A token store that cannot be used; the text names the file, what it holds and the fix."""


@dataclass(frozen=True)
class ShardRecord:
    """What the index and the step's facts need of one shard file of `size` bytes."""

    meta: dict[str, Any]  # what it shares with all shards of the store
    shard: int
    size: int
    clips: int
    copies: int  # of the clips: the last ones, at other speeds
    frames: int
    digest: str
    rejected: list[str]
    n_dedup: np.ndarray | None  # by clip, of a semantic shard
    counts_QV: np.ndarray  # uses of each code by the clips that are no copies


class IndexBuilder:
    """The index as shards end, in any order; its memory is taken at the start. `rows_S`: the clips of each shard."""

    def __init__(self, rows_S: np.ndarray, dedup: bool):
        self.meta: dict[str, Any] = {}
        self.done_S = np.zeros(len(rows_S), bool)
        self._rows_S, self._firsts = rows_S, np.concatenate([[0], np.cumsum(rows_S, dtype=np.int64)])
        self._size_S, self._frames_S = np.zeros(len(rows_S), np.int64), np.zeros(len(rows_S), np.int64)
        self._digest_S, self._rejected = np.zeros(len(rows_S), "S16"), {}
        self._n_dedup_R = np.zeros(self._firsts[-1], np.int32) if dedup else None

    def add(self, record: ShardRecord) -> None:
        """Takes a shard. Raises TokenError for one of another tokenizer, manifest, device or library than those before."""
        k, self.meta = record.shard, self.meta or record.meta
        if other := next((f for f in self.meta if record.meta.get(f) != self.meta[f]), None):
            raise TokenError(f"{other} is {self.meta[other]!r} in shard {int(np.argmax(self.done_S))} but "
                             f"{record.meta.get(other)!r} in shard {k}: one tokenizer on one kind of machine makes all shards "
                             "of a store; make the nodes alike and run the token step again with --force")
        self.done_S[k], self._size_S[k], self._frames_S[k], self._digest_S[k] = True, record.size, record.frames, record.digest
        if record.rejected:
            self._rejected[k] = record.rejected
        if self._n_dedup_R is not None:
            self._n_dedup_R[self._firsts[k]:self._firsts[k + 1]] = record.n_dedup

    def to_bytes(self) -> bytes:
        """The index of all shards; the same shards give the same bytes."""
        rejected = pa.array([self._rejected.get(k, []) for k in range(len(self.done_S))], pa.list_(pa.string()))
        columns = {"size": self._size_S, "clips": self._rows_S, "frames": self._frames_S,
                   "digest": self._digest_S.astype(str), "rejected": rejected}
        if self._n_dedup_R is not None:
            columns["n_dedup"] = pa.LargeListArray.from_arrays(self._firsts, self._n_dedup_R)
        table = pa.table(columns).replace_schema_metadata({KEY: json.dumps(self.meta, sort_keys=True).encode()})
        return parquet.table_bytes(table, ROW_GROUP)


@dataclass(frozen=True)
class TokenIndex:
    """The index of a store: what all shards share, and each shard's own fields."""

    path: str
    meta: dict[str, Any]
    files: list[dict[str, Any]]

    def n_dedup(self) -> tuple[np.ndarray, np.ndarray]:
        """(n_dedup of every clip, shard after shard, int32; the place of each shard's first one)."""
        column = _read(self.path, ["n_dedup"])["n_dedup"].combine_chunks()
        return column.values.to_numpy(), column.offsets.to_numpy()


def read_index(folder: str) -> TokenIndex:
    """The index of a store's folder. Raises FileNotFoundError, and TokenError for one that is damaged."""
    path = store.join(folder, NAME)
    try:
        table = _read(path, FIELDS)
        return TokenIndex(path, json.loads(table.schema.metadata[KEY]), table.select(FIELDS).to_pylist())
    except (parquet.DamagedFile, KeyError, TypeError, json.JSONDecodeError) as e:
        raise TokenError(f"the index {path} is damaged ({e}); give the run's command once more with --repair") from e


def _read(path: str, columns: Sequence[str]) -> pa.Table:
    def whole() -> pa.Table:
        fs, p = store.open_fs(path)
        with fs.open(p, "rb") as f:
            return parquet.open_file(f).read(columns)

    with parquet.intact(path):
        return store.persist(path, whole)
