"""Audio from a trained run: continuations of prompts, sounds without a prompt, prompts in new voices.

    python workflows/generate.py --prompt clip.wav --out generated
    python workflows/generate.py --run speech --store /data/audiolm --prompt calls/ --seconds 7 --samples 4 --out out --ray
    python workflows/generate.py --run s3://bucket/audiolm/runs/speech.json --mode unconditional --seconds 5 --out out
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

MODES = ("continuation", "unconditional", "acoustic", "resynthesis")
STAGES = ("semantic", "coarse", "fine")


def parser() -> argparse.ArgumentParser:
    from audiolm.pipeline.cli import add_run_options

    p = argparse.ArgumentParser(prog="generate.py", description="Writes NAME-1.wav and NAME-1.json, ... of each prompt and "
                                "index.html to listen to them. What is done is skipped, so that the same command continues.")
    add_run_options(p)
    p.add_argument("--prompt", nargs="+", default=[], metavar="PATH", help="audio files of any rate, or folders of them; "
                   "local or any fsspec URI")
    p.add_argument("--prompt-s", type=float, metavar="S", help="of each prompt its first S seconds, 0 for all (default 3 for "
                   "continuation, else all)")
    p.add_argument("--mode", choices=MODES, default=MODES[0], help="continue the prompts (default); sounds without a "
                   "prompt; the prompts' words in new voices; the prompts through the codec alone")
    p.add_argument("--seconds", type=float, metavar="S", help="to generate beyond a prompt (default 7)")
    p.add_argument("--samples", type=int, metavar="N", help="of each prompt (default 4)")
    p.add_argument("--out", required=True, metavar="FOLDER", help="where to write; any fsspec URI")
    p.add_argument("--temperature", nargs="+", metavar="T", help="one for all stages or semantic=0.6 coarse=0.8 fine=0.6 "
                   "(as in the paper); 0 takes the most likely; default: those of the run's config")
    p.add_argument("--top-k", nargs="+", metavar="K", help="draw among the K most likely; by stage as above (default: all)")
    p.add_argument("--top-p", nargs="+", metavar="P", help="draw among the most likely that sum up to P; by stage as above")
    p.add_argument("--window", nargs="+", metavar="N", help="draw an id again, among all, that makes up more than a tenth of "
                   "its level's last N; by stage as above (repetition-aware sampling; default: off)")
    p.add_argument("--guidance", type=float, metavar="G", help="of the acoustic stages: above 1 moves what they draw away from "
                   "what they would draw without semantic tokens; at twice the work (default 1, off)")
    p.add_argument("--seed", type=int, default=0, help="a sample depends on it, its prompt's PATH and its number (default 0)")
    p.add_argument("--whole", action="store_true", help="never end before the seconds asked for")
    p.add_argument("--long", action="store_true", help="beyond what the stages were trained on, in constant memory; one "
                   "sample at a time, for runs with lm.lengths=true")
    p.add_argument("--batch", type=int, default=8, metavar="N", help="samples generated together (default %(default)s)")
    p.add_argument("--fast", action="store_true", help="on a CPU one sample at a time takes less time, a fifth at the "
                   "quickstart's size; a sample may then differ with the number that are generated together")
    p.add_argument("--ray", action="store_true", help="batches as Ray tasks, on this machine or the cluster of RAY_ADDRESS "
                   "(which alone is enough)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")
    p.add_argument("--force", action="store_true", help="make what is there anew")
    return p


def by_stage(option: str, texts: list[str], kind: Callable) -> dict[str, Any]:
    """Values by stage of `semantic=0.6 fine=0.5`, or of one number for all stages. Raises ValueError."""
    try:
        if len(texts) == 1 and "=" not in texts[0]:
            return dict.fromkeys(STAGES, kind(texts[0]))
        given = {stage: kind(value) for stage, value in (text.split("=") for text in texts)}
        if given.keys() <= set(STAGES):
            return given
    except ValueError:
        pass
    raise ValueError(f"{option} {' '.join(texts)}: give one number, or semantic=, coarse= and fine= with one each")


def sampling_params(args: argparse.Namespace, index: str) -> tuple:
    """(stage, SamplingParams) of each stage: those of the run's config, with what the options change."""
    from audiolm.generate.load import sampling_of

    params = sampling_of(index)
    for name, kind in (("temperature", float), ("top_k", int), ("top_p", float), ("window", int)):
        if texts := getattr(args, name):
            for stage, value in by_stage(f"--{name.replace('_', '-')}", texts, kind).items():
                params[stage] = replace(params[stage], **{name: value})
    if args.guidance is not None:
        params |= {stage: replace(own, guidance=args.guidance) for stage, own in params.items() if stage != "semantic"}
    return tuple(params.items())


