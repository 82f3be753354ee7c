"""Lists the audio files of a corpus source: a folder, LibriSpeech's layout, a table, or containers of sounds.

`survey(source)` returns one `Found` a file, a row of the user's table or a container, in natural order of uris.  It opens no
audio.  Uris are relative to the source's root, so that a corpus can move.  `listing(source)` yields every file that the
manifest depends on, transcripts and tables included.  Any fsspec place of corpus.protocols serves; names that start with a
dot are skipped.  Raises ConfigError with one line that names the source, the place and the fix.
"""

from __future__ import annotations

import glob
import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from fsspec.registry import known_implementations, registry
from fsspec.utils import glob_translate

from audiolm import places, store
from audiolm.config.base import ConfigError
from audiolm.config.corpus import (
    CorpusConfig,
    FolderSource,
    LibriSpeechSource,
    MaestroSource,
    ManifestSource,
    SharSource,
    Source,
    WebDatasetSource,
)
from audiolm.data.containers.layout import ENDINGS
from audiolm.data.inputs import maestro, table
from audiolm.data.inputs.found import Found, by_folders, ending, found_of, is_audio, is_like_audio
from audiolm.data.inputs.packed import PACKED, left_out
from audiolm.data.inputs.table import SPLITS
from audiolm.data.inputs.walk import Entry, stat, walk
from audiolm.data.parallel import thread_map
from audiolm.places import is_within

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
PARQUET = "(parquet)"  # the user's table in a listing, wherever it lies
TABLES = ManifestSource | MaestroSource


def roots(corpus: CorpusConfig) -> dict[str, str]:
    """The folder that each source's relative uris start from: {source name: folder URI}."""
    return {s.name: _root(s) for s in corpus.sources}


class OutsideRoot(ValueError):
    """A uri that does not lie below its source's root."""


def locate(root: str, uri: str, follow_links: bool = False) -> str:
    """The path of a uri, which the user's table may give whole. Raises OutsideRoot for one that is not below its root.

    `follow_links` holds for the place that a local path's symlinks lead to as well.
    """
    if (file := places.within(uri)) is not None:
        return f"{uri.removesuffix(file)}{locate(root, file, follow_links)}"
    path = uri if places.is_whole(uri) else places.join(root, uri.removeprefix("./"))
    if not is_within(root, path, follow_links):
        raise OutsideRoot(f"{uri!r} lies outside the root {root!r}; name files below the root alone, or set "
                          "corpus.sources.root to the folder that holds them all")
    return path


def survey(source: Source) -> tuple[list[Found], list[Entry]]:
    """(every sound or container with what its path or row says of it, `listing(source)`), read together. Raises ConfigError.

    Sounds that cannot be used, and files that look like audio and are of no type that is read, have a fault.
    """
    if isinstance(source, TABLES):
        parts, columns = _table(source)
        entries = _table_entries(source, parts, columns)
        found = _table_rows(source, columns, {e.uri: e for e in entries}) if columns else [
            replace(found_of(source.name, e), container=True) for e in parts]
    elif isinstance(source, (WebDatasetSource, SharSource)):
        entries = _files(source)
        entries = [replace(e, fault=PACKED) if e.uri.lower().endswith(COMPRESSED) else e for e in entries]
        tars = [e for e in entries if e.uri.lower().endswith(".tar") or e.fault]
        found = [replace(found_of(source.name, e), split=source.split, container=not e.fault) for e in tars]
    else:
        listed = _files(source)
        entries = _used(listed)
        found = _librispeech(source, entries) if isinstance(source, LibriSpeechSource) else [
            _folder_found(source, e) for e in entries]
        found += [left_out(found_of(source.name, e)) for e in listed if _is_left_out(e)]
    return sorted(found, key=order), entries


def order(f: Found) -> tuple:
    """The sort key of a source's sounds: by name, numbers in order, then by place within a file."""
    return store.natural(f.key), f.start or 0.0, f.duration or 0.0


def listing(source: Source) -> Iterator[Entry]:
    """Every file whose change would change the manifest, once each, as they are found. Raises ConfigError."""
    if isinstance(source, TABLES):
        yield from survey(source)[1]
    else:  # transcripts are listed and not read
        yield from (e for e in _walk(source) if not _is_left_out(e))


