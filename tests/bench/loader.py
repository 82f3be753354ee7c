"""How fast training rows come out of the token stores here, how full they are, and the memory it takes; nothing is asserted.

    python tests/bench/loader.py                          200 h and 2,000 h on a local disk
    python tests/bench/loader.py --hours 200 --store s3   the same from SeaweedFS on this machine (`weed`, as the tests use)
    python tests/bench/loader.py --hours 60000 --plan     what opening and planning 60,000 h takes, and its first batches

Shards of an hour hold random codes (12 x 1,024, the worst for a reader) and semantic runs of 1.4 frames; 8 different ones
stand under many names (hard links on a disk).  Every figure is from a process of its own; CPU s are its own, so that what
else runs on the machine shows as the difference to the seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from audiolm.store import open_fs  # noqa: E402
from tests.worlds.servers import seaweedfs  # noqa: E402

K, VOCAB, N_Q, RUN, DISTINCT = 500, 1024, 12, 1.4, 8


def peak_mb() -> float:
    """The most resident memory so far; getrusage would count the process that started this one."""
    return next(int(row.split()[1]) for row in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in row) / 1024


def build(folder: str, hours: int) -> None:
    """A manifest and both stores of `hours` shards of one hour, clips of 2 to 30 s."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from audiolm.data import tokens
    from audiolm.data.token_index import NAME, IndexBuilder

    draw, lengths = np.random.default_rng(0), []
    for name in ("manifest", "semantic_tokens", "acoustic_tokens"):
        os.makedirs(f"{folder}/{name}")
    for k in range(min(DISTINCT, hours)):
        frames = draw.integers(50, 751, 225)
        lengths.append(frames[np.cumsum(frames) <= 90_000])
        total = int(lengths[k].sum())
        z_T = (np.cumsum(draw.random(total) < 1 / RUN) * 7) % K
        codes_TQ = draw.integers(0, VOCAB, (2 * total, N_Q))
        ids = [f"corpus-{k:02d}/speaker/utterance-{i:04d}" for i in range(len(lengths[k]))]
        cuts = np.cumsum(lengths[k])[:-1]
        for which, hop, n_q, vocab, codes in (("semantic", 640, 1, K, np.split(z_T[:, None], cuts)),
                                              ("acoustic", 320, N_Q, VOCAB, np.split(codes_TQ, 2 * cuts))):
            meta = {"which": which, "spec": {"name": which, "sample_rate": 16_000, "hop": hop, "n_q": n_q, "vocab": vocab},
                    "hash": "h", "manifest": "m", "shards": hours, "device": "cpu", "dtype": "float32", "versions": {}}
            data = tokens.shard_bytes(ids, codes, meta, k, dedup=which == "semantic")
            Path(folder, f"{which}_tokens", tokens.shard_name(k)).write_bytes(data)
    for which in ("semantic", "acoustic"):
        paths = [f"{folder}/{which}_tokens/{tokens.shard_name(k)}" for k in range(hours)]
        records = [tokens.read_record(path, os.path.getsize(path)) for path in paths[:DISTINCT]]
        builder = IndexBuilder(np.array([records[k % DISTINCT].clips for k in range(hours)]), which == "semantic")
        for k, path in enumerate(paths):
            builder.add(replace(records[k % DISTINCT], shard=k))
            if k >= DISTINCT:
                os.link(paths[k % DISTINCT], path)
        Path(folder, f"{which}_tokens", NAME).write_bytes(builder.to_bytes())
    text, schema = pa.string(), [("id", pa.string()), ("origin", pa.string()), ("source", pa.string()),
                                 ("split", pa.string()), ("sample_rate", pa.int64()), ("frames", pa.int64()),
                                 ("shard", pa.int64())]
    with pq.ParquetWriter(f"{folder}/manifest/clips.parquet", pa.schema(schema)) as sink:
        for first in range(0, hours, 1000):
            shards = range(first, min(first + 1000, hours))
            ids = [f"corpus-{k % DISTINCT:02d}/speaker/utterance-{i:04d}" for k in shards
                   for i in range(len(lengths[k % DISTINCT]))]
            frames = np.concatenate([lengths[k % DISTINCT] for k in shards])
            same = [pa.array([value] * len(ids), text) for value in ("bench", "bench", "train")]
            sink.write_table(pa.table([pa.array(ids), *same, np.full(len(ids), 16_000), 640 * frames,
                                       np.repeat(shards, [len(lengths[k % DISTINCT]) for k in shards])],
                                      schema=pa.schema(schema)))