def check(args: argparse.Namespace) -> None:
    """Fills in what depends on the mode. Raises ValueError for options that do not go together."""
    from audiolm.generate.prompts import MIN_PROMPT_S, PROMPT_S

    mode, prompted, open_ended = args.mode, args.mode != "unconditional", args.mode in ("continuation", "unconditional")
    if args.samples is None:
        args.samples = 1 if mode == "resynthesis" else 4
    if prompted and args.prompt_s is None:
        args.prompt_s = PROMPT_S if open_ended else 0.0
    for wrong, text in (
            (prompted and not args.prompt, f"--mode {mode} needs --prompt PATH"),
            (not prompted and args.prompt, "--mode unconditional takes no --prompt"),
            (not open_ended and (args.seconds is not None or args.whole),
             f"--mode {mode} lasts as long as its prompt: leave --seconds and --whole out"),
            (mode == "resynthesis" and args.samples != 1,
             f"--samples {args.samples}: the codec gives one resynthesis of a prompt"),
            (args.long and not open_ended, "--long goes with --mode continuation or unconditional"),
            (args.seconds is not None and not 0 < args.seconds < float("inf"), f"--seconds {args.seconds}: above 0"),
            (args.samples < 1 or args.batch < 1, f"--samples {args.samples} and --batch {args.batch}: at least one"),
            (prompted and args.prompt_s != 0 and not args.prompt_s >= MIN_PROMPT_S,
             f"--prompt-s {args.prompt_s}: at least {MIN_PROMPT_S:g}, or 0 for the whole file")):
        if wrong:
            raise ValueError(text)
    if open_ended and args.seconds is None:
        args.seconds = 7.0  # 2209.03143 IV: 3 s of prompt and 7 s more


def generate(args: argparse.Namespace) -> int:
    """Makes what is missing in --out, and its page; returns how many prompts failed."""
    from audiolm import store
    from audiolm.data.parallel import pick_device
    from audiolm.generate import jobs
    from audiolm.generate.load import system_steps
    from audiolm.pipeline.progress import ProgressBoard
    from audiolm.pipeline.ray_cluster import in_ray_job, wants_ray
    from audiolm.render import sounds_page
    from audiolm.tracking.lookup import find_run

    # options and the run, before anything is loaded
    check(args)
    on_ray = wants_ray(args.ray)
    if in_ray_job() and store.is_local(args.out) and not os.path.isabs(args.out.removeprefix("file://")):
        raise ValueError(f"--out {args.out}: relative, and a Ray job's working folder changes with each submission; give an "
                         "absolute path that every node sees, or s3://...")
    if not on_ray:
        pick_device(args.device)
    index, out = find_run(args.run, args.store, args.tracking), store.absolute(args.out)
    run, models = index.rsplit("/", 1)[-1].removesuffix(".json"), tuple(system_steps(index).items())
    job = jobs.GenerationJob(run, index, models, args.mode, sampling_params(args, index), args.seed, args.seconds,
                             args.prompt_s, args.whole, args.long, args.fast)
    # samples that are asked for, and those that are missing
    samples, errors = [jobs.SampleJob(args.mode, n) for n in range(1, args.samples + 1)], []
    if args.prompt:
        samples, errors = jobs.check_prompts(jobs.name_prompts(args.prompt), args.samples)
    pending, board = jobs.pending_samples(job, samples, out, args.force), ProgressBoard()
    board.say(f"run {job.run} ({index}): {len(pending)} of {len(samples)} samples to make, to {args.out}")
    print_errors(errors)
    if pending:
        failed = run_batches(args, job, pending, out, on_ray, board)
        print_errors(failed)
        errors += failed
    # the page shows all that is in the folder, the summary what this command asked for
    records = jobs.sample_records(out)
    if own := [records[s.file] for s in samples if s.file in records]:
        store.put(store.join(out, "index.html"), sounds_page.build(records).encode())
        print(f"{sounds_page.summary(own)}\npage: {store.join(args.out, 'index.html')}")
    return len(errors)


def run_batches(args: argparse.Namespace, job: Any, pending: list, out: str, on_ray: bool, board: Any) -> list[str]:
    """Makes the samples in batches, inline or as Ray tasks; returns an error line for each prompt that failed."""
    from audiolm.config.run import ClusterConfig
    from audiolm.data.parallel import Workers, cluster_device, parallel_map
    from audiolm.generate.jobs import run_task
    from audiolm.pipeline.cli import quiet
    from audiolm.pipeline.ray_cluster import start_ray

    began, cluster, size = time.monotonic(), ClusterConfig(device=args.device), 1 if args.long else args.batch
    batches = [pending[i:i + size] for i in range(0, len(pending), size)]
    quiet()
    if on_ray:
        start_ray(cluster, out, board.say)
    device = cluster_device(cluster, inline=not on_ray)
    board.start("generate")
    workers = Workers(not on_ray, "generate", partial(board.update, "generate"))
    lines = parallel_map(run_task, [(job, batch, out, device) for batch in batches], out=workers, cluster=cluster,
                         unit="prompts", sizes=[len(batch) / args.samples for batch in batches], gpu=device == "cuda")
    failed = list(dict.fromkeys(line for batch in lines for line in batch))  # a prompt may fail in several batches
    board.end("generate", "DONE", time.monotonic() - began, f"{len(failed)} prompts failed" if failed else "")
    return failed


def print_errors(lines: list[str]) -> None:
    for line in lines:
        print(f"error: {line}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 some prompts failed, 2 wrong usage, 130 stopped."""
    from audiolm.pipeline.cli import run_command

    args = parser().parse_args(argv)
    return run_command(lambda: 1 if generate(args) else 0,
                       "stopped; the same command continues with the samples that are left")


if __name__ == "__main__":
    sys.exit(main())
