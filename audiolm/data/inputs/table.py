"""The user's table of a corpus: Parquet, a folder of Parquet as Spark writes it, CSV or JSON lines, as checked columns.

`uri` names a file.  A Parquet column `audio` of structs {bytes, path}, the Audio feature of Hugging Face's datasets,
holds sounds themselves instead (inputs/packed.py).  Raises ConfigError with the file, the column, the row and the fix.
"""

from __future__ import annotations

import gzip
import io
import json
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

from audiolm import store
from audiolm.config.base import ConfigError
from audiolm.config.corpus import ManifestSource
from audiolm.data.inputs import walk

SPLITS = ("train", "dev", "test")
COLUMNS = ("uri", "start", "duration", "speaker", "source", "split", "text")  # others are ignored
SECONDS = ("start", "duration")
AUDIO = "audio"
ENDINGS = {".csv": ",", ".tsv": "\t", ".jsonl": "", ".ndjson": "", ".json": ""}  # the delimiter, "" for JSON


def files(source: ManifestSource) -> list[walk.Entry]:
    """The table's files, their uris relative to the folder that it lies in, sorted. Raises ConfigError where there are none."""
    (fs, p), base = store.open_fs(source.uri), posixpath.basename(source.uri.rstrip("/"))
    if not fs.isdir(p):
        return [walk.entry(base, source.uri, fs.info(p))]
    known = (".parquet", *ENDINGS, *(f"{e}.gz" for e in ENDINGS))
    found = sorted(walk.walk(source.uri, lambda uri: uri.lower().endswith(known)), key=lambda e: e.uri)
    # Spark's own files begin with an underscore; hidden ones are left out already.
    found = [replace(e, uri=f"{base}/{e.uri}") for e in found if not any(p.startswith("_") for p in e.uri.split("/"))]
    if bad := [e for e in found if e.fault]:
        raise ConfigError(f"corpus source {source.name!r}: {bad[0].path!r} cannot be read ({bad[0].fault[1]}); mend it")
    if not found:
        raise ConfigError(f"corpus source {source.name!r}: the folder {source.uri!r} has no files ending in {', '.join(known)}")
    return found


def names(source: ManifestSource) -> dict[str, str]:
    """{known column: its name in the table}, with `audio`."""
    return {c: source.columns.get(c, c) for c in (*COLUMNS, AUDIO)}


def has_sounds(source: ManifestSource, parts: list[walk.Entry]) -> bool:
    """True where the rows hold sounds themselves."""
    if _delimiter(parts[0].path) is not None:
        return False
    schema, named = _parquet(source, parts[0].path, lambda f: f.schema_arrow), names(source)
    return named["uri"] not in schema.names and is_sound(schema, named[AUDIO])


def is_sound(schema: Any, name: str) -> bool:
    """True for a column of structs that hold bytes."""
    import pyarrow as pa

    kind = schema.field(name).type if name in schema.names else None
    return kind is not None and pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def read(source: ManifestSource, parts: list[walk.Entry]) -> dict[str, list]:
    """{known column: values} of all files, checked; None where a column is absent."""
    columns: dict[str, list] = {name: [] for name in COLUMNS}
    for part in parts:
        n, found = _read_file(source, part)
        for name in COLUMNS:
            columns[name] += found.get(name, [None] * n)
    if not columns["uri"]:
        raise ConfigError(f"{where(source, source.uri)} has no rows; write one row an audio file")
    return columns


def where(source: ManifestSource, path: str) -> str:
    kind = "table" if _delimiter(path) is not None else "Parquet"
    return f"corpus source {source.name!r}: {kind} {path!r}"


def _read_file(source: ManifestSource, part: walk.Entry) -> tuple[int, dict[str, list]]:
    """(rows, known columns) of one file."""
    named, at = names(source), where(source, part.path)
    table = _parquet(source, part.path, lambda f: f.read()) if _delimiter(part.path) is None else _text(source, part.path)
    # A partitioned folder keeps a column's value in its sub-folders' names, as in split=train/part-0.parquet.
    partition = dict(p.split("=", 1) for p in part.uri.split("/")[:-1] if "=" in p)
    if named["uri"] not in table.column_names:
        raise ConfigError(f"{at} has no column {named['uri']!r}, only {table.column_names}; known columns are {list(COLUMNS)}, "
                          "others are named by corpus.sources.columns, such as columns: {uri: path}")
    if unknown := sorted(set(source.columns.values()) - {*table.column_names, *partition}):
        raise ConfigError(f"{at} has no column {unknown[0]!r}, which corpus.sources.columns names, only {table.column_names}")
    columns = {name: checked(name, table[own], at) for name, own in named.items()
               if name != AUDIO and own in table.column_names}
    columns |= {name: [unquote(partition[own])] * table.num_rows for name, own in named.items()
                if own in partition and own not in table.column_names}
    for row, uri in enumerate(columns["uri"]):
        if not uri:
            raise ConfigError(f"{at}: row {row} has no uri; fill it or drop the row")
    check_values(columns, at)
    return table.num_rows, columns


