"""What 60,000 hours take: time and peak memory of planning, opening and ordering 20 million clips in 60,000 shards.

    python tests/bench/scale.py                        20 million clips; 4 GB of disk, which are removed afterwards
    python tests/bench/scale.py --clips 200000         a hundredth of it
    python tests/bench/scale.py --only pair,packing

The manifest and the indexes of both token stores are whole; shards are stand-ins of a byte, but for the half finished
store, whose footers are real and whose clips have one frame each.  Every figure is from a process of its own; CPU s are
its own, so that what else runs on the machine shows as the difference to the seconds.  Nothing is asserted.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from audiolm import store  # noqa: E402
from audiolm.config.load import load_config  # noqa: E402
from audiolm.dag.plan import plan, toposort  # noqa: E402
from audiolm.data import token_index, tokens  # noqa: E402
from audiolm.data.clip_groups import FILE, ROWS, STATISTICS  # noqa: E402
from audiolm.data.clip_table import read_clip_table, shard_sizes  # noqa: E402
from audiolm.data.clips import clips_parquet  # noqa: E402
from audiolm.data.parquet import table_bytes  # noqa: E402
from tests.bench.loader import peak_mb  # noqa: E402
from workflows.full_pipeline import graph  # noqa: E402

CLIPS, A_SHARD = 20_000_000, 333
HELD_OUT = 100  # every so many shards one is dev and one is test
K, VOCAB, N_Q, RATE = 1024, 1024, 8, 16_000
SPECS = {"semantic": {"name": "semantic", "sample_rate": RATE, "hop": 640, "n_q": 1, "vocab": K},
         "acoustic": {"name": "acoustic", "sample_rate": RATE, "hop": 320, "n_q": N_Q, "vocab": VOCAB}}


# --- what is measured, each in a process of its own

def status(folder: str) -> str:
    """The plan of a run, and what its steps need of the manifest."""
    from audiolm.pipeline.corpus_needs import check_corpus_needs

    cfg = load_config(str(ROOT / "workflows" / "paper.yaml"), [f"store={folder}/store"])
    rows = plan(toposort(graph(cfg)), cfg.store)
    steps = [r.step for r in rows if not r.step.name.startswith(("layers", "semantic_figures"))]  # these want ABX items
    check_corpus_needs(cfg, steps, f"{folder}/manifest")
    return f"{len(rows)} steps"


def missing(folder: str) -> str:
    """What a token step lacks of which half is done."""
    from audiolm.tokenizers.encode import finished_shards
    from tests.worlds.basics import RecordingOut

    rows_S, _ = shard_sizes(f"{folder}/manifest")
    index, out = token_index.IndexBuilder(rows_S, dedup=True), RecordingOut(f"{folder}/half")
    for record in finished_shards(out, rows_S, tokens.listing(out.path), meta_of("semantic", len(rows_S))):
        index.add(record)
    return f"{int((~index.done_S).sum())} of {len(rows_S)} shards"


def pair(folder: str) -> str:
    """Both token stores opened and compared."""
    both = [tokens.TokenStore(f"{folder}/{which}_tokens") for which in SPECS]
    tokens.check_pair(*both)
    return f"2 x {both[0].shards} shards"


def packing(folder: str) -> str:
    """A language model's batches opened, and the order of every row of an epoch."""
    from audiolm.config.lm import LMConfig
    from audiolm.lm.batches import TokenBatches
    from audiolm.lm.layouts import build_stages

    stage = build_stages(LMConfig(), N_Q, VOCAB, K)["lm_coarse"]
    paths = [f"{folder}/{name}" for name in ("manifest", "semantic_tokens", "acoustic_tokens")]
    data = TokenBatches(*paths, stage, "train", None, 64, 0)
    windows = len(data.plan.epoch(0)[1])
    clips = sum(len(data.plan.window(0, w).clips) for w in range(windows))
    return f"{clips} clips in {data.plan.rows} rows"


def crops(folder: str) -> str:
    """A codec's clips, and the order of every crop of an epoch."""
    from audiolm.data.crops import CropSampler

    clips = read_clip_table(f"{folder}/manifest", "train")
    order = CropSampler(clips.samples, clips.shards, 2 * RATE, 64, 0)
    slots = sum(len(order._window(0, w)) for w in range(len(order._epoch(0)[1])))
    return f"{slots} crops; clip {clips[len(clips) // 2].id}"


PARTS = {f.__name__: f for f in (status, missing, pair, packing, crops)}


# --- what it is measured on

def meta_of(which: str, shards: int) -> dict:
    return {"which": which, "spec": SPECS[which], "hash": "h", "manifest": "m.0001", "shards": shards, "speeds": [],
            "device": "cpu", "dtype": "float32", "versions": {}}


