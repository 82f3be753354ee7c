"""Sounds within files: webdataset tars, Lhotse Shar, and Parquet whose rows hold audio; each file is read in order, once.

`members` yields every sound with its bytes.  Afterwards a clip's uri names a stretch of the tar (places.member), or a row
of the Parquet (places.row), so that one sound is read without the others.
"""

from __future__ import annotations

import gzip
import json
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from audiolm import places, store
from audiolm.config.corpus import ManifestSource, SharSource, WebDatasetSource
from audiolm.data.inputs import table
from audiolm.data.inputs.found import Found, by_folders, is_audio, is_like_audio
from audiolm.data.inputs.walk import LEFT_OUT, shown_name

BLOCK = 8 << 20  # bytes of a tar read at once
REST = 2 << 20  # bytes of padding after a tar's end, at most
ROWS = 32  # of a Parquet file in memory at once
META = ("speaker", "source", "split", "text")
PACKED = ("unreadable", "a compressed tar cannot be read by ranges; unpack it, as gunzip does")
Member = tuple[Found, bytes]
Containing = ManifestSource | SharSource | WebDatasetSource


def members(source: Containing, f: Found) -> Iterator[Member]:
    """(sound, its bytes) for every sound of a container, in its order; what cannot be read has a fault and no bytes."""
    if isinstance(source, ManifestSource):
        yield from _rows(source, f)
    elif isinstance(source, SharSource):
        yield from _shar(source, f)
    else:
        yield from _webdataset(source, f)


def left_out(f: Found) -> Found:
    return replace(f, fault=(LEFT_OUT, f"{posixpath.splitext(f.key)[1].lower()} is no type that is read"))


def _webdataset(source: WebDatasetSource, f: Found) -> Iterator[Member]:
    """Samples are runs of members that share their name up to the first dot."""
    run: list[Member] = []
    for sound, data in _tar(f):
        if run and _key(run[0][0].name) != _key(sound.name):
            yield from _sample(source, run)
            run = []
        if sound.fault or is_like_audio(sound.name) or sound.name.lower().endswith((".json", ".txt")):
            run.append((sound, data))
    yield from _sample(source, run)


def _key(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _sample(source: WebDatasetSource, run: list[Member]) -> Iterator[Member]:
    """The sounds of one sample, with what its JSON and its text say."""
    said: dict[str, Any] = {}
    for m, data in run:
        if m.name.lower().endswith(".txt"):
            said.setdefault("text", data.decode("utf-8", "replace").strip())
        elif m.name.lower().endswith(".json"):
            said |= _fields(source, data)
    for m, data in run:
        if not m.fault and not is_like_audio(m.name):
            continue
        speaker, chapter = by_folders(m.name, source.speaker)
        known = {k: v for k, v in said.items() if v is not None}
        m = replace(m, **{"speaker": speaker, "chapter": chapter, "split": source.split, **known})
        if m.split not in (None, *table.SPLITS):
            m = replace(m, split=None, fault=("unreadable", f"its split is {m.split!r}, expected one of {table.SPLITS}"))
        yield m if m.fault or is_audio(m.name) else left_out(m), data


def _fields(source: WebDatasetSource, data: bytes) -> dict[str, str | None]:
    """The known fields of a sample's JSON; none where it is damaged."""
    try:
        fields = json.loads(data)
    except ValueError:
        return {}
    named = {c: source.columns.get(c, c) for c in META}
    fields = fields if isinstance(fields, dict) else {}
    return {c: str(fields[own]) for c, own in named.items() if fields.get(own) not in (None, "")}


def _shar(source: SharSource, f: Found) -> Iterator[Member]:
    """The sounds of a field's tar, each with the supervisions of its cut."""
    folder, name = posixpath.split(f.uri)
    number = name.split(".")[1]
    root = f.path[:len(f.path) - len(f.uri)].rstrip("/")
    listed = f"cuts.{number}.jsonl.gz"
    try:
        cuts = {c["id"]: c for c in _cuts(places.join(root, posixpath.join(folder, listed)))}
    except (FileNotFoundError, ValueError, KeyError, TypeError, EOFError, gzip.BadGzipFile) as e:
        missing = isinstance(e, FileNotFoundError)
        fault = ("missing", f"there is no {listed} beside it") if missing else ("unreadable", f"{listed} is damaged: {e}")
        yield replace(f, container=False, fault=fault), b""
        return
    for sound, data in _tar(f):
        stem, dot = posixpath.splitext(sound.name)
        if dot in (".json", ".nometa") and not sound.fault:
            continue
        cut = cuts.pop(stem, None)
        if not sound.fault and cut is None:
            sound = replace(sound, fault=("unreadable", f"{listed} has no cut {stem!r}"))
        elif not sound.fault and dot == ".nodata":
            sound = replace(sound, fault=("missing", f"the cut has no {source.field}"))
        elif not sound.fault and not is_audio(sound.name):
            sound = left_out(sound)
        yield replace(sound, split=source.split, **_supervisions(cut or {})), data
    for stem in cuts:
        fault = "missing", f"{name} holds no audio of this cut"
        yield _within(f, uri=places.member(stem, 0, 0, f.uri), size=-1, name=stem, fault=fault), b""


def _cuts(path: str) -> list[dict[str, Any]]:
    data = store.get(path)
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    return [json.loads(line) for line in data.splitlines() if line.strip()]


def _supervisions(cut: dict[str, Any]) -> dict[str, str | None]:
    """The text of a cut's supervisions in their order, and its speaker where there is one only."""
    said = sorted(cut.get("supervisions") or (), key=lambda s: s.get("start") or 0)
    speakers = {s.get("speaker") for s in said} - {None}
    texts = [s["text"] for s in said if s.get("text")]
    return {"speaker": str(speakers.pop()) if len(speakers) == 1 else None, "text": " ".join(texts) or None}


def _within(f: Found, **of: Any) -> Found:
    """A sound of the container f."""
    return replace(f, stamp="", container=False, **of)


def _tar(f: Found) -> Iterator[Member]:
    """(member as a sound, its bytes) of the regular files of a tar, read as a stream; damage is its last entry."""
    fs, p = store.open_fs(f.path)
    remote = {"block_size": BLOCK, "cache_type": "readahead"} if fs.async_impl else {}
    with fs.open(p, "rb", **remote) as raw:
        try:
            with tarfile.open(fileobj=raw, mode="r|", bufsize=BLOCK) as tar:
                for m in tar:
                    name = shown_name(m.name.removeprefix("./"))
                    if m.isdir() or any(part.startswith(".") for part in name.split("/")):
                        continue
                    uri, path = (places.member(name, m.offset_data, m.size, file) for file in (f.uri, f.path))
                    fault = None if name == m.name.removeprefix("./") else ("unreadable", "its name is not UTF-8; rename it")
                    if not m.isreg() or m.issparse():
                        fault = "unreadable", "a link or another special member of the tar, not a regular file"
                    sound = _within(f, uri=uri, path=path, size=m.size, name=name, fault=fault)
                    yield sound, b"" if fault else _read(tar, m)
                _check_end(fs, p, f.size, tar.offset)
        except (tarfile.TarError, EOFError) as e:
            raw.seek(0)
            packed = raw.read(2) == b"\x1f\x8b"
            fault = PACKED if packed else ("truncated", f"the tar is damaged or ends early: {e}")
            yield replace(f, container=False, fault=fault), b""


def _check_end(fs: Any, p: str, size: int, at: int) -> None:
    """Raises ReadError where a tar was read to byte `at` and that is not its end: tarfile stops at damage in silence."""
    mark = fs.cat_file(p, start=at, end=min(size, at + tarfile.BLOCKSIZE))
    if len(mark) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"no end mark at byte {at} of {size}")
    if mark.strip(b"\0"):
        raise tarfile.ReadError(f"no member begins at byte {at} of {size}")
    if size - at > REST:
        raise tarfile.ReadError(f"{size - at} bytes follow its end at byte {at}; unpack joined tars and pack them as one")


