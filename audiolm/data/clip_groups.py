"""clips.parquet by its row groups: some columns of a split's clips, or the rows of one shard, a few MB at a time.

A row group holds whole shards of one split, and the footer says which: a reader of one shard or of a small split reads
no other rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from audiolm import store
from audiolm.config.corpus import ClipFilter
from audiolm.data import parquet

FILE = "clips.parquet"
ROWS = 8192  # of a row group, about 25 hours of clips: a task that wants one shard reads half a MB
FILTERS = ("split", "origin", "source")
STATISTICS = ["shard", "split"]  # all that a reader looks for; those of ids would double the footer


class ClipGroups:
    """A manifest's clips.parquet; reads its footer once. Raises FileNotFoundError, DamagedFile."""

    def __init__(self, manifest_path: str):
        self.path = store.join(manifest_path, FILE)
        with self._open() as file:
            self.footer: pq.FileMetaData = file.metadata
        sizes = [self.footer.row_group(g).num_rows for g in range(self.footer.num_row_groups)]
        self.firsts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])  # the row at which each group begins, and the end
        self._bounds = {name: self._least_and_most(name) for name in STATISTICS}

    def __len__(self) -> int:
        return self.footer.num_row_groups

    def read(self, group: int, columns: Sequence[str] | None = None) -> pa.Table:
        """A row group, all columns or some of them."""
        with self._open() as file:
            return self._read(file, group, columns)

    def shard(self, k: int, split: str | None = None, where: ClipFilter | None = None) -> pa.Table:
        """The rows of one shard, all or those of a split that `where` takes; none where there is no such shard."""
        found = [t.filter(pc.equal(t["shard"], k)) for t in map(self.read, self._holding("shard", k))]
        table = pa.concat_tables(found) if found else self.footer.schema.to_arrow_schema().empty_table()
        return table.filter(pa.array(passes(table, split, where)))

    def scan(self, columns: Sequence[str] | None, split: str | None = None,
             where: ClipFilter | None = None) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """(columns of the clips of a split that `where` takes, their rows in the file), a row group at a time."""
        with self._open() as file:
            for group in self._holding("split", split):
                table = self._read(file, group, columns and list(dict.fromkeys([*columns, *FILTERS])))
                kept = np.flatnonzero(passes(table, split, where))
                table = table.select(list(columns)) if columns else table
                yield table if len(kept) == len(table) else table.take(pa.array(kept)), kept + self.firsts[group]

    @contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        fs, p = store.open_fs(self.path)
        with parquet.intact(self.path), store.persist(self.path, lambda: fs.open(p, "rb")) as f:
            yield store.persist(self.path, lambda: parquet.open_file(f, getattr(self, "footer", None)))

    def _read(self, file: pq.ParquetFile, group: int, columns: Sequence[str] | None) -> pa.Table:
        return store.persist(self.path, lambda: file.read_row_group(group, columns))

    def _least_and_most(self, name: str) -> list[tuple[Any, Any] | None]:
        """The least and the greatest value of a column in each row group, None where the footer does not say."""
        column = next(i for i in range(self.footer.num_columns) if self.footer.schema.column(i).path == name)
        found = [self.footer.row_group(g).column(column).statistics for g in range(len(self))]
        return [(s.min, s.max) if s is not None and s.has_min_max else None for s in found]

    def _holding(self, name: str, value: Any) -> list[int]:
        """The row groups that may hold a value of a column; all of them for None."""
        return [g for g, bounds in enumerate(self._bounds[name]) if value is None or not bounds
                or bounds[0] <= value <= bounds[1]]


def groups_bytes(tables: Iterable[pa.Table], schema: pa.Schema) -> bytes:
    """A Parquet file with a row group a table."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, write_page_checksum=True, write_statistics=STATISTICS) as writer:
        for table in tables:
            writer.write_table(table, len(table) or None)
    return sink.getvalue().to_pybytes()


@lru_cache(maxsize=1)  # a task reads one shard, and its process many: the footer has a few MB
def finished_groups(manifest_path: str) -> ClipGroups:
    """`ClipGroups` of a manifest that is done, whose files never change."""
    return ClipGroups(manifest_path)


def passes(table: pa.Table, split: str | None, where: ClipFilter | None) -> np.ndarray:
    """True for each clip of a split that `where` takes; `where.source` takes a source's name or label."""
    kept = np.ones(len(table), bool)
    if split:
        kept &= pc.equal(table["split"], split).to_numpy()
    if where is not None and where.source is not None:
        named = pa.array(where.source, pa.string())
        kept &= pc.or_(*(pc.is_in(table[name], value_set=named) for name in ("origin", "source"))).to_numpy()
    return kept
