"""The paper's figures for a trained run or a checkpoint, by hand or when somebody asks for them in the MLflow UI.

    python workflows/evaluate.py speech --store /data/audiolm --suites stages,ladder
    python workflows/evaluate.py models:/speech-lm_semantic@best --tracking http://mlflow:5000
    python workflows/evaluate.py --compare models:/speech-lm_coarse/3 models:/speech-lm_coarse@best --out compared
    python workflows/evaluate.py --watch --tracking http://mlflow:5000 --job-server http://ray-head:8265
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from audiolm import store  # noqa: E402
from audiolm.dag.run_index import OUTPUTS  # noqa: E402


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="evaluate.py", description="Leaves report.html (tables, plots, sound) and rows.json. What "
                                "was measured of the same models and data is not measured again.")
    p.add_argument("rest", nargs="*", metavar="MODEL_URI_OR_RUN a.b=c", help="models:/NAME/VERSION, models:/NAME@best, or a "
                   "run's name, index (STORE/runs/NAME.json) or MLflow id; and overrides of its config (evaluate.clips=4)")
    p.add_argument("--suites", metavar="A,B", help="these suites alone (default: all but dnsmos, text, notes)")
    p.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two of them on one page, the same prompts side by side")
    p.add_argument("--out", metavar="FOLDER", help="where the report goes; default: STORE/evaluations/NAME")
    p.add_argument("--store", default=OUTPUTS, metavar="URI", help="where a run's name is looked up (default %(default)s)")
    p.add_argument("--tracking", metavar="URI", help="MLflow's server; default: MLFLOW_TRACKING_URI, else the store's database")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")
    p.add_argument("--ray", action="store_true", help="parts as Ray tasks, on this machine or the cluster of RAY_ADDRESS")
    w = p.add_argument_group("asking in the UI")
    w.add_argument("--watch", action="store_true", help="answer the tag evaluate=requested of model versions, for ever")
    w.add_argument("--job-server", metavar="URL", help="Ray's, http://HOST:8265 (default: RAY_API_SERVER_ADDRESS, else here)")
    w.add_argument("--inline", action="store_true", help="evaluate in processes of this machine, without Ray")
    w.add_argument("--work", default=f"{OUTPUTS}/.evaluate", metavar="FOLDER", help="--inline: for their claims and logs, the "
                   "same after a restart (default %(default)s)")
    w.add_argument("--every", type=float, default=5.0, metavar="S", help="seconds between two looks (default %(default)s)")
    w.add_argument("--parallel", type=int, default=1, metavar="N", help="evaluations at a time; the others wait as requested")
    w.add_argument("--webhook", type=int, metavar="PORT", help="listen for MLflow's webhook too, to answer at once")
    w.add_argument("--webhook-host", default="127.0.0.1", metavar="HOST", help="where to listen (default %(default)s)")
    w.add_argument("--secret-env", default="AUDIOLM_WEBHOOK_SECRET", metavar="NAME", help="the environment variable with the "
                   "webhook's secret (default %(default)s)")
    p.add_argument("--answer", type=int, help=argparse.SUPPRESS)  # of a job: the request's number
    p.add_argument("--claim", help=argparse.SUPPRESS)  # of a process: the file that makes it the one of its id
    return p


def names(args: argparse.Namespace) -> list[str]:
    return [n.strip() for n in (args.suites or "").split(",") if n.strip()]


def evaluate(args: argparse.Namespace) -> Any:
    """Evaluates one or two targets; returns the (first) Report."""
    from audiolm.config.load import apply_overrides
    from audiolm.eval.suites.run import check_names, run_suites
    from audiolm.pipeline.cli import quiet
    from audiolm.pipeline.progress import ProgressBoard
    from audiolm.pipeline.ray_cluster import start_ray, wants_ray
    from audiolm.report import results_page
    from audiolm.report.results_page import run_and_report
    from audiolm.tracking.target import resolve

    texts = list(args.compare or ()) + [a for a in args.rest if "=" not in a]
    if len(texts) != (2 if args.compare else 1):
        raise ValueError(f"one MODEL_URI_OR_RUN (or --compare A B, or --watch), got {', '.join(texts) or 'none'}")
    check_names(names(args))
    targets = [resolve(text, args.store, args.tracking) for text in texts]
    overrides = [a for a in args.rest if "=" in a] + ([f"cluster.device={args.device}"] if args.device != "auto" else [])
    config = apply_overrides(targets[0].config, overrides)
    on_ray = wants_ray(args.ray)
    home = store.join(config.store, "evaluations")
    slug = "-against-".join(t.slug for t in targets) + (f"/{args.answer}" if args.answer else "")
    folder = store.absolute(args.out) if args.out else store.join(home, slug)
    board, began = ProgressBoard(), time.monotonic()
    quiet()
    if on_ray:
        start_ray(config.cluster, config.store, board.say)
    board.start("evaluate")
    out = SimpleNamespace(inline=not on_ray, step=SimpleNamespace(name="evaluate"),
                          progress=lambda done, total, unit: board.update("evaluate", done, total, unit))
    how = {"config": config, "out": out, "cache": store.join(home, "cache")}
    if args.compare:
        shown = [run_suites(t.steps, names(args), store.join(folder, str(i)), manifest=targets[0].steps.get("manifest"), **how)
                 for i, t in enumerate(targets, 1)]
        columns = [(label, r.rows, r.sounds) for label, r in zip("AB", shown, strict=True)]
        title = "; ".join(f"{label}: {t.title}" for label, t in zip("AB", targets, strict=True))
        store.put(store.join(folder, "report.html"), results_page.build(title, columns).encode())
        report = shown[0]
    else:
        report = run_and_report(targets[0].steps, names(args), folder, title=targets[0].title, **how)
    board.end("evaluate", "DONE", time.monotonic() - began, f"{len(report.rows)} rows")
    print(f"report: {store.join(folder, 'report.html')}")
    return report


def answer(args: argparse.Namespace) -> int:
    """A job's part (audiolm/eval_service/worker.py)."""
    from audiolm.eval_service.launcher import claim
    from audiolm.eval_service.worker import answer as answered
    from audiolm.tracking.lookup import connect

    if args.claim and not claim(args.claim):
        return 0  # another process has this job

    def stopped(*_):
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, stopped)
    client, _ = connect(args.tracking)
    _, name, version = args.rest[0].removeprefix("models:").split("/")
    return 0 if answered(client, name, version, args.answer, lambda: evaluate(args)) else 1


