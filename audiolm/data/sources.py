"""Lists the audio files of a corpus source: a folder, LibriSpeech's layout or the user's Parquet; opens no audio.

`survey(source)` returns one `Found` a file, or a row of the user's Parquet, in natural order of uris.  Uris are
relative to the source's root, so that a corpus can move.  `listing(source)` names every file that the manifest depends
on, transcripts and the Parquet included.  Any fsspec place of corpus.protocols serves; names that start with a dot are skipped.
Raises ConfigError with one line that names the source, the place and the fix.
"""

from __future__ import annotations

import glob
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fsspec.utils import glob_translate

from audiolm import store
from audiolm.config.base import ConfigError
from audiolm.config.corpus import CorpusConfig, FolderSource, LibriSpeechSource, ManifestSource, Source
from audiolm.data.containers.layout import ENDINGS
from audiolm.data.parallel import thread_map
from audiolm.places import is_within

AUDIO = ENDINGS
SPLITS = ("train", "dev", "test")
PARQUET = "(parquet)"  # the user's Parquet in a listing, wherever it lies
COLUMNS = ("uri", "start", "duration", "speaker", "source", "split", "text")  # of the user's Parquet; others are ignored
SECONDS = ("start", "duration")


@dataclass(frozen=True)
class Entry:
    """A file as its filesystem lists it; size -1 where it is missing, stamp = etag or mtime."""

    uri: str
    path: str
    size: int
    stamp: str


@dataclass(frozen=True)
class Found:
    """An audio file, or the stretch of one that a user's Parquet names; start and duration in seconds."""

    origin: str
    uri: str
    path: str
    size: int
    stamp: str
    source: str
    speaker: str | None = None
    chapter: str | None = None
    split: str | None = None
    text: str | None = None
    start: float | None = None
    duration: float | None = None


def roots(corpus: CorpusConfig) -> dict[str, str]:
    """The folder that each source's relative uris start from: {source name: folder URI}."""
    return {s.name: _root(s) for s in corpus.sources}


def locate(root: str, uri: str, follow_links: bool = False) -> str:
    """The path of a uri, which the user's Parquet may give whole. Raises ValueError for one that is not below its root.

    `follow_links` holds for the place that a local path's symlinks lead to as well.
    """
    path = uri if "://" in uri or uri.startswith("/") else store.join(root, uri)
    if not is_within(root, path, follow_links):
        raise ValueError(f"{uri!r} lies outside the root {root!r}; name files below the root alone, or set corpus.sources.root "
                         "to the folder that holds them all")
    return path


def survey(source: Source) -> tuple[list[Found], list[Entry]]:
    """(every audio file with what its path or row says of it, `listing(source)`), read together. Raises ConfigError."""
    if isinstance(source, ManifestSource):
        columns = _read_table(source)
        entries = _table_entries(source, columns)
        found = _table_rows(source, columns, {e.uri: e for e in entries})
    else:
        entries = _files(source)
        found = _librispeech(source, entries) if isinstance(source, LibriSpeechSource) else [
            _folder_found(source, e) for e in entries]
    return sorted(found, key=lambda f: (store.natural(f.uri), f.start or 0.0, f.duration or 0.0)), entries


def listing(source: Source) -> list[Entry]:
    """Every file whose change would change the manifest, once each, sorted by uri. Raises ConfigError."""
    if isinstance(source, ManifestSource):
        return _table_entries(source, _read_table(source))
    return _files(source)


def _root(source: Source) -> str:
    if isinstance(source, ManifestSource):
        return source.root or posixpath.dirname(source.uri.rstrip("/"))
    return _base_and_glob(source)[0]


def _base_and_glob(source: FolderSource | LibriSpeechSource) -> tuple[str, str | None]:
    """The folder to walk and the pattern below it; a root may itself be a glob or one file."""
    root = source.root.rstrip("/")
    if isinstance(source, LibriSpeechSource):
        return root, None
    parts = root.split("/")
    magic = next((i for i, p in enumerate(parts) if re.search(r"[*?\[]", p)), None)
    if magic is None and _is_audio(root):
        return posixpath.dirname(root), glob.escape(posixpath.basename(root))
    if magic is None or (store.is_local(root) and store.exists(root)):  # a folder's name may have brackets
        return root, source.glob
    return "/".join(parts[:magic]), "/".join(parts[magic:])


