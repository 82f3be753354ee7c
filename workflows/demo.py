"""A page to try a system: record or upload, hear how it goes on, see the spectrograms.

    python workflows/demo.py
    python workflows/demo.py speech --store /data/audiolm --max-seconds 10 --port 8000
"""

from __future__ import annotations

import argparse
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parser() -> argparse.ArgumentParser:
    from audiolm.pipeline.cli import add_run_options

    p = argparse.ArgumentParser(prog="demo.py", description="Serves a page to try a system in the browser: record or upload a "
                                "prompt, hear continuations, new voices and each stage of the ladder. Ctrl-C stops it.")
    add_run_options(p, "run")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s, this machine alone; 0.0.0.0 "
                   "lets everybody in who reaches this machine)")
    p.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    p.add_argument("--max-seconds", type=float, default=float("inf"), metavar="S", help="of a sound, prompt included (default: "
                   "what the stages were trained on, which is the most)")
    return p


def serve(args: argparse.Namespace) -> int:
    from audiolm.config.installed import require
    from audiolm.data.parallel import pick_device
    from audiolm.generate.load import load, sampling_of, system_steps
    from audiolm.pipeline.cli import quiet
    from audiolm.tracking.lookup import find_run

    if not args.max_seconds >= 1:
        raise ValueError(f"--max-seconds {args.max_seconds:g}: at least 1, half of it for a prompt")
    require("demo.py", ["gradio"], "pip install -e '.[demo]'")
    index, device = find_run(args.run, args.store, args.tracking), pick_device(args.device)
    run = index.rsplit("/", 1)[-1].removesuffix(".json")

    from audiolm.demo.page import serving
    from audiolm.eval.ladder import seconds_within

    quiet()
    lm = load(system_steps(index), device, sampling=sampling_of(index))
    with serving(lm, run, seconds_within(lm, args.max_seconds), args.host, args.port) as url:
        print(f"run {run} ({index}) on {device}: {url} (Ctrl-C stops it)", flush=True)
        threading.Event().wait()
    return 0


if __name__ == "__main__":
    from audiolm.pipeline.cli import run_command

    args = parser().parse_args()
    sys.exit(run_command(lambda: serve(args), "stopped", with_terminal=True))
