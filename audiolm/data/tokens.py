"""The Parquet token store: tokens as encoded, never deduplicated, one whole file per manifest shard.

`shard-00000.parquet` holds the manifest's shard 0 in its order: id, n_frames, n_dedup (semantic only: frames after
collapsing runs) and one list<uint16> column per quantizer level (q00, q01, ...), so a reader takes the levels it needs.
Copies of train clips at other speeds (ids `{id}@{speed}`) follow a shard's clips; only language models train on them.
Every footer names the TokenSpec, the tokenizer's hash, device, dtype, library versions and the manifest's build, and counts
the codes.  `shards.parquet` is the index of the shards (data/token_index.py); a file that it does not know is refused.
A spec here is the plain JSON of tokenizers.base.TokenSpec.
Shapes: z_T semantic tokens, codes_TQ tokens of Q levels, T frames, V codes.
"""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from fsspec.parquet import open_parquet_file

from audiolm import store
from audiolm.data import parquet
from audiolm.data.token_index import KEY, NAME, IndexBuilder, ShardRecord, TokenError, TokenIndex, read_index

RATIO = 2  # acoustic frames per semantic frame, the contract of tokenizers.base
ROW_GROUP = 200  # clips; small enough that a reader of one clip does not decode an hour
FOOTER = 65_536  # bytes read first, at a file's end; they hold the footer unless it has very many columns
COUNTS = b"audiolm.counts"  # of the footer: counts_QV of the clips that are no copies, int32, compressed
OWN = ("shard", "clips", "copies", "frames", "digest", "rejected")  # of one file's metadata; all shards share the rest
REPAIR = "give the run's command once more with --repair, which makes only what is missing"


@dataclass(frozen=True)
class Ragged:
    """Lists of different lengths in one array: clip i is values[offsets[i]:offsets[i + 1]]."""

    values: np.ndarray
    offsets: np.ndarray

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.offsets[i]:self.offsets[i + 1]]


def shard_name(k: int) -> str:
    return f"shard-{k:05d}.parquet"


def level_name(q: int) -> str:
    return f"q{q:02d}"


def run_starts(z_T: np.ndarray) -> np.ndarray:
    """True where a run of equal tokens begins."""
    return np.concatenate([np.ones(min(1, len(z_T)), bool), z_T[1:] != z_T[:-1]])


def shard_bytes(ids: Sequence[str], codes: Sequence[np.ndarray], meta: dict[str, Any], shard: int,
                dedup: bool, rejected: Sequence[str] = (), copies: int = 0) -> bytes:
    """A shard file: codes[i] is codes_TQ of clip ids[i]; what stands there for `rejected` ids is used by nobody.  The last
    `copies` are clips at other speeds.

    `meta` (which, spec, hash, manifest, shards, device, dtype, versions) is common to all shards of a store.  The same
    tokens give the same bytes.  Raises TokenError for codes that do not fit the spec."""
    spec = meta["spec"]
    for clip, c in zip(ids, codes, strict=True):
        if c.ndim != 2 or c.shape[1] != spec["n_q"] or c.size == 0 or c.min() < 0 or c.max() >= spec["vocab"]:
            raise TokenError(f"clip {clip}: codes of shape {c.shape} and range {c.min(initial=0)}..{c.max(initial=0)} "
                             f"do not fit tokenizer {spec['name']!r} (n_q {spec['n_q']}, vocab {spec['vocab']})")
    frames = np.array([len(c) for c in codes], np.int32)
    offsets = pa.array(np.concatenate([[0], np.cumsum(frames)]).astype(np.int32))  # shared by all levels
    columns = {"id": pa.array(list(ids), pa.string()), "n_frames": pa.array(frames)}
    if dedup:
        columns["n_dedup"] = pa.array(np.array([int(run_starts(c[:, 0]).sum()) for c in codes], np.int32))
    counts_QV, originals = np.zeros((spec["n_q"], spec["vocab"]), np.int32), int(frames[:len(frames) - copies].sum())
    for q in range(spec["n_q"]):
        values = np.concatenate([c[:, q] for c in codes] or [np.empty(0)]).astype(np.uint16)
        columns[level_name(q)] = pa.ListArray.from_arrays(offsets, pa.array(values))
        counts_QV[q] = np.bincount(values[:originals], minlength=spec["vocab"])
    digest = clips_digest(ids, frames.astype(np.int64) * spec["hop"])
    own = {"shard": shard, "clips": len(frames), "copies": copies, "frames": int(frames.sum()), "digest": digest,
           "rejected": list(rejected)}
    table = pa.table(columns).replace_schema_metadata({KEY: json.dumps({**meta, **own}, sort_keys=True).encode()})
    return parquet.table_bytes(table, ROW_GROUP, {COUNTS: zlib.compress(counts_QV.tobytes())})


def clips_digest(ids: Sequence[str], samples: np.ndarray) -> str:
    """A hash of a shard's clips and their padded lengths in samples, whatever the frame rate.

    It is equal in a semantic and an acoustic store exactly where every clip's frames agree.  Pairs of stores are so
    checked by their footers alone."""
    rows = "".join([f"{i}\t{n}\n" for i, n in zip(ids, samples.tolist(), strict=True)])
    return hashlib.blake2b(rows.encode(), digest_size=8).hexdigest()