def watch(args: argparse.Namespace) -> None:
    from audiolm.eval.suites.run import check_names
    from audiolm.eval_service import webhook
    from audiolm.eval_service.launcher import open_launcher
    from audiolm.eval_service.watcher import Watcher
    from audiolm.pipeline.cli import quiet
    from audiolm.store import hide_credentials
    from audiolm.tracking.lookup import connect, default_tracking

    if args.rest or args.compare:
        raise ValueError("--watch takes neither MODEL_URI_OR_RUN nor --compare")
    if args.every <= 0 or args.parallel < 1:
        raise ValueError(f"--every {args.every} and --parallel {args.parallel}: above 0")
    tracking = default_tracking(args.store, args.tracking)
    if tracking != hide_credentials(tracking):
        raise ValueError("--tracking holds credentials, and a job's command line is shown by Ray: put them into "
                         "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, here and on Ray's nodes")
    quiet()
    client, tracking = connect(tracking)
    launcher, wake = open_launcher(args.inline, args.job_server, args.work), threading.Event()
    extra = ["--tracking", tracking, "--device", args.device]

    def say(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {hide_credentials(text)}", flush=True)

    if args.webhook is not None:
        webhook.serve(args.webhook_host, args.webhook, os.environ.get(args.secret_env, ""), wake)
        say(f"webhook at http://{args.webhook_host}:{args.webhook}")
    say(f"watching {tracking} for evaluate=requested; jobs {'here' if args.inline else 'on Ray'}")
    Watcher(client, launcher, extra, args.parallel, say, check_names).watch(args.every, wake)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 an answer that failed, 2 wrong usage, 130 stopped."""
    args = parser().parse_intermixed_args(argv)
    try:
        if args.answer:
            return answer(args)
        watch(args) if args.watch else evaluate(args)
        return 0
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130
    except Exception as e:  # noqa: BLE001  one line that names the fix, whatever a filesystem, MLflow or Ray raised
        if args.answer:
            raise  # for the job's log
        named = isinstance(e, (ValueError, FileNotFoundError)) or type(e).__name__ == "StepFailed"
        print(f"error: {e}" if named else f"error: {type(e).__name__}: {e}", file=sys.stderr)
        return 2
    finally:
        if "ray" in sys.modules and not args.watch:
            sys.modules["ray"].shutdown()


if __name__ == "__main__":
    sys.exit(main())