def measure(folder: str, name: str, batch: int, seconds: float, threads: int) -> dict:
    """One stage in this process: time to open, to the first batch, then the rate over `seconds`."""
    import torch

    from audiolm.config.lm import LMConfig
    from audiolm.lm.batches import TokenBatches
    from audiolm.lm.layouts import build_stages

    torch.set_num_threads(1)
    stage = build_stages(LMConfig(), N_Q, VOCAB, K)[f"lm_{name}"]
    imported, began = peak_mb(), time.perf_counter()
    paths = [f"{folder}/{n}" for n in ("manifest", "semantic_tokens", "acoustic_tokens")]
    data = TokenBatches(*paths, stage, "train", None, batch, 0)
    opened = time.perf_counter()
    plan = getattr(data, "plan", None)
    planned = time.perf_counter()
    data.batch(0, range(batch))
    ready, cpu = time.perf_counter(), time.process_time()
    tokens = slots = step = 0
    with ThreadPoolExecutor(threads) as pool:
        pending = [pool.submit(data.batch, s, range(batch)) for s in range(1, threads + 1)]
        while time.perf_counter() - ready < seconds:
            got = pending[step % threads].result()
            pending[step % threads] = pool.submit(data.batch, step + threads + 1, range(batch))
            bos_BT, doc_BT = got["ids_BT"] == stage.bos, got["doc_BT"]
            documents = int(doc_BT[:, -1].sum() + (~bos_BT[:, -1]).sum())  # each has one BOS, all others are padding
            step, tokens, slots = step + 1, tokens + int((~bos_BT).sum()) + documents, slots + bos_BT.numel()
        for p in pending:
            p.result()
    took, cpu = time.perf_counter() - ready, time.process_time() - cpu
    return {"stage": name, "open_s": opened - began, "plan_s": planned - opened, "first_s": ready - planned,
            "rows": getattr(plan, "rows", 0), "lanes": getattr(plan, "lanes", 0), "tokens_per_s": tokens / took,
            "tokens_per_cpu_s": tokens / cpu, "fill": tokens / slots, "imports_mb": imported, "peak_mb": peak_mb()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--hours", type=int, nargs="+", default=[200, 2000])
    p.add_argument("--stages", nargs="+", default=["semantic", "coarse", "fine"])
    p.add_argument("--store", choices=("local", "s3"), default="local")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--seconds", type=float, default=15.0)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--folder", help="where the synthetic stores lie, or come to lie; default: a temporary folder")
    p.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure, args.batch, args.seconds, args.threads)))
        return
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as servers:
        if args.store == "s3":
            servers.enter_context(seaweedfs(Path(temporary)))
        for hours in args.hours:
            folder = f"{args.folder or temporary}/{hours}"
            if not os.path.exists(folder):
                build(folder, hours)
            if args.store == "s3":
                fs, _ = open_fs("s3://tests")
                fs.put(folder, f"tests/{hours}", recursive=True)
                folder = f"s3://tests/{hours}"
            for name in args.stages:
                load = os.getloadavg()[0]
                done = subprocess.run([sys.executable, __file__, "--measure", folder, name, "--batch", str(args.batch),
                                       "--seconds", str(args.seconds), "--threads", str(args.threads)],
                                      capture_output=True, text=True, check=True)
                r = json.loads(done.stdout)
                print(f"{hours:6} h {name:8} {r['tokens_per_s']:12,.0f} tokens/s {r['tokens_per_cpu_s']:12,.0f} per CPU s  "
                      f"fill {r['fill']:.3f}  peak {r['peak_mb']:.0f} MB (imports {r['imports_mb']:.0f})  open "
                      f"{r['open_s']:.1f} s, plan {r['plan_s']:.1f} s, first {r['first_s']:.1f} s  {r['lanes']} lanes  "
                      f"load {load:.1f}", flush=True)


if __name__ == "__main__":
    main()
