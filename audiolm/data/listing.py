"""The listing of a corpus: every file that a manifest was made of, and what of it changed since.

listing.parquet holds a row a file: origin, uri, size, stamp and a hash of its first and last 2 MB.  listing.json holds a sum
of each group of about GROUP files, by a hash of their names: `changed_files` adds up the files of today as they are listed,
and reads rows only of the groups that differ.  So a check of millions of files holds the sums, and the files of few groups.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator

from audiolm import store
from audiolm.config.corpus import CorpusConfig
from audiolm.data import sources
from audiolm.data.audio_check import content_hash, edges
from audiolm.data.clips import parquet_bytes
from audiolm.data.inputs.walk import Entry
from audiolm.data.parallel import thread_map
from audiolm.data.parquet import intact, open_file
from audiolm.places import within
from audiolm.store import join

GROUP = 500  # files
COLUMNS = [("origin", "string"), ("uri", "string"), ("size", "int64"), ("stamp", "string"), ("hash", "string")]


class Sums:
    """A sum of each of `groups` groups of files, in whatever order they are added."""

    def __init__(self, groups: int):
        self.values = [0] * groups

    def group(self, origin: str, uri: str) -> int:
        return zlib.crc32(f"{origin}|{uri}".encode()) % len(self.values)

    def add(self, origin: str, uri: str, size: int, stamp: str) -> None:
        digest = hashlib.blake2b(f"{origin}|{uri}|{size}|{stamp}".encode(), digest_size=8).digest()
        i = self.group(origin, uri)
        self.values[i] = (self.values[i] + int.from_bytes(digest)) & (2**64 - 1)


def write_listing(manifest_path: str, rows: list[dict]) -> None:
    """Writes listing.json and listing.parquet. Rows of sounds within containers are no files: they are in the latter alone."""
    sums = Sums(max(1, len(rows) // GROUP))
    for r in rows:
        if not within(r["uri"]):
            sums.add(r["origin"], r["uri"], r["size"], r["stamp"])
    store.put_json(join(manifest_path, "listing.json"), {"sums": sums.values})
    store.put(join(manifest_path, "listing.parquet"), parquet_bytes(rows, COLUMNS))


def read_listing(manifest_path: str) -> dict[tuple[str, str], dict]:
    """The rows of listing.parquet by (origin, uri)."""
    return {(r["origin"], r["uri"]): r for r in _rows(manifest_path)}


def changed_files(manifest_path: str, corpus: CorpusConfig) -> dict[str, list[str]]:
    """{added, removed, modified}: "source/uri" of files that differ from the manifest's listing.

    A file is modified where its size or the hash of its first and last 2 MB differs.  Another date alone (a git
    clone, an uploaded job folder) does not count.  Raises ConfigError for a source that cannot be listed."""
    listed = (store.get_json(join(manifest_path, "listing.json")) or {"sums": [0]})["sums"]  # [0]: compare every file
    sums = Sums(len(listed))
    for origin, e in _files(corpus):
        sums.add(origin, e.uri, e.size, e.stamp)
    differ = {i for i, (a, b) in enumerate(zip(listed, sums.values, strict=True)) if a != b}
    if not differ:
        return {"added": [], "removed": [], "modified": []}
    old = {(r["origin"], r["uri"]): r for r in _rows(manifest_path)
           if not within(r["uri"]) and sums.group(r["origin"], r["uri"]) in differ}  # of a container only itself
    new = {(origin, e.uri): e for origin, e in _files(corpus) if sums.group(origin, e.uri) in differ}
    # Only files of the old size with another date are hashed: the rest is decided by the listing.
    doubtful = [k for k, e in new.items() if k in old and e.size == old[k]["size"] >= 0 and e.stamp != old[k]["stamp"]]
    hashes = dict(zip(doubtful, thread_map(lambda k: file_hash(new[k]), doubtful), strict=True))
    modified = [k for k, e in new.items() if k in old and
                (e.size != old[k]["size"] or (k in hashes and hashes[k] != old[k]["hash"]))]
    return {"added": _names(new.keys() - old.keys()), "removed": _names(old.keys() - new.keys()),
            "modified": _names(modified)}


def file_hash(e: Entry) -> str:
    """The hash of a file's first and last 2 MB; '' for one that is missing."""
    return content_hash(*edges(e.path, e.size), e.size) if e.size >= 0 else ""


def _files(corpus: CorpusConfig) -> Iterator[tuple[str, Entry]]:
    return ((s.name, e) for s in corpus.sources for e in sources.listing(s))


def _rows(manifest_path: str) -> Iterator[dict]:
    """The rows of listing.parquet, some thousands in memory. Raises FileNotFoundError, DamagedFile."""
    path = join(manifest_path, "listing.parquet")
    fs, p = store.open_fs(path)
    with intact(path), fs.open(p, "rb") as f:
        for batch in open_file(f).iter_batches():
            yield from batch.to_pylist()


def _names(keys: Iterable[tuple[str, str]]) -> list[str]:
    return sorted(f"{origin}/{uri}" for origin, uri in keys)
