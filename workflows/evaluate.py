"""The paper's metrics: of a run or a checkpoint, of tokens, of features, and of audio files.

    python workflows/evaluate.py speech --store /data/audiolm --suites stages,ladder
    python workflows/evaluate.py --compare models:/speech-lm_coarse/3 models:/speech-lm_coarse@best --out compared
    python workflows/evaluate.py tokens --run outputs/runs/speech.json --items dev-clean.item --audio LibriSpeech/dev-clean
    python workflows/evaluate.py abx --items dev-clean.item --audio LibriSpeech/dev-clean --features mfcc
    python workflows/evaluate.py detect calls/ --run speech --json scores.json
    python workflows/evaluate.py export speech --versa for-versa
    python workflows/evaluate.py watch --store s3://bucket --tracking http://mlflow:5000 --job-server http://ray-head:8265
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from audiolm import store  # noqa: E402
from audiolm.dag.run_index import OUTPUTS, steps_of  # noqa: E402
from audiolm.eval_service import abx_command, export_command, listening_command, salmon_command  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a job or some files failed, 2 wrong usage, 130 stopped."""
    args = parse(sys.argv[1:] if argv is None else argv)
    from audiolm.pipeline.cli import run_command

    is_job = bool(getattr(args, "answer", None))  # its log wants the whole traceback
    return run_command(lambda: args.call(args) or 0, "stopped; the same command continues", trace=is_job)


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of a subcommand, with its function as `call`. Takes `run` where the first argument is no subcommand."""
    p = argparse.ArgumentParser(
        prog="evaluate.py", description="The paper's metrics of a trained system, its tokens or any audio.",
        epilog="A first argument that is no subcommand is a run: `evaluate.py speech` means `evaluate.py run speech`. "
               "`evaluate.py COMMAND --help` lists a subcommand's options.")
    commands = p.add_subparsers(metavar="COMMAND", required=True)
    for name, (call, add_options, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        add_options(command)
        command.set_defaults(call=call)
    if argv[:1] in (["-h"], ["--help"]):
        p.parse_args(argv)  # prints the help and exits
    name, rest = (argv[0], argv[1:]) if argv and argv[0] in COMMANDS else ("run", argv)
    return commands.choices[name].parse_intermixed_args(rest)  # overrides may stand between options


def add_place_options(p: argparse.ArgumentParser) -> None:
    """--store, --tracking and --device of `run` and `watch`."""
    p.add_argument("--store", default=OUTPUTS, metavar="URI", help="where a run's name is looked up, and what MLflow names "
                   "must lie in (default %(default)s)")
    p.add_argument("--tracking", metavar="URI", help="MLflow's server; default: MLFLOW_TRACKING_URI, else the store's database")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")


def add_suite_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("rest", nargs="*", metavar="MODEL_URI_OR_RUN a.b=c", help="models:/NAME/VERSION, models:/NAME@best, or a "
                   "run's name, index (STORE/runs/NAME.json) or MLflow id; and overrides of its config (evaluate.clips=4)")
    p.add_argument("--suites", type=abx_command.names, default=[], metavar="A,B",
                   help="these alone (default: all but the optional ones)")
    p.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two of them on one page, the same prompts side by side")
    p.add_argument("--out", metavar="FOLDER", help="where the report goes; default: STORE/evaluations/NAME")
    p.add_argument("--ray", action="store_true", help="parts as Ray tasks, on this machine or the cluster of RAY_ADDRESS")
    add_place_options(p)
    p.add_argument("--answer", type=int, help=argparse.SUPPRESS)  # of a job: the request's number
    p.add_argument("--claim", help=argparse.SUPPRESS)  # of a process: the file that makes it the one of its id


def run(args: argparse.Namespace) -> int:
    """Evaluates one or two targets, or answers a request where `watch` started this process as its job."""
    if args.answer:
        return answer(args)
    evaluate(args)
    return 0


def evaluate(args: argparse.Namespace) -> Any:
    """Evaluates one or two targets; returns the (first) SuiteReport."""
    from audiolm.config.load import apply_overrides
    from audiolm.data.parallel import Workers
    from audiolm.eval.suites.run import check_names
    from audiolm.pipeline.cli import quiet
    from audiolm.pipeline.progress import ProgressBoard
    from audiolm.pipeline.ray_cluster import start_ray, wants_ray
    from audiolm.report.results_page import run_and_report
    from audiolm.tracking.target import one_kind, resolve

    texts = list(args.compare or ()) + [a for a in args.rest if "=" not in a]
    if len(texts) != (2 if args.compare else 1):
        raise ValueError(f"one MODEL_URI_OR_RUN (or --compare A B, or watch), got {', '.join(texts) or 'none'}")
    targets = [resolve(text, args.store, args.tracking) for text in texts]
    suites = check_names(args.suites, one_kind(targets))
    overrides = [a for a in args.rest if "=" in a] + ([f"cluster.device={args.device}"] if args.device != "auto" else [])
    config = apply_overrides(targets[0].config, overrides)
    home = store.join(config.store, "evaluations")
    slug = "-against-".join(t.slug for t in targets) + (f"/{args.answer}" if args.answer else "")
    folder = store.absolute(args.out) if args.out else store.join(home, slug)

    board, began, on_ray = ProgressBoard(), time.monotonic(), wants_ray(args.ray)
    for t in (t for t in targets if t.left_out):
        board.say(f"{t.title}: left out {', '.join(t.left_out)}: {next(iter(t.left_out.values()))}")
    quiet()
    if on_ray:
        start_ray(config.cluster, config.store, board.say)
    board.start("evaluate")
    out = Workers(not on_ray, "evaluate", partial(board.update, "evaluate"))
    settings = {"config": config, "out": out, "cache": store.join(home, "cache")}
    if args.compare:
        report = compare(targets, suites, folder, settings)
    else:
        report = run_and_report(targets[0].steps, suites, folder, title=targets[0].title, **settings)
    board.end("evaluate", "DONE", time.monotonic() - began, f"{len(report.rows)} rows")
    for line in dict.fromkeys(f"not measured: {r.table}, {r.item}: {r.note}" for r in report.rows if r.value is None):
        board.say(line)
    print(f"report: {store.join(folder, 'report.html')}")
    return report


def compare(targets: list, suites: list[str], folder: str, settings: dict[str, Any]) -> Any:
    """Two targets on one page, both on the first one's clips; returns the first SuiteReport."""
    from audiolm.eval.suites.run import run_suites
    from audiolm.report import results_page

    manifest = targets[0].steps.get("manifest")
    reports = [run_suites(t.steps, suites, store.join(folder, str(i)), manifest=manifest, **settings)
               for i, t in enumerate(targets, 1)]
    title = "; ".join(f"{label}: {t.title}" for label, t in zip("AB", targets, strict=True))
    columns = [(label, r.rows, r.sounds) for label, r in zip("AB", reports, strict=True)]
    store.put(store.join(folder, "report.html"), results_page.build(title, columns).encode())
    return reports[0]


