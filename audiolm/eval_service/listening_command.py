"""`evaluate.py listening`: prepares a listening test of one run or two, and scores raters' answers."""

from __future__ import annotations

import argparse
import json

from audiolm import store


def add_options(p: argparse.ArgumentParser) -> None:
    from audiolm.dag.run_index import OUTPUTS

    p.add_argument("runs", nargs="*", metavar="RUN", help="a run's name, index (STORE/runs/NAME.json) or MLflow id, or a "
                   "published system's name: one against recordings, or two against each other")
    p.add_argument("--out", metavar="FOLDER", help="where page/ and key.json go; give raters page/ alone")
    p.add_argument("--prompts", nargs="+", metavar="PATH", help="recordings that no model was trained on, or folders of them; "
                   "default: the first run's test and dev clips, speakers in turn")
    p.add_argument("--pairs", type=int, default=20, metavar="N", help="of sounds (default %(default)s)")
    p.add_argument("--prompt-s", type=float, default=3.0, metavar="S", help="of each recording that both sounds begin with")
    p.add_argument("--seconds", type=float, default=7.0, metavar="S", help="beyond the prompt, at most (default %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of what is drawn, and of sides and order")
    p.add_argument("--score", nargs="+", metavar="JSON", help="prints what these answers say, with --key; makes nothing")
    p.add_argument("--key", metavar="JSON", help="the test's key.json")
    p.add_argument("--store", default=OUTPUTS, metavar="URI", help="where a run's name is looked up (default %(default)s)")
    p.add_argument("--tracking", metavar="URI", help="the MLflow server of a run id")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")


def listening(args: argparse.Namespace) -> int:
    """Raises ValueError for options that do not go together."""
    if args.score:
        if not args.key:
            raise ValueError("--score needs --key: the key.json that was made with the raters' page")
        print(_table(args))
        return 0
    if len(args.runs) not in (1, 2) or not args.out:
        raise ValueError(f"one RUN (against recordings) or two (against each other) and --out, got {len(args.runs)} and "
                         f"{args.out}")
    from audiolm.data.parallel import pick_device
    from audiolm.eval.listening import prepare
    from audiolm.generate.load import load, sampling_of, system_steps
    from audiolm.tracking.lookup import find_run

    indexes = [find_run(run, args.store, args.tracking) for run in args.runs]
    if len(set(indexes)) != len(indexes):
        raise ValueError(f"both runs are {indexes[0]}: name two")
    device = pick_device(args.device)
    systems = {run: load(system_steps(index), device, sampling=sampling_of(index))
               for run, index in zip(args.runs, indexes, strict=True)}
    page = prepare(systems, _recordings(args, indexes[0]), args.out, args.prompt_s, args.seconds, args.seed)
    print(f"page for raters: {page}\nkey, not for raters: {store.join(args.out, 'key.json')}\n"
          f"then: evaluate.py listening --score answers-*.json --key {store.join(args.out, 'key.json')}")
    return 0


def _recordings(args: argparse.Namespace, index: str) -> list:
    """wav_T of the recordings to continue."""
    from audiolm.data.audio import SAMPLE_RATE_HZ, start_of
    from audiolm.data.containers.layout import ENDINGS
    from audiolm.data.sources import roots
    from audiolm.eval import test_sets
    from audiolm.tokenizers.codec_files import find_files
    from audiolm.tracking.target import config_of

    end_s = args.prompt_s + args.seconds
    if args.prompts:
        return [start_of(path, round(end_s * SAMPLE_RATE_HZ)) for _, path in find_files(args.prompts, ENDINGS)[:args.pairs]]
    from audiolm.dag.run_index import steps_of

    steps = steps_of(index)
    if "manifest" not in steps:
        raise ValueError(f"{index} names no manifest to take test clips from: give recordings with --prompts")
    clips = test_sets.to_continue(steps["manifest"], args.pairs, args.seed, args.prompt_s + 1.0, most_s=end_s)
    return [wav_T for _, wav_T in test_sets.read(clips, roots(config_of(index).corpus), end_s)]


def _table(args: argparse.Namespace) -> str:
    """What the answers say, as text."""
    from audiolm.eval.listening import score

    key = store.get_json(args.key)
    if key is None:
        raise ValueError(f"--key: there is no {args.key}")
    found = score(key, [json.loads(store.get(path)) for path in args.score])
    lines = [f"{found['judgements']} judgements of {found['raters']} raters, chance {found['chance']:.0%}"]
    said = "took the recording for the recording" if found["kind"] == "recording" else "preferred"
    for name, (share, low, high) in found["chosen"].items():
        if found["kind"] == "preference" or name == "recording":
            lines.append(f"{said}{'' if name == 'recording' else f' {name}'}: {share:.1%} [{low:.1%}, {high:.1%}]")
    return "\n".join([*lines, f"p {found['p']:.3g} that raters guessed (two-sided)"])