def checked(name: str, column: Any, at: str) -> list:
    """A column's values as text or seconds. Raises ConfigError for another type."""
    import pyarrow as pa

    try:
        return column.cast(pa.float64() if name in SECONDS else pa.string()).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as e:
        need = "numbers (seconds)" if name in SECONDS else "text"
        raise ConfigError(f"{at}: column {name!r} is {column.type}, expected {need}") from e


def check_values(columns: dict[str, list], at: str) -> None:
    """Raises ConfigError for a split that is none, and for seconds below 0."""
    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "split": (lambda v: v in SPLITS, f"one of {SPLITS} or null"),
        **dict.fromkeys(SECONDS, (lambda v: 0 <= v < float("inf"), "seconds from 0"))}
    for name, (is_valid, expected) in checks.items():
        for row, value in enumerate(columns.get(name, ())):
            if value is not None and not is_valid(value):
                raise ConfigError(f"{at}: column {name!r} holds {value!r} in row {row}, expected {expected}")


def _parquet(source: ManifestSource, path: str, do: Callable[[Any], Any]) -> Any:
    """What `do` makes of an open Parquet file. Raises ConfigError that names a damaged one."""
    import pyarrow as pa

    from audiolm.data import parquet

    fs, p = store.open_fs(path)
    with fs.open(p, "rb") as f:
        try:
            return do(parquet.open_file(f))
        except (pa.ArrowException, OSError) as e:  # pyarrow tells of damaged pages by OSErrors without a number
            if isinstance(e, OSError) and e.errno is not None:
                raise
            raise ConfigError(f"{where(source, path)} cannot be read ({e}); it is damaged or no Parquet: get it again, or "
                              "write it with pandas or pyarrow") from e


def _delimiter(path: str) -> str | None:
    """Of a text table by its ending; None for Parquet."""
    name = path.lower().removesuffix(".gz")
    return next((d for ending, d in ENDINGS.items() if name.endswith(ending)), None)


def _text(source: ManifestSource, path: str) -> Any:
    """A CSV file or JSON lines as a table. Raises ConfigError with the line."""
    import pyarrow as pa
    import pyarrow.csv

    at, data, delimiter = where(source, path), store.get(path), _delimiter(path)
    try:
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        if delimiter == "":
            return pa.Table.from_pylist(list(_json_lines(source, data.decode("utf-8-sig"))))
        head = data[:1 << 16].partition(b"\n")[0]
        if delimiter == "," and b"," not in head:  # as some spreadsheets write it
            delimiter = ";" if b";" in head else "\t" if b"\t" in head else ","
        kinds = {own: pa.float64() if name in SECONDS else pa.string() for name, own in names(source).items()}
        options = pyarrow.csv.ConvertOptions(column_types=kinds, strings_can_be_null=True, null_values=[""])
        parsing = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
        return pyarrow.csv.read_csv(io.BytesIO(data), parse_options=parsing, convert_options=options)
    except (pa.ArrowException, UnicodeDecodeError, OSError, EOFError) as e:
        raise ConfigError(f"{at} cannot be read ({e}); write it as UTF-8 with a header line") from e


def _json_lines(source: ManifestSource, text: str) -> Iterator[dict[str, Any]]:
    """The known columns of each line's object."""
    known = names(source)
    for n, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as e:
            raise ConfigError(f"{where(source, source.uri)}: line {n} is no JSON ({e}); write one object a line") from e
        if not isinstance(row, dict):
            raise ConfigError(f"{where(source, source.uri)}: line {n} is {type(row).__name__}, expected an object, one a line")
        yield {own: row.get(own) for own in known.values() if own in row}
