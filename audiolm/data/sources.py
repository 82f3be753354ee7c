"""Lists the audio files of a corpus source (folder, LibriSpeech layout, the user's own Parquet); opens no audio.

`list_files(source)` gives one `Found` a file (a row of the user's Parquet: one a row), in natural order of its uri;
uris are relative to the source's root, so that a corpus can move.  `listing(source)` names every file that the
manifest depends on, transcripts and the Parquet included.  Any fsspec place; names starting with a dot are left out.
Raises ConfigError with one line that names the source, the place and the fix.
"""

from __future__ import annotations

import posixpath
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fsspec.utils import glob_translate

from audiolm import store
from audiolm.config.base import ConfigError
from audiolm.config.corpus import CorpusConfig, FolderSource, LibriSpeechSource, ManifestSource, Source

AUDIO = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3")
SPLITS = ("train", "dev", "test")
PARQUET = "(parquet)"


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
    """Where the relative uris of each source start: {source name: folder URI}."""
    return {s.name: _root(s) for s in corpus.sources}


def locate(root: str, uri: str) -> str:
    """The path of a uri: below its root, unless the user's Parquet gave an absolute one."""
    return uri if "://" in uri or uri.startswith("/") else store.join(root, uri)


def list_files(source: Source) -> list[Found]:
    """Every audio file of a source with what its place says about it. Raises ConfigError."""
    return survey(source)[0]


def survey(source: Source) -> tuple[list[Found], list[Entry]]:
    """`list_files` and `listing` of the same moment."""
    if isinstance(source, ManifestSource):
        columns = _parquet(source)
        entries = _manifest_entries(source, columns)
        found = _manifest_rows(source, columns, {e.uri: e for e in entries})
    else:
        entries = _files(source)
        found = _librispeech(source, entries) if isinstance(source, LibriSpeechSource) else [
            _folder_found(source, e) for e in entries]
    return sorted(found, key=lambda f: (natural(f.uri), f.start or 0.0, f.duration or 0.0)), entries


def listing(source: Source) -> list[Entry]:
    """Every file whose change would change the manifest, once each, sorted by uri. Raises ConfigError."""
    if isinstance(source, ManifestSource):
        return _manifest_entries(source, _parquet(source))
    return _files(source)