def build(folder: str, clips: int) -> None:
    """A manifest, the indexes of both token stores and a half finished semantic store."""
    draw, shards = np.random.default_rng(0), max(3, round(clips / A_SHARD))
    rows_S = np.diff(np.linspace(0, clips, shards + 1).astype(np.int64))
    split_S = np.where(np.arange(shards) >= shards - shards // HELD_OUT - 1, "test",
                       np.where(np.arange(shards) >= shards - 2 * (shards // HELD_OUT) - 2, "dev", "train"))
    builders = {which: token_index.IndexBuilder(rows_S, which == "semantic") for which in SPECS}
    for name in ("manifest", "half", *(f"{which}_tokens" for which in SPECS)):
        os.makedirs(f"{folder}/{name}")
    schema, step = pq.read_schema(io.BytesIO(clips_parquet([]))), ROWS // A_SHARD
    with pq.ParquetWriter(f"{folder}/manifest/{FILE}", schema, write_page_checksum=True, write_statistics=STATISTICS) as sink:
        for split in ("train", "dev", "test"):
            numbers = np.flatnonzero(split_S == split)
            for group in (numbers[i:i + step] for i in range(0, len(numbers), step)):
                table = clip_rows(group, rows_S[group], split, schema, draw)
                sink.write_table(table, len(table))
                index(table, group, rows_S, builders, draw)
    for which, builder in builders.items():
        for k in range(shards):
            Path(folder, f"{which}_tokens", tokens.shard_name(k)).write_bytes(b"x")
        Path(folder, f"{which}_tokens", token_index.NAME).write_bytes(builder.to_bytes())
    half(f"{folder}/half", rows_S)


def clip_rows(numbers: np.ndarray, rows: np.ndarray, split: str, schema: pa.Schema, draw: np.random.Generator) -> pa.Table:
    """The manifest's rows of some shards: clips of 2 to 19.6 s, 60,000 h in all, each a file of its own."""
    n, shard = int(rows.sum()), np.repeat(numbers, rows)
    row = np.arange(n) - np.repeat(np.cumsum(rows) - rows, rows)
    name = pc.binary_join_element_wise(pa.array(shard).cast("string"), pa.array(row).cast("string"), "/")
    frames, digits = pa.array(draw.integers(2 * RATE, round(19.6 * RATE), n)), draw.bytes(12 * n).hex().encode()
    places = pa.py_buffer(np.arange(0, 24 * n + 1, 24, dtype=np.int32))
    hashes = pa.StringArray.from_buffers(n, places, pa.py_buffer(digits))
    zeros, same = pa.array(np.zeros(n, np.int64)), {s: pa.repeat(s, n) for s in ("corpus", split)}
    part = schema.field("parts").type.value_type
    values = {"id": name, "uri": pc.binary_join_element_wise(name, "flac", "."), "start": zeros, "frames": frames,
              "offset": zeros, "text": pa.nulls(n, "string"), "channel": pa.nulls(n, "int64"), "hash": hashes}
    parts = pa.ListArray.from_arrays(np.arange(n + 1, dtype=np.int32), pa.StructArray.from_arrays(
        [values[f.name] for f in part], fields=list(part)))
    columns = {"id": pc.binary_join_element_wise("corpus", name, "/"), "origin": same["corpus"], "source": same["corpus"],
               "speaker": pa.array(shard).cast("string"), "split": same[split], "sample_rate": pa.repeat(RATE, n).cast("int64"),
               "frames": frames, "parts": parts, "shard": pa.array(shard), "row": pa.array(row)}
    return pa.table([columns[f.name] for f in schema], schema=schema)


def index(table: pa.Table, numbers: np.ndarray, rows_S: np.ndarray, builders: dict, draw: np.random.Generator) -> None:
    """Adds shards with the manifest's lengths to both indexes."""
    ids, samples, at = table["id"].to_pylist(), 640 * -(-table["frames"].to_numpy() // 640), 0
    for k in numbers.tolist():
        own = slice(at, at := at + int(rows_S[k]))
        digest, runs = tokens.clips_digest(ids[own], samples[own]), (samples[own] // 640 / 1.4).astype(np.int32)
        for which, builder in builders.items():
            frames = int(samples[own].sum()) // SPECS[which]["hop"]
            builder.add(token_index.ShardRecord(meta_of(which, len(rows_S)), k, 1, int(rows_S[k]), 0, frames, digest, [],
                                                runs if which == "semantic" else None, np.zeros((1, 1), np.int32)))


def half(folder: str, rows_S: np.ndarray) -> None:
    """Every other shard of a semantic store, as a task leaves it but for the length of its clips."""
    meta, made = meta_of("semantic", len(rows_S)), {}
    for k in range(0, len(rows_S), 2):
        n = int(rows_S[k])
        if n not in made:
            codes = [np.array([[i % K]]) for i in range(n)]
            data = tokens.shard_bytes([f"{i}" for i in range(n)], codes, meta, 0, dedup=True)
            file = pq.ParquetFile(io.BytesIO(data))
            about = json.loads(file.schema_arrow.metadata[token_index.KEY])
            made[n] = file.read(), about, file.metadata.metadata[tokens.COUNTS]
        table, about, counts = made[n]
        table = table.replace_schema_metadata({token_index.KEY: json.dumps({**about, "shard": k}, sort_keys=True).encode()})
        Path(folder, tokens.shard_name(k)).write_bytes(table_bytes(table, tokens.ROW_GROUP, {tokens.COUNTS: counts}))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--clips", type=int, default=CLIPS)
    p.add_argument("--only", default=",".join(PARTS), help="of " + ", ".join(PARTS))
    p.add_argument("--folder", help="where the synthetic corpus lies, or comes to lie and stays; default: a temporary folder")
    p.add_argument("--measure", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.measure:
        before, began, cpu = peak_mb(), time.perf_counter(), time.process_time()
        found = PARTS[args.measure](args.folder)
        print(f"{args.measure:8} {time.perf_counter() - began:7.1f} s {time.process_time() - cpu:7.1f} CPU s  peak "
              f"{peak_mb():6.0f} MB (imports {before:.0f})  {found}", flush=True)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or f"{temporary}/corpus"
        if not os.path.exists(folder):
            began = time.perf_counter()
            build(folder, args.clips)
            print(f"{args.clips} clips, built in {time.perf_counter() - began:.0f} s, "
                  f"{sum(store.files(folder).values()) / 1e9:.1f} GB", flush=True)
        for name in args.only.split(","):
            subprocess.run([sys.executable, __file__, "--measure", name, "--folder", folder], check=True)


if __name__ == "__main__":
    main()