def answer(args: argparse.Namespace) -> int:
    """A job's part (audiolm/eval_service/evaluation_job.py)."""
    from audiolm.eval_service import evaluation_job
    from audiolm.eval_service.launcher import claim
    from audiolm.tracking.lookup import connect

    if args.claim and not claim(args.claim):
        return 0  # another process has this job

    def stopped(*_):
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, stopped)
    client, _ = connect(args.tracking)
    _, name, version = args.rest[0].removeprefix("models:").split("/")
    return 0 if evaluation_job.answer(client, name, version, args.answer, lambda: evaluate(args)) else 1


def add_token_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--run", metavar="FILE", help="a run's index (OUTPUTS/runs/NAME.json): takes its builds for those not named")
    p.add_argument("--codec", metavar="CODEC", help="a published codec's name, a codec build, a run's index or the folder of "
                   "an imported codec")
    p.add_argument("--tokenizer", metavar="BUILD", help="a kmeans build")
    p.add_argument("--residual", metavar="BUILD", help="a residual build of that tokenizer, for more levels")
    p.add_argument("--vocoder", metavar="BUILD", help="a semantic_vocoder build, for the sound of semantic tokens")
    p.add_argument("--clips", nargs="+", metavar="PATH", help="audio files or folders to decode; default: the items' files")
    p.add_argument("--number", type=int, default=20, metavar="N", help="of clips, spread evenly over them all (default 20)")
    p.add_argument("--seconds", type=float, default=8.0, metavar="S", help="of each clip, from its start (default 8)")
    abx_command.add_item_options(p)


def tokens(args: argparse.Namespace) -> None:
    """Prints Table I of the builds that the options or the run name."""
    from audiolm.data.containers.layout import ENDINGS
    from audiolm.data.parallel import pick_device
    from audiolm.eval.metrics import audio_quality
    from audiolm.eval.suites import tokens as suite
    from audiolm.eval.test_sets import items_and_audio, wav_of
    from audiolm.tokenizers.codec_files import find_files

    began = time.monotonic()
    builds = suite.find_builds({option: getattr(args, option) for option in suite.BUILDS}, args.run)
    items, files = items_and_audio(args.items, args.audio, args.speakers, "--audio")
    paths = [path for _, path in find_files(args.clips, ENDINGS)] if args.clips else list(files.values())

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    sides = suite.load_sides(builds, pick_device(args.device))
    table = suite.table1(sides, items, lambda file: wav_of(files[file]), suite.excerpts(paths, args.number, args.seconds),
                         audio_quality.scorers(), args.seed, say)
    print(suite.format_table(table))
    if args.json:
        table |= {"builds": builds, "wall_s": round(time.monotonic() - began, 1)}
        store.put(args.json, json.dumps(table, indent=1).encode())


def add_detect_options(p: argparse.ArgumentParser) -> None:
    from audiolm.pipeline.cli import add_run_options

    p.add_argument("inputs", nargs="+", metavar="PATH", help="audio files of any rate, or folders of them; local or any fsspec "
                   "URI")
    add_run_options(p)
    p.add_argument("--detector", metavar="FOLDER", help="a trained detector's own folder, instead of a run's")
    p.add_argument("--json", metavar="FILE", help="write the probabilities there too")