def read_meta(path: str) -> dict[str, Any]:
    """The metadata in a shard file's footer. Raises FileNotFoundError, DamagedFile, and TokenError for another kind of file."""
    return _read(path, lambda f: _meta(f, path))


def _meta(file: Any, path: str) -> dict[str, Any]:
    found = (file.schema_arrow.metadata or {}).get(KEY)
    if found is None:
        raise TokenError(f"{path} is not a token shard: its metadata has no {KEY.decode()}; "
                         "remove it and run the token step again")
    return json.loads(found)


def read_record(path: str, size: int) -> ShardRecord:
    """A shard file's footer, and n_dedup of its clips; no token is read. Raises as `read_meta`."""
    return _read(path, lambda f: _record(f, path, size), FOOTER)


def record_of(data: bytes, name: str) -> ShardRecord:
    """`read_record` of a shard file's bytes."""
    return _record(parquet.open_file(io.BytesIO(data)), name, len(data))


def _record(file: Any, path: str, size: int) -> ShardRecord:
    meta = _meta(file, path)
    try:
        own, spec = {name: meta.pop(name) for name in OWN}, meta["spec"]
        counts = zlib.decompress(file.metadata.metadata[COUNTS])
    except (KeyError, zlib.error) as e:
        raise TokenError(f"{path} is damaged or of an older version ({type(e).__name__}: {e}); remove it and run the token "
                         "step again") from e
    n_dedup = file.read(columns=["n_dedup"])["n_dedup"].to_numpy() if "n_dedup" in file.schema_arrow.names else None
    return ShardRecord(meta=meta, size=size, n_dedup=n_dedup, **own,
                       counts_QV=np.frombuffer(counts, np.int32).reshape(spec["n_q"], spec["vocab"]))


def _read(path: str, read: Callable[[Any], Any], ahead: int | None = None) -> Any:
    """What `read` makes of an open file, whose pages are verified; from an object store in requests of `ahead` bytes."""
    fs, p = store.open_fs(path)

    def whole():
        with fs.open(p, "rb", block_size=ahead) as f:
            return read(parquet.open_file(f))

    with parquet.intact(path):
        return store.persist(path, whole)


def tokenizer_dtype(path: str) -> str:
    """The number format that a store's tokenizer computed in: "float32" or "bfloat16". Raises as `read_meta`."""
    return read_meta(store.join(path, shard_name(0)))["dtype"]


def spec_of(path: str) -> dict[str, Any]:
    """The TokenSpec of a store, by its first shard, without opening the store. Raises as `read_meta`."""
    return read_meta(store.join(path, shard_name(0)))["spec"]


def open_columns(path: str, columns: Sequence[str]) -> Any:
    """An open shard file to read these columns from; from an object store only their bytes are fetched, in parallel."""
    fs, p = store.open_fs(path)
    if store.is_local(path):
        return fs.open(p, "rb")
    return open_parquet_file(p, fs=fs, columns=list(columns), engine="pyarrow", footer_sample_size=FOOTER)


def read_shard(path: str, columns: Sequence[str]) -> dict[str, Any]:
    """Chosen columns of a shard as numpy: id (objects), n_frames, n_dedup (int32), q00... (Ragged of uint16)."""
    table = _read(path, lambda f: f.read(columns=list(columns)))
    if missing := [c for c in columns if c not in table.column_names]:
        raise TokenError(f"{path} has no column {missing[0]!r}; it holds {table.column_names}")
    out: dict[str, Any] = {}
    for name in columns:
        column = table[name]
        if pa.types.is_list(column.type):
            lengths = pc.list_value_length(column).to_numpy()
            out[name] = Ragged(pc.list_flatten(column).to_numpy(), np.concatenate([[0], np.cumsum(lengths)]))
        else:
            out[name] = column.to_numpy()
    return out


def listing(path: str) -> dict[str, int]:
    """Sizes in bytes of the shard files of a store, by name."""
    return {n: size for n, size in store.files(path).items() if n.startswith("shard-") and n.endswith(".parquet")}


def index_shards(path: str) -> None:
    """Writes the index of a folder of shards from their footers."""
    found = listing(path)
    records = sorted((read_record(store.join(path, name), size) for name, size in found.items()), key=lambda r: r.shard)
    builder = IndexBuilder(np.array([r.clips for r in records]), records[0].n_dedup is not None)
    for record in records:
        builder.add(record)
    store.put(store.join(path, NAME), builder.to_bytes())