def _used(listed: list[Entry]) -> list[Entry]:
    return [e for e in listed if not _is_left_out(e)]


def _is_left_out(e: Entry) -> bool:
    return not e.fault and is_like_audio(e.uri) and not is_audio(e.uri)


def _root(source: Source) -> str:
    if isinstance(source, ManifestSource):
        return source.root or posixpath.dirname(source.uri.rstrip("/"))
    return _base_and_glob(source)[0]


def _base_and_glob(source: Source) -> tuple[str, str | None]:
    """The folder to walk and the pattern below it; a root may itself be a glob or one file."""
    root, place = source.root.rstrip("/"), places.split(source.root.rstrip("/"))
    if isinstance(source, (LibriSpeechSource, SharSource, MaestroSource)):
        return root, None
    # Of a chain only the part within the archive may be a pattern.
    inside = place.protocol in places.ARCHIVES and place.inner is not None
    before, name, after = (f"{place.protocol}://", place.name, f"::{place.inner}") if inside else ("", root, "")
    parts = name.split("/")
    magic = next((i for i, p in enumerate(parts) if re.search(r"[*?\[]", p)), None)
    if magic is None and name.lower().endswith(".tar" if isinstance(source, WebDatasetSource) else ENDINGS):
        folder, file = posixpath.split(name)
        if not (store.is_local(root) and _is_folder(root)):
            return f"{before}{folder}{after}", glob.escape(file)
    if magic is None or (store.is_local(root) and store.exists(root)):  # a folder's name may have brackets
        return root, source.glob
    return f"{before}{'/'.join(parts[:magic])}{after}", "/".join(parts[magic:])


def _is_folder(path: str) -> bool:
    fs, p = store.open_fs(path)
    return fs.isdir(p)


def _endings(source: Source) -> tuple[str, ...]:
    """Of the files that a source's manifest is made of, audio apart."""
    return {"librispeech": (".trans.txt",), "webdataset": (".tar", *COMPRESSED),
            "shar": (".tar", ".jsonl.gz")}.get(source.kind, ())


def _files(source: Source) -> list[Entry]:
    """`_walk(source)`, sorted by uri."""
    return sorted(_walk(source), key=lambda e: e.uri)


def _walk(source: Source) -> Iterator[Entry]:
    """What a source's root holds: files that are audio, look like it or belong to the source, and all faults."""
    base, pattern = _base_and_glob(source)
    matches = re.compile(glob_translate(pattern)).match if pattern not in (None, "**/*") else None
    ends, packed = _endings(source), isinstance(source, (WebDatasetSource, SharSource))

    def wanted(uri: str) -> bool:
        if isinstance(source, SharSource) and not re.fullmatch(
                rf"(.*/)?(cuts\.[^./]+\.jsonl\.gz|{source.field}\.[^./]+\.tar)", uri):
            return False
        name = re.sub(rf"({'|'.join(COMPRESSED)})$", ".tar", uri) if packed else uri
        known = uri.lower().endswith(ends) if packed else is_like_audio(uri) or uri.lower().endswith(ends)
        return known and (matches is None or bool(matches(name.lstrip("/"))))

    usable, others = 0, Counter()
    with _source_errors(source, "root", source.root):
        for e in walk(base, wanted):
            if not e.fault and (e.uri.lower().endswith(".tar") if packed else is_audio(e.uri)):
                usable += 1
            elif e.fault or not e.uri.endswith(ends):
                others[e.fault[1] if e.fault else f"{ending(e.uri)}, which is not read"] += 1
            yield e
    if not usable:
        such = f" that match glob {source.glob!r}" if isinstance(source, (FolderSource, WebDatasetSource)) else ""
        kinds = ", ".join(ends if packed else ENDINGS)
        found = "".join(f"; {n} x {what}" for what, n in others.most_common(3))
        what = "tars" if packed else "audio files"
        raise ConfigError(f"corpus source {source.name!r}: no {what} under root {source.root!r}{such}; "
                          f"expected files ending in {kinds}{found}")


def _folder_found(source: FolderSource, e: Entry) -> Found:
    speaker, chapter = by_folders(e.uri, source.speaker)
    return replace(found_of(source.name, e), speaker=speaker, chapter=chapter, split=source.split)


