"""Parquet files with a checksum on every page: a flipped bit is found on reading, and the error names the file."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from audiolm import store


class DamagedFile(ValueError):
    """A Parquet file whose bytes are not what was written; the text names it and the fix."""


def table_bytes(table: pa.Table, row_group_size: int | None = None, footer: dict[bytes, bytes] | None = None) -> bytes:
    """A Parquet file of row groups of so many rows, by default a million, with further entries of its `footer`."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, write_page_checksum=True) as writer:
        writer.write_table(table, row_group_size)
        writer.add_key_value_metadata(footer or {})
    return sink.getvalue()


def read_table(path: str) -> pa.Table:
    """A whole table. Raises FileNotFoundError, DamagedFile."""
    data = store.get(path)
    with intact(path):
        return open_file(io.BytesIO(data)).read()


def open_file(f, footer: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """An open file as one whose pages are verified as they are read; a known `footer` is not read again."""
    return pq.ParquetFile(f, metadata=footer, page_checksum_verification=True)


@contextmanager
def intact(path: str) -> Iterator[None]:
    """Turns what pyarrow raises about damaged bytes into one DamagedFile."""
    try:
        yield
    except (pa.ArrowException, OSError) as e:
        if isinstance(e, OSError) and (isinstance(e, store.NoAnswer) or e.errno is not None):
            raise  # the store's own
        raise DamagedFile(f"{path} is damaged ({e}); give the run's command once more with --repair") from e