def _is_audio(uri: str) -> bool:
    return uri.lower().endswith(AUDIO)


def _files(source: FolderSource | LibriSpeechSource) -> list[Entry]:
    """The audio files below a source's root and, in LibriSpeech's layout, its transcripts; sorted by uri."""
    base, pattern = _base_and_glob(source)
    with _source_errors(source, "root", source.root):
        fs, p = store.open_fs(base)
        p = p.rstrip("/")
        infos = fs.find(p, detail=True)
        if not infos and not fs.exists(p):  # object stores list a missing folder as an empty one
            raise FileNotFoundError(base)
    matches = re.compile(glob_translate(pattern)).match if pattern else lambda _: True
    ends = AUDIO + ((".trans.txt",) if isinstance(source, LibriSpeechSource) else ())
    entries = []
    for key, info in infos.items():
        uri = key[len(p):].lstrip("/")
        hidden = any(part.startswith(".") for part in uri.split("/"))  # such as macOS's ._copies
        if uri.lower().endswith(ends) and not hidden and matches(uri):
            entries.append(_entry(uri, store.join(base, uri), info))
    if not any(_is_audio(e.uri) for e in entries):
        such = f" that match glob {source.glob!r}" if isinstance(source, FolderSource) else ""
        raise ConfigError(f"corpus source {source.name!r}: no audio files under root {source.root!r}{such}; "
                          f"expected files ending in {', '.join(AUDIO)}")
    return sorted(entries, key=lambda e: e.uri)


def _entry(uri: str, path: str, info: dict) -> Entry:
    # Every filesystem names the tag or date of a change in its own way: S3, Google's, local disks, others.
    stamp = next((info[k] for k in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified")
                  if info.get(k) is not None), "")
    return Entry(uri, path, int(info.get("size") or 0), str(stamp).strip('"'))


def _folder_found(source: FolderSource, e: Entry) -> Found:
    """`grandparent` reads SPEAKER/CHAPTER/file, so the parent is the chapter whose utterances may be joined."""
    parts = e.uri.split("/")
    up = {"none": 0, "parent": 1, "grandparent": 2}[source.speaker]
    speaker = parts[-1 - up] if up and len(parts) > up else None
    chapter = posixpath.dirname(e.uri) if up == 2 and speaker else None
    return Found(source.name, e.uri, e.path, e.size, e.stamp, source.name, speaker, chapter, source.split)


def _librispeech(source: LibriSpeechSource, entries: list[Entry]) -> list[Found]:
    """Audio with speaker, chapter, split and text from the layout; the subset's name or `splits` gives the split."""
    audio = [e for e in entries if _is_audio(e.uri)]
    transcripts = [e for e in entries if not _is_audio(e.uri)]
    with _source_errors(source, "root", source.root):
        contents = list(thread_map(lambda e: store.get(e.path), transcripts))
    texts: dict[tuple[str, str], str] = {}  # (folder, file without its ending): words
    for e, text in zip(transcripts, contents, strict=True):
        for line in text.decode("utf-8", "replace").splitlines():
            stem, _, words = line.strip().partition(" ")
            texts[posixpath.dirname(e.uri), stem] = words.strip()
    subsets = {e.uri.split("/")[-4] for e in audio if e.uri.count("/") >= 3}
    splits = source.splits or {}
    if unknown := set(splits) - subsets:
        raise ConfigError(f"corpus source {source.name!r}: splits names {sorted(unknown)}, but the folders under "
                          f"{source.root!r} are {sorted(subsets)}; correct corpus.sources.splits")
    found = []
    for e in audio:
        *_, subset, speaker, chapter, name = [None, None, None, *e.uri.split("/")]
        split = splits.get(subset) or next((s for s in SPLITS if (subset or "").startswith(s)), None)
        text = texts.get((posixpath.dirname(e.uri), posixpath.splitext(name)[0]))
        if speaker is None:  # two levels at most: the folder names the speaker
            speaker, chapter = chapter, None
        found.append(Found(source.name, e.uri, e.path, e.size, e.stamp, source.name, speaker,
                           posixpath.dirname(e.uri) if chapter else None, split, text))
    return found


