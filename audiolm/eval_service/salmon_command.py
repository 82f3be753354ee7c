"""`evaluate.py salmon`: accuracy of a system on pairs in SALMon's layout; or makes a small set of such pairs of recordings."""

from __future__ import annotations

import argparse
import json
import sys
import time

from audiolm import store


def add_options(p: argparse.ArgumentParser) -> None:
    from audiolm.pipeline.cli import add_run_options

    p.add_argument("set", metavar="FOLDER", help="SALMon's wavs, or a set that --make wrote: PART/sample_I_0.wav (right) and "
                   "PART/sample_I_1.wav (wrong)")
    add_run_options(p)
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")
    p.add_argument("--json", metavar="FILE", help="write the rows there too")
    p.add_argument("--make", metavar="SPEECH", help="scores nothing; writes a set into FOLDER, of recordings in a folder with "
                   "one for each speaker")
    p.add_argument("--speakers", type=lambda text: [name.strip() for name in text.split(",")], metavar="A,B",
                   help="of --make: these speakers alone")
    p.add_argument("--genders", metavar="FILE", help="of --make: a table ID | SEX, as LibriSpeech's SPEAKERS.TXT, for pairs of "
                   "different genders too")
    p.add_argument("--pairs", type=int, default=60, metavar="N", help="of --make: pairs a task (default %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of what --make draws, and of the intervals (default 0)")


def salmon(args: argparse.Namespace) -> None:
    """Raises ValueError as its two parts do."""
    if args.make:
        from audiolm.eval.salmon_pairs import gender_table, make_set

        made = make_set(args.make, args.set, args.pairs, args.seed, args.speakers, args.genders and gender_table(args.genders))
        print(f"{args.set}: " + ", ".join(f"{number} pairs of {task}" for task, number in made.items()))
        return
    from audiolm.dag.run_index import steps_of
    from audiolm.data.parallel import pick_device
    from audiolm.eval.metrics.stats import text_table
    from audiolm.eval.suites.salmon import measure_salmon
    from audiolm.tracking.lookup import find_run

    began = time.monotonic()

    def progress(done: int, total: int, unit: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {done} of {total} {unit}", file=sys.stderr, flush=True)

    steps, name = steps_of(find_run(args.run, args.store, args.tracking)), args.set.rstrip("/").rsplit("/", 1)[-1]
    rows = measure_salmon({name: args.set}, steps, args.seed, pick_device(args.device), progress)
    lines = [("", "", "accuracy", "95 %", "pairs", "")]
    for r in rows:
        interval = "" if r.low is None else f"[{r.low:.1f}, {r.high:.1f}]"
        lines.append((r.metric, r.item, "–" if r.value is None else f"{r.value:.1f}", interval, str(r.n or ""), r.note))
    print(text_table(lines))
    if args.json:
        store.put(args.json, json.dumps([r.to_json() for r in rows], indent=1).encode())