def natural(text: str) -> list:
    """A sort key under which utt2 comes before utt10."""
    return [(0, int(p), p) if p.isascii() and p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", text)]


def _root(source: Source) -> str:
    if isinstance(source, ManifestSource):
        return source.root or posixpath.dirname(source.uri.rstrip("/"))
    return _base_and_glob(source)[0]


def _base_and_glob(source: FolderSource | LibriSpeechSource) -> tuple[str, str | None]:
    """The folder to walk and the pattern below it; a root may itself be a glob or one file."""
    root = source.root.rstrip("/")
    glob = source.glob if isinstance(source, FolderSource) else None
    if not isinstance(source, FolderSource):
        return root, glob
    parts = root.split("/")
    magic = next((i for i, p in enumerate(parts) if re.search(r"[*?\[]", p)), None)
    if magic is None:
        return (posixpath.dirname(root), _literal(posixpath.basename(root))) if _is_audio(root) else (root, glob)
    if store.is_local(root) and store.exists(root):  # a folder whose name has brackets
        return root, glob
    return "/".join(parts[:magic]), "/".join(parts[magic:])


def _literal(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def _is_audio(uri: str) -> bool:
    return uri.lower().endswith(AUDIO)


def _walk(source: FolderSource | LibriSpeechSource) -> list[Entry]:
    """All files below the root that the pattern takes."""
    base, glob = _base_and_glob(source)
    with _explained(source, "root", source.root):
        fs, p = store.open_fs(base)
        p = p.rstrip("/")
        infos = fs.find(p, detail=True)
        if not infos and not fs.exists(p):
            raise FileNotFoundError(base)
    takes = re.compile(glob_translate(glob)).match if glob else lambda _: True
    entries = []
    for key, info in infos.items():
        uri = key[len(p):].lstrip("/")
        if uri and not any(part.startswith(".") for part in uri.split("/")) and takes(uri):
            entries.append(_entry(uri, store.join(base, uri), info))
    return entries


def _entry(uri: str, path: str, info: dict) -> Entry:
    stamp = next((info[k] for k in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified")
                  if info.get(k) is not None), "")
    return Entry(uri, path, int(info.get("size") or 0), str(stamp).strip('"'))


def _files(source: FolderSource | LibriSpeechSource) -> list[Entry]:
    """The audio files of a source and, in LibriSpeech's layout, its transcripts; sorted by uri."""
    side = (".trans.txt",) if isinstance(source, LibriSpeechSource) else ()
    entries = [e for e in _walk(source) if _is_audio(e.uri) or (side and e.uri.endswith(side))]
    if not any(_is_audio(e.uri) for e in entries):
        raise _no_audio(source)
    return sorted(entries, key=lambda e: e.uri)


def _no_audio(source: Source) -> ConfigError:
    glob = f" that match glob {source.glob!r}" if isinstance(source, FolderSource) else ""
    return ConfigError(f"corpus source {source.name!r}: no audio files under root {source.root!r}{glob}; "
                       f"expected files ending in {', '.join(AUDIO)}")


def _folder_found(source: FolderSource, e: Entry) -> Found:
    """`grandparent` reads SPEAKER/CHAPTER/file, so the parent is the chapter whose utterances may be joined."""
    parts = e.uri.split("/")
    up = {"none": 0, "parent": 1, "grandparent": 2}[source.speaker]
    speaker = parts[-1 - up] if up and len(parts) > up else None
    chapter = posixpath.dirname(e.uri) if up == 2 and speaker else None
    return Found(source.name, e.uri, e.path, e.size, e.stamp, source.name, speaker, chapter, source.split)


def _librispeech(source: LibriSpeechSource, entries: list[Entry]) -> list[Found]:
    audio = [e for e in entries if _is_audio(e.uri)]
    transcripts = [e for e in entries if not _is_audio(e.uri)]
    with _explained(source, "root", source.root), ThreadPoolExecutor(16) as pool:
        contents = list(pool.map(lambda e: store.get(e.path), transcripts))
    texts: dict[tuple[str, str], str] = {}
    for e, text in zip(transcripts, contents, strict=True):
        for line in text.decode("utf-8", "replace").splitlines():
            stem, _, words = line.strip().partition(" ")
            texts[posixpath.dirname(e.uri), stem] = words.strip()
    subsets = {e.uri.split("/")[-4] for e in audio if e.uri.count("/") >= 3}
    if unknown := set(source.splits or {}) - subsets:
        raise ConfigError(f"corpus source {source.name!r}: splits names {sorted(unknown)}, but the folders under "
                          f"{source.root!r} are {sorted(subsets)}; correct corpus.sources.splits")
    found = []
    for e in audio:
        *_, subset, speaker, chapter, name = [None, None, None, *e.uri.split("/")]
        split = (source.splits or {}).get(subset) or next((s for s in SPLITS if (subset or "").startswith(s)), None)
        text = texts.get((posixpath.dirname(e.uri), posixpath.splitext(name)[0]))
        if speaker is None:  # two levels at most: the folder names the speaker
            speaker, chapter = chapter, None
        found.append(Found(source.name, e.uri, e.path, e.size, e.stamp, source.name, speaker,
                           posixpath.dirname(e.uri) if chapter else None, split, text))
    return found


def _parquet(source: ManifestSource) -> dict[str, list]:
    """The user's columns that we know, checked: {column: values}."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = f"corpus source {source.name!r}: Parquet {source.uri!r}"
    with _explained(source, "uri", source.uri):
        fs, p = store.open_fs(source.uri)
        with fs.open(p, "rb") as f:
            try:
                table = pq.read_table(f)
            except pa.ArrowInvalid as e:
                raise ConfigError(f"{where} cannot be read ({e}); write it with pandas or pyarrow") from e
    known = ("uri", "start", "duration", "speaker", "source", "split", "text")
    if "uri" not in table.column_names:
        raise ConfigError(f"{where} has no column 'uri', only {table.column_names}; known columns are {list(known)}")
    if table.num_rows == 0:
        raise ConfigError(f"{where} has no rows; write one row an audio file")
    columns = {}
    for name in known:
        if name not in table.column_names:
            columns[name] = [None] * table.num_rows
            continue
        numeric = name in ("start", "duration")
        try:
            columns[name] = table[name].cast(pa.float64() if numeric else pa.string()).to_pylist()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as e:
            need = "numbers (seconds)" if numeric else "text"
            raise ConfigError(f"{where}: column {name!r} is {table[name].type}, expected {need}") from e
    for row, (uri, split, start, duration) in enumerate(
            zip(columns["uri"], columns["split"], columns["start"], columns["duration"], strict=True)):
        if not uri:
            raise ConfigError(f"{where}: row {row} has no uri; fill it or drop the row")
        if split is not None and split not in SPLITS:
            raise ConfigError(f"{where}: column 'split' holds {split!r} in row {row}, expected one of {SPLITS} or null")
        for name, value in (("start", start), ("duration", duration)):
            if value is not None and not (0 <= value < float("inf")):
                raise ConfigError(f"{where}: column {name!r} holds {value} in row {row}, expected seconds from 0")
    return columns


def _manifest_entries(source: ManifestSource, columns: dict[str, list]) -> list[Entry]:
    """The Parquet itself and the files it names, missing ones too; sorted by uri."""
    def info(uri: str, path: str) -> Entry:
        fs, p = store.open_fs(path)
        try:
            return _entry(uri, path, fs.info(p))
        except FileNotFoundError:
            return Entry(uri, path, -1, "missing")

    root, uris = _root(source), sorted(set(columns["uri"]))
    # where the Parquet lies is Runtime, what it holds is not: hence a name in place of its uri
    places = [(PARQUET, source.uri), *((uri, locate(root, uri)) for uri in uris)]
    with _explained(source, "uri", source.uri), ThreadPoolExecutor(16) as pool:
        entries = list(pool.map(info, *zip(*places, strict=True)))
    if all(e.size < 0 for e in entries[1:]):
        raise ConfigError(f"corpus source {source.name!r}: none of the {len(uris)} files of {source.uri!r} exists "
                          f"under {root!r}; set corpus.sources.root to what its uris are relative to")
    return sorted(entries, key=lambda e: e.uri)


def _manifest_rows(source: ManifestSource, columns: dict[str, list], entries: dict[str, Entry]) -> list[Found]:
    rows = zip(*(columns[c] for c in ("uri", "start", "duration", "speaker", "source", "split", "text")), strict=True)
    return [Found(source.name, uri, entries[uri].path, entries[uri].size, entries[uri].stamp, label or source.name,
                  speaker, None, split, text, start, duration)
            for uri, start, duration, speaker, label, split, text in rows]


class _explained:
    """Turns what a filesystem raises into one ConfigError that names the source, the place and the fix."""

    def __init__(self, source: Source, field: str, place: str):
        self.where = f"corpus source {source.name!r}: {field} {place!r}"
        self.field = field

    def __enter__(self):
        return self

    def __exit__(self, kind, e, _trace):
        if e is None or isinstance(e, ConfigError):
            return
        name = kind.__name__
        if isinstance(e, FileNotFoundError):
            raise ConfigError(f"{self.where} does not exist; correct corpus.sources.{self.field} or mount it") from e
        if name in ("NoCredentialsError", "PartialCredentialsError"):
            raise ConfigError(f"{self.where} needs credentials and none were found; set AWS_ACCESS_KEY_ID and "
                              "AWS_SECRET_ACCESS_KEY (and AWS_ENDPOINT_URL for a server of your own)") from e
        if isinstance(e, PermissionError):
            raise ConfigError(f"{self.where} is denied to these credentials ({e}); give them list and read rights, "
                              "or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to others") from e
        if isinstance(e, (ImportError, ValueError)):
            raise ConfigError(f"{self.where} cannot be opened: {e}") from e
        if name in ("EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError"):
            raise ConfigError(f"{self.where} cannot be reached ({e}); check AWS_ENDPOINT_URL and the network") from e