class TokenStore:
    """A finished store: `spec` (TokenSpec as JSON), `hash` of its tokenizer, `shards` (their number), `meta`, `files` (each
    shard's own fields).

    Reads the index and a listing.  Raises TokenError where they do not agree."""

    def __init__(self, path: str):
        self.path, found = path, listing(path)
        try:
            self.index: TokenIndex = read_index(path)
        except FileNotFoundError as e:
            raise TokenError(f"{path} has no index {NAME} of its {len(found)} shards: {REPAIR}; where it never had one, of an "
                             "older version, run its token step again with --force" if found else
                             f"no token shards in {path}; run its token step first") from e
        self.meta, self.files = self.index.meta, self.index.files
        self.spec, self.hash, self.shards = self.meta["spec"], self.meta["hash"], len(self.files)
        self.speeds = tuple(self.meta.get("speeds", ()))
        expected = {shard_name(k): file["size"] for k, file in enumerate(self.files)}
        if missing := [name for name in expected if name not in found]:
            raise TokenError(f"{path} lacks {len(missing)} of {self.shards} shards, first {missing[0]}; {REPAIR}")
        if added := [name for name in found if name not in expected]:
            raise TokenError(f"{path} holds {len(added)} files that its index does not name, first {added[0]}: remove them, or "
                             "run the token step again with --force")
        if changed := [name for name, size in found.items() if size != expected[name]]:
            name = changed[0]
            raise TokenError(f"{path}/{name} has {found[name]} bytes, the index says {expected[name]}, and {len(changed) - 1} "
                             f"more shards differ; {REPAIR}")

    def read(self, k: int, columns: Sequence[str]) -> dict[str, Any]:
        """Columns of shard k as `read_shard` returns them."""
        return read_shard(store.join(self.path, shard_name(k)), columns)

    def levels(self, k: int, levels: Sequence[int]) -> dict[str, Any]:
        """id and the given levels (from 0) of shard k."""
        return self.read(k, ["id", *map(level_name, levels)])

    def codes(self, k: int, levels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(first frame of each clip, and the end; codes_TQ uint16 of the given levels) of shard k.

        Reads a row group at a time, so little more than the result is in memory."""
        path = store.join(self.path, shard_name(k))
        with parquet.intact(path):
            return store.persist(path, lambda: self._codes(path, k, list(map(level_name, levels))))

    def _codes(self, path: str, k: int, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
        codes_TQ, lengths, at = np.empty((self.files[k]["frames"], len(names)), np.uint16), [], 0
        with open_columns(path, names) as f:
            file = parquet.open_file(f)
            if (meta := _meta(file, path))["digest"] != self.files[k]["digest"] or meta["hash"] != self.hash:
                raise TokenError(f"{path} is not the shard that the store's index describes (tokenizer {meta['hash']!r}, the "
                                 f"index has {self.hash!r}); {REPAIR}")
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=names)
                lengths.append(pc.list_value_length(table[names[0]]).to_numpy())
                end = at + int(lengths[-1].sum())  # every level has the same frames
                for q, name in enumerate(names):
                    codes_TQ[at:end, q] = pc.list_flatten(table[name]).to_numpy()
                at = end
        return np.concatenate([[0], *lengths]).cumsum(), codes_TQ

    def originals(self, ids: Sequence[str]) -> int:
        """The number of a shard's rows that are clips; the rows behind them are copies at other speeds."""
        # Only train shards have copies: there row n is the first clip's copy at the first speed.
        n = len(ids) // (1 + len(self.speeds))
        return n if self.speeds and n and ids[n] == f"{ids[0]}@{self.speeds[0]}" else len(ids)


def check_pair(semantic: TokenStore, acoustic: TokenStore) -> None:
    """Raises TokenError unless both hold the same clips of one manifest, with RATIO acoustic per semantic frame."""
    pair = f"{semantic.path} and {acoustic.path}"
    for field in ("manifest", "shards", "speeds"):
        a, b = semantic.meta.get(field), acoustic.meta.get(field)
        if (a or []) != (b or []):
            raise TokenError(f"{pair} do not belong together: {field} {a!r} and {b!r}; encode both from one manifest, with the "
                             "same tokens.speeds")
    if semantic.spec["hop"] != RATIO * acoustic.spec["hop"]:
        raise TokenError(f"frame rates do not fit: hop {semantic.spec['hop']} of {semantic.spec['name']!r} must be "
                         f"{RATIO} x hop {acoustic.spec['hop']} of {acoustic.spec['name']!r}")
    # Digests stand in the footers, so that no token is read unless two files differ.
    for k, (a, b) in enumerate(zip(semantic.files, acoustic.files, strict=True)):
        if a["digest"] != b["digest"]:
            raise TokenError(f"{shard_name(k)} of {pair} differ: {_difference(semantic, acoustic, k)}; "
                             "run both token steps again with --force")


def _difference(semantic: TokenStore, acoustic: TokenStore, k: int) -> str:
    """The first row of shard k in which two stores differ, in words."""
    a, b = (s.read(k, ["id", "n_frames"]) for s in (semantic, acoustic))
    for row, (i, j) in enumerate(zip(a["id"], b["id"], strict=False)):
        if i != j:
            return f"row {row} is clip {i} and clip {j}"
        if RATIO * a["n_frames"][row] != b["n_frames"][row]:
            return (f"clip {i} has {a['n_frames'][row]} semantic and {b['n_frames'][row]} acoustic frames, "
                    f"expected 1:{RATIO}")
    return f"{len(a['id'])} and {len(b['id'])} clips"