def _read_table(source: ManifestSource) -> dict[str, list]:
    """The known columns of the user's Parquet, checked: {column: values}, None where a column is absent."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = f"corpus source {source.name!r}: Parquet {source.uri!r}"
    with _source_errors(source, "uri", source.uri):
        fs, p = store.open_fs(source.uri)
        with fs.open(p, "rb") as f:
            try:
                table = pq.read_table(f)
            except pa.ArrowInvalid as e:
                raise ConfigError(f"{where} cannot be read ({e}); write it with pandas or pyarrow") from e
    if "uri" not in table.column_names:
        raise ConfigError(f"{where} has no column 'uri', only {table.column_names}; known columns are {list(COLUMNS)}")
    if table.num_rows == 0:
        raise ConfigError(f"{where} has no rows; write one row an audio file")
    columns = {name: [None] * table.num_rows for name in COLUMNS}
    for name in (c for c in COLUMNS if c in table.column_names):
        try:
            columns[name] = table[name].cast(pa.float64() if name in SECONDS else pa.string()).to_pylist()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as e:
            need = "numbers (seconds)" if name in SECONDS else "text"
            raise ConfigError(f"{where}: column {name!r} is {table[name].type}, expected {need}") from e
    if not all(columns["uri"]):
        row = next(i for i, uri in enumerate(columns["uri"]) if not uri)
        raise ConfigError(f"{where}: row {row} has no uri; fill it or drop the row")
    checks = {"split": (lambda v: v in SPLITS, f"one of {SPLITS} or null"),
              **dict.fromkeys(SECONDS, (lambda v: 0 <= v < float("inf"), "seconds from 0"))}
    for name, (is_valid, expected) in checks.items():
        for row, value in enumerate(columns[name]):
            if value is not None and not is_valid(value):
                raise ConfigError(f"{where}: column {name!r} holds {value!r} in row {row}, expected {expected}")
    return columns


def _table_entries(source: ManifestSource, columns: dict[str, list]) -> list[Entry]:
    """The Parquet itself and the files it names, missing ones too; sorted by uri."""
    def entry(uri: str) -> Entry:
        # The Parquet is listed under a fixed name: its content is part of the corpus, its place is not.
        path = source.uri if uri == PARQUET else locate(root, uri, follow_links=True)
        fs, p = store.open_fs(path)
        try:
            return _entry(uri, path, fs.info(p))
        except FileNotFoundError:
            return Entry(uri, path, -1, "missing")

    root, uris = _root(source), sorted(set(columns["uri"]))
    with _source_errors(source, "uri", source.uri):
        entries = list(thread_map(entry, [PARQUET, *uris]))
    if all(e.size < 0 for e in entries[1:]):
        raise ConfigError(f"corpus source {source.name!r}: none of the {len(uris)} files of {source.uri!r} exists "
                          f"under {root!r}; set corpus.sources.root to what its uris are relative to")
    return sorted(entries, key=lambda e: e.uri)


def _table_rows(source: ManifestSource, columns: dict[str, list], entries: dict[str, Entry]) -> list[Found]:
    found = []
    for values in zip(*columns.values(), strict=True):
        row = dict(zip(columns, values, strict=True))
        e = entries[row["uri"]]
        found.append(Found(**{**row, "origin": source.name, "path": e.path, "size": e.size, "stamp": e.stamp,
                              "source": row["source"] or source.name}))
    return found


@contextmanager
def _source_errors(source: Source, field: str, place: str) -> Iterator[None]:
    """Turns what a filesystem raises into one ConfigError that names the source, the place and the fix.

    botocore's and aiohttp's errors are matched by name: neither needs to be installed for a local corpus."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as e:
        name = type(e).__name__
        if isinstance(e, FileNotFoundError):
            fault = f"does not exist; correct corpus.sources.{field} or mount it"
        elif name in ("NoCredentialsError", "PartialCredentialsError"):
            fault = ("needs credentials and none were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and "
                     "AWS_ENDPOINT_URL for a server of your own)")
        elif isinstance(e, PermissionError):
            fault = (f"is denied to these credentials ({e}); give them list and read rights, or set AWS_ACCESS_KEY_ID "
                     "and AWS_SECRET_ACCESS_KEY to others")
        elif isinstance(e, (ImportError, ValueError)):
            fault = f"cannot be used: {e}"
        elif name in ("EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError"):
            fault = f"cannot be reached ({e}); check AWS_ENDPOINT_URL and the network"
        else:
            raise
        raise ConfigError(f"corpus source {source.name!r}: {field} {place!r} {fault}") from e