def _read(tar: tarfile.TarFile, m: tarfile.TarInfo) -> bytes:
    data = tar.extractfile(m).read()
    if len(data) < m.size:
        raise tarfile.ReadError(f"member {shown_name(m.name)!r} has {len(data)} of {m.size} bytes")
    return data


def _rows(source: ManifestSource, f: Found) -> Iterator[Member]:
    """The sounds of a Parquet file's rows, some rows at a time."""
    import pyarrow as pa

    from audiolm.data import parquet

    named, at = table.names(source), table.where(source, f.path)
    fs, p = store.open_fs(f.path)
    with fs.open(p, "rb") as raw:
        try:
            file = parquet.open_file(raw)
            own = {c: n for c, n in named.items() if c not in ("uri", table.AUDIO) and n in file.schema_arrow.names}
            for group in range(file.num_row_groups):
                i = 0
                for batch in file.iter_batches(ROWS, [group], [named[table.AUDIO], *own.values()]):
                    columns = {c: table.checked(c, batch[n], at) for c, n in own.items()}
                    table.check_values(columns, at)
                    for row, sound in enumerate(batch[named[table.AUDIO]].to_pylist()):
                        yield _row(f, named[table.AUDIO], group, i, sound, {c: v[row] for c, v in columns.items()})
                        i += 1
        except (pa.ArrowException, OSError) as e:
            if isinstance(e, OSError) and e.errno is not None:
                raise
            yield replace(f, container=False, fault=("truncated", f"the Parquet is damaged: {e}")), b""


def _row(f: Found, column: str, group: int, i: int, sound: dict[str, Any] | None, said: dict[str, Any]) -> Member:
    data = (sound or {}).get("bytes") or b""
    base = posixpath.splitext(f.uri)[0]
    name = shown_name((sound or {}).get("path") or f"{base}-{group}-{i}")
    uri, path = (places.row(column, group, i, len(data), name, file) for file in (f.uri, f.path))
    fault = None if data else ("missing", "the row holds no bytes")
    said = {k: v for k, v in said.items() if v is not None}
    return replace(_within(f, uri=uri, path=path, size=len(data), name=name, fault=fault), **said), data