def _librispeech(source: LibriSpeechSource, entries: list[Entry]) -> list[Found]:
    """Audio with speaker, chapter, split and text from the layout; the subset's name or `splits` gives the split."""
    audio = [e for e in entries if is_audio(e.uri)]
    transcripts = [e for e in entries if e.uri.lower().endswith(".trans.txt") and not e.fault]
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
        found.append(replace(found_of(source.name, e), speaker=speaker, chapter=posixpath.dirname(e.uri) if chapter else None,
                             split=split, text=text))
    return found + [found_of(source.name, e) for e in entries if e.fault and not is_audio(e.uri)]


def _table(source: TABLES) -> tuple[list[Entry], dict[str, list] | None]:
    """(the files of the table, its checked columns); None where the rows hold sounds themselves."""
    with _source_errors(source, *_place_of(source)):
        if isinstance(source, MaestroSource):
            parts = maestro.files(source)
            return parts, maestro.read(source, parts[0])
        parts = table.files(source)
        if not table.has_sounds(source, parts):
            return parts, table.read(source, parts)
    if source.root:
        raise ConfigError(f"corpus source {source.name!r}: the rows of {source.uri!r} hold sounds and name no files below root "
                          f"{source.root!r}; leave corpus.sources.root out")
    return parts, None


def _place_of(source: TABLES) -> tuple[str, str]:
    """(the config's field, its value) of where a table lies."""
    return ("root", source.root) if isinstance(source, MaestroSource) else ("uri", source.uri)


def _table_entries(source: TABLES, parts: list[Entry], columns: dict[str, list] | None) -> list[Entry]:
    """The table's own files and the files it names, missing ones too; sorted by uri."""
    # The table is listed under a fixed name: its content is part of the corpus, its place is not.
    alone = [replace(e, uri=PARQUET) if len(parts) == 1 else replace(e, uri=f"{PARQUET}/{e.uri}") for e in parts]
    if columns is None:
        return sorted(parts, key=lambda e: e.uri)
    root, uris = _root(source), sorted(set(columns["uri"]))

    def entry(uri: str) -> Entry:
        protocol = places.split(uri).protocol
        if protocol not in known_implementations.keys() | registry.keys() and protocol != "local":
            return Entry(uri, uri, -1, "", ("unreadable", f"no filesystem has the protocol {protocol}"))
        try:
            path = locate(root, uri, follow_links=True)
        except OutsideRoot:
            raise
        except (OSError, ValueError) as e:  # a path that the system itself refuses, such as one with a NUL
            return Entry(uri, uri, -1, "", ("unreadable", str(e)))
        return stat(uri, path)

    with _source_errors(source, *_place_of(source)):
        entries = list(thread_map(entry, uris))
    if all(e.size < 0 for e in entries):
        fix = ("get the archive with the audio, as the one of MIDI files has none" if isinstance(source, MaestroSource) else
               "set corpus.sources.root to what its uris are relative to")
        raise ConfigError(f"corpus source {source.name!r}: none of the {len(uris)} files of "
                          f"{parts[0].path if len(parts) == 1 else source.uri!r} exists under {root!r}; {fix}")
    return sorted([*alone, *entries], key=lambda e: e.uri)


def _table_rows(source: TABLES, columns: dict[str, list], entries: dict[str, Entry]) -> list[Found]:
    found = []
    for values in zip(*columns.values(), strict=True):
        row = dict(zip(columns, values, strict=True))
        e = entries[row["uri"]]
        found.append(replace(found_of(source.name, e), **{**row, "source": row["source"] or source.name}))
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
        elif isinstance(e, NotADirectoryError):
            fault = f"is a file and no folder; name a folder or an audio file, or read a zip file's members by zip://::{place}"
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
        elif name in ("ConnectError", "ConnectTimeout", "OfflineModeIsEnabled"):  # of the Hub's client
            fault = f"cannot be reached ({e}); check HF_ENDPOINT, HF_HUB_OFFLINE and the network"
        else:
            raise
        raise ConfigError(f"corpus source {source.name!r}: {field} {place!r} {fault}") from e