def detect(args: argparse.Namespace) -> int:
    """Prints each file's mean probability that its seconds were generated, and that of every second."""
    from audiolm.data.audio_check import error_line
    from audiolm.data.containers.layout import ENDINGS
    from audiolm.eval.suites.detector import of_run, score_file
    from audiolm.tokenizers.codec_files import find_files
    from audiolm.tracking.lookup import find_run

    scores, failed = {}, False
    detector = args.detector or of_run(steps_of(find_run(args.run, args.store, args.tracking)))
    for _, file in find_files(args.inputs, ENDINGS):
        try:
            p_S = score_file(detector, file)
        except (ValueError, FileNotFoundError) as e:  # reported; the other files go on
            failed = True
            print(f"error: {error_line(file, e)}", file=sys.stderr)
            continue
        scores[file] = [round(float(p), 4) for p in p_S]
        print(f"{p_S.mean():6.1%}  {file}  {' '.join(f'{p:.2f}' for p in p_S)}", flush=True)
    if args.json:
        store.put(args.json, json.dumps(scores, indent=1).encode())
    return int(failed)


def add_watch_options(p: argparse.ArgumentParser) -> None:
    add_place_options(p)
    p.add_argument("--job-server", metavar="URL", help="Ray's, http://HOST:8265 (default: RAY_API_SERVER_ADDRESS, else here)")
    p.add_argument("--inline", action="store_true", help="evaluate in processes of this machine, without Ray")
    p.add_argument("--work", default=f"{OUTPUTS}/.evaluate", metavar="FOLDER", help="--inline: for their claims and logs, the "
                   "same after a restart (default %(default)s)")
    p.add_argument("--every", type=float, default=5.0, metavar="S", help="seconds between two looks (default %(default)s)")
    p.add_argument("--parallel", type=int, default=1, metavar="N", help="evaluations at a time; the others wait as requested")
    p.add_argument("--webhook", type=int, metavar="PORT", help="listen for MLflow's webhook too, to answer at once")
    p.add_argument("--webhook-host", default="127.0.0.1", metavar="HOST", help="where to listen (default %(default)s)")
    p.add_argument("--secret-env", default="AUDIOLM_WEBHOOK_SECRET", metavar="NAME", help="the environment variable with the "
                   "webhook's secret (default %(default)s)")


def watch(args: argparse.Namespace) -> None:
    """Answers requests until it is stopped."""
    from audiolm.eval.suites.run import check_names
    from audiolm.eval_service import webhook
    from audiolm.eval_service.launcher import open_launcher
    from audiolm.eval_service.watcher import Watcher
    from audiolm.pipeline.cli import quiet
    from audiolm.store import hide_credentials
    from audiolm.tracking.lookup import connect, default_tracking

    if args.every <= 0 or args.parallel < 1:
        raise ValueError(f"--every {args.every} and --parallel {args.parallel}: above 0")
    tracking = default_tracking(args.store, args.tracking)
    if tracking != hide_credentials(tracking) or args.store != hide_credentials(args.store):
        raise ValueError("--tracking or --store holds credentials, and a job's command line is shown by Ray: put them into "
                         "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or what the store reads, here and on Ray's "
                         "nodes")
    quiet()
    client, tracking = connect(tracking)
    launcher, wake = open_launcher(args.inline, args.job_server, args.work), threading.Event()

    def say(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    if args.webhook is not None:
        webhook.serve(args.webhook_host, args.webhook, os.environ.get(args.secret_env, ""), wake)
        say(f"webhook at http://{args.webhook_host}:{args.webhook}")
    say(f"watching {tracking} for evaluate=requested; jobs {'here' if args.inline else 'on Ray'}")
    place = store.absolute(args.store)
    extra = ["--tracking", tracking, "--store", place, "--device", args.device]
    Watcher(client, place, launcher, extra, args.parallel, say, check_names).watch(args.every, wake)


# Subcommand: its function, its options, its line in the help.
COMMANDS: dict[str, tuple[Callable, Callable, str]] = {
    "run": (run, add_suite_options, "suites of a run or checkpoint: writes report.html and rows.json, measures nothing twice"),
    "tokens": (tokens, add_token_options, "Table I: ABX error and sound quality of acoustic and semantic tokens, by bit rate"),
    "abx": (abx_command.abx, abx_command.add_options, "ABX error of features in percent, by libri-light's protocol"),
    "detect": (detect, add_detect_options, "the probability that each second of a file was generated by the models of one run"),
    "listening": (listening_command.listening, listening_command.add_options, "a listening test: page and score"),
    "salmon": (salmon_command.salmon, salmon_command.add_options, "SALMon's accuracy; or makes pairs of recordings for it"),
    "export": (export_command.export, export_command.add_options, "what suites score, for VERSA's and ZeroSpeech's scorers"),
    "watch": (watch, add_watch_options, "answers the tag evaluate=requested of model versions in the MLflow UI, for ever"),
}


if __name__ == "__main__":
    sys.exit(main())
