"""MAESTRO's table (1810.12247): maestro-v3.0.0.csv beside the year folders that hold its audio.

The piece, `COMPOSER: TITLE`, takes the speaker's place, and the split is the table's own (validation is dev), which is drawn by
piece: several performances of one lie in the same.  Raises ConfigError with the table, the column, the row and the fix.
"""

from __future__ import annotations

import csv
import io
import posixpath
from fnmatch import fnmatch

from audiolm import store
from audiolm.config.base import ConfigError
from audiolm.config.corpus import MaestroSource
from audiolm.data.inputs import table, walk

TABLE = "maestro*.csv"
NAMES = ("canonical_composer", "canonical_title", "split", "audio_filename")  # year, midi_filename and duration are not read
SPLITS = {"train": "train", "validation": "dev", "test": "test"}


def files(source: MaestroSource) -> list[walk.Entry]:
    """The table, alone. Raises ConfigError where the root has none, or several."""
    fs, p = store.open_fs(source.root)
    found = sorted(name for path in fs.ls(p, detail=False) if fnmatch(name := posixpath.basename(path.rstrip("/")), TABLE))
    if len(found) != 1:
        what = f"{', '.join(found)}: keep the one whose audio is there" if found else (
            f"no {TABLE}: name the folder that maestro-v3.0.0.zip unpacks to, with its table and its year folders")
        raise ConfigError(f"corpus source {source.name!r}: root {source.root!r} holds {what}")
    path = store.join(source.root, found[0])
    return [walk.entry(found[0], path, fs.info(store.open_fs(path)[1]))]


def read(source: MaestroSource, part: walk.Entry) -> dict[str, list]:
    """{column of the user's table: values}, as table.read."""
    at = f"corpus source {source.name!r}: table {part.path!r}"
    try:
        rows = csv.DictReader(io.StringIO(store.get(part.path).decode("utf-8-sig"), newline=""))
        names, rows = rows.fieldnames or [], list(rows)
    except (UnicodeDecodeError, csv.Error) as e:
        raise ConfigError(f"{at} cannot be read ({e}); get it again, or write it as UTF-8") from e
    if missing := [name for name in NAMES if name not in names]:
        raise ConfigError(f"{at} has no column {', '.join(missing)}, only {names}; get MAESTRO's again, or name your own table "
                          "by kind: manifest and columns: {uri: audio_file, split: part}")
    if not rows:
        raise ConfigError(f"{at} has no rows; get it again")
    for n, row in enumerate(rows):
        if empty := [name for name in NAMES if not row[name]]:
            raise ConfigError(f"{at}: row {n} has no {empty[0]}; fill it or drop the row")
        if row["split"] not in SPLITS:
            raise ConfigError(f"{at}: column 'split' holds {row['split']!r} in row {n}, expected one of {', '.join(SPLITS)}")
    columns = {"uri": [row["audio_filename"] for row in rows], "split": [SPLITS[row["split"]] for row in rows],
               "speaker": [f"{row['canonical_composer']}: {row['canonical_title']}" for row in rows]}
    return {name: columns.get(name, [None] * len(rows)) for name in table.COLUMNS}
