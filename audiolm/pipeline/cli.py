"""The workflow's command line: plan, status, run.

One positional YAML (default: the quickstart), `a.b=c` overrides, --dry-run --status --only --from --force --repair --inline
and --gc.
Starts or joins Ray, runs the plan, shows progress, ships metrics, prints where sound, report and UI are.
Exit status: 0 done, 1 failed, 2 wrong usage or config, 130 stopped (143 by SIGTERM).
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import threading
import time
import traceback
import warnings
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from pathlib import Path

from audiolm import pretrained
from audiolm.config.base import ConfigError
from audiolm.config.load import load_config
from audiolm.config.pipeline import Pipeline
from audiolm.dag.execute import StepFailed, execute
from audiolm.dag.outputs import damaged, take_back
from audiolm.dag.plan import PlanRow, plan, toposort
from audiolm.dag.run_index import OUTPUTS
from audiolm.dag.step import Artifact, Status, Step
from audiolm.data.parallel import cluster_device
from audiolm.pipeline.corpus_needs import check_config_needs, check_corpus_needs
from audiolm.pipeline.needs import check_installed, reads_audio
from audiolm.pipeline.output import outputs
from audiolm.pipeline.ray_cluster import in_ray_job, start_ray, worker_died
from audiolm.pipeline.stop import STOPPED, exit_status, stoppable, take_signals
from audiolm.store import NoAnswer, check_store, is_local, patience, waits_told_to
from audiolm.tokenizers.start import StartWeights
from audiolm.train.commits import starting_point, steps_kept

STOP_S = 10.0  # for the steps' threads to end after Ctrl-C
START_S = 20.0  # of waiting for a store that does not answer: at the start a wrong address is likelier than an outage


def main(graph: Callable[[Pipeline], list[Step]], default: Path) -> None:
    """Parses the command line and runs; ends the process unless all went well."""
    args = _parser(default).parse_intermixed_args()
    if status := run_command(lambda: _pipeline(args, graph, default)):
        sys.exit(status)


def run_command(command: Callable[[], int], stopped: str = STOPPED, trace: bool = False, with_terminal: bool = False) -> int:
    """The exit status of a command, its errors in one line on stderr (`trace`: with the traceback) and its Ray shut down.

    0 and 1 are the command's own; 2: wrong usage, config or input; 130 or 143: Ctrl-C or SIGTERM, after the line `stopped`.
    Whatever it prints is without the credentials that URIs may hold, and may get lost without harm (pipeline/output.py).
    It outlives its terminal, unless it ends `with_terminal`.
    """
    with stoppable(with_terminal), outputs():
        try:
            return command()
        except KeyboardInterrupt:
            print(f"\n{stopped}", file=sys.stderr)
            return exit_status()
        except Exception as e:  # noqa: BLE001  one line that names the fix, whatever a filesystem, MLflow or Ray raised
            if trace:
                traceback.print_exc()
            ours = isinstance(e, (ValueError, FileNotFoundError, StepFailed))
            return _fail(f"{e}" if ours else f"{type(e).__name__}: {e}", 2)
        finally:
            _stop_ray()


def _fail(text: str, code: int) -> int:
    print(f"error: {text}", file=sys.stderr)
    return code


def _stop_ray() -> None:
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def _pipeline(args: argparse.Namespace, graph: Callable[[Pipeline], list[Step]], default: Path) -> int:
    """Plans and, unless only the plan or the status is asked for, runs. Raises ValueError for wrong usage."""
    files = [a for a in args.rest if "=" not in a or os.path.isfile(a)]
    overrides = [a for a in args.rest if a not in files]
    if args.yes and not args.gc:
        raise ValueError("--yes goes with --gc")
    if args.repair and args.from_:
        raise ValueError("--repair looks at all steps, or at those of --only: leave out --from")
    if len(files) > 1:
        raise ValueError(f"one config file at most, got {', '.join(files)}")
    cfg = place(load_config(files[0] if files else str(default), overrides))
    force = _names(args.force)
    choose = partial(plan, toposort(graph(cfg)), cfg.store, only=_names(args.only), from_=_names(args.from_), force=force)
    try:
        with patience(START_S):
            rows = choose()
        if args.repair and take_back_damaged(rows, _names(args.only), report_only=args.dry_run or args.status):
            rows = choose()
    except (PermissionError, NoAnswer) as e:
        return _fail(f"store {cfg.store!r}: {e}; check its path, and endpoint and credentials in the environment", 1)
    if args.gc:
        from audiolm.pipeline.garbage import collect

        return collect(cfg, rows, graph, args.days, args.yes and not args.dry_run)
    if args.dry_run or args.status:
        print(table(rows, run=args.dry_run))
        return 0
    check_installed(cfg, [r.step for r in rows if r.run], args.inline)
    check_config_needs(cfg, [r.step for r in rows if r.run])
    quiet()
    try:
        with patience(START_S):
            check_store(cfg.store)
        _check_corpus(cfg, rows)
    except Exception as e:  # noqa: BLE001  one line that names the store, whatever its filesystem raised
        return _fail(f"{e}" if isinstance(e, ValueError) else f"store {cfg.store!r}: {type(e).__name__}: {e}", 1)
    return _run(cfg, rows, force, args.inline)


def _parser(default: Path) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="AudioLM: raw audio in, generated audio out. Steps that are done are skipped; "
                                            "after a crash the same command continues.")
    p.add_argument("rest", nargs="*", metavar="CONFIG.yaml a.b=c", help=f"a config (default {default.name}) and overrides")
    p.add_argument("--dry-run", action="store_true", help="print what would run and why; start nothing")
    p.add_argument("--status", action="store_true", help="print the state of every step; start nothing")
    p.add_argument("--only", metavar="A,B", help="run these steps alone; their inputs must exist")
    p.add_argument("--from", dest="from_", metavar="A", help="run this step and those after it")
    p.add_argument("--force", metavar="A,B", help="build these anew, or past the gate that stopped them; "
                                                   "what depends on them follows")
    p.add_argument("--repair", action="store_true", help="read every output of the finished steps (or of those of --only), and "
                   "make again what is missing or damaged; with --dry-run only name it")
    p.add_argument("--gc", action="store_true", help="list outputs of the store that no run, registered version or newer build "
                   "refers to")
    p.add_argument("--yes", action="store_true", help="with --gc: remove them")
    p.add_argument("--days", type=float, default=7.0, help="with --gc: keep what was written or used for so long (default 7)")
    p.add_argument("--inline", action="store_true", help="run in this one process, without Ray")
    return p


def take_back_damaged(rows: list[PlanRow], only: tuple[str, ...], report_only: bool) -> bool:
    """Prints the finished steps whose outputs are damaged and, unless it is only to report, makes them unfinished.

    `only`: the names of the steps to look at, all without any. True where one was made unfinished.
    """
    changed = False
    for row in rows:
        if row.run or row.state.status is not Status.DONE or (only and row.step.name not in only):
            continue
        path = row.state.artifact.path
        if bad := damaged(path):
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            print(f"{row.step.name}: missing or damaged in {path}: {', '.join(bad[:3])}{more}")
            if not report_only:
                take_back(path, bad, row.step.part)
                changed = True
    return changed


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(n.strip() for n in text.split(",") if n.strip()) if text else ()


def place(cfg: Pipeline) -> Pipeline:
    """Makes a local store absolute. Raises ConfigError for a relative one in a Ray job, whose folder does not last."""
    store, tracking = cfg.store, cfg.tracking
    in_job = in_ray_job()
    if is_local(store) and not os.path.isabs(store.removeprefix("file://")):
        if in_job:
            raise ConfigError(f"store: {store!r} is relative, and a Ray job's working folder changes with each submission; "
                              "give an absolute path that every node sees, or s3://...: add store=/shared/audiolm")
        store = os.path.abspath(os.path.expanduser(store))
    if tracking == "sqlite" and not is_local(store):
        raise ConfigError(f"tracking: sqlite needs a local store, and store is {store!r}; "
                          "give an MLflow server: tracking=http://host:5000, or tracking=none")
    if tracking.startswith("sqlite:///") and not tracking.startswith("sqlite:////"):
        if in_job:
            raise ConfigError(f"tracking: {tracking!r} is relative; in a Ray job give sqlite:////absolute/path or a server")
        tracking = "sqlite:///" + os.path.abspath(tracking.removeprefix("sqlite:///"))
    return cfg.model_copy(update={"store": store, "tracking": tracking})


def table(rows: list[PlanRow], run: bool) -> str:
    """The plan or the status as aligned lines."""
    width = max(len(r.step.name) for r in rows)
    lines = []
    for r in rows:
        verb = ("run " if r.run else "skip") if run else ""
        reason = _with_start(r, r.reason + _goes_on(r) if run else r.state.note)
        path = r.state.artifact.path if r.state.artifact and not (run and r.run) else ""
        lines.append(f"{verb:5}{r.step.name:{width}}  {r.state.status:8} {r.step.fingerprint}  {reason}  {path}".rstrip())
    n = sum(r.run for r in rows)
    return "\n".join([*lines, f"{n} of {len(rows)} steps to run" if run else f"{len(rows) - n} of {len(rows)} steps done"])


def _with_start(row: PlanRow, reason: str) -> str:
    """The reason and, for a training that starts from an export's weights, which these are."""
    start = row.step.config.get("start")
    return "; ".join(filter(None, [reason, f"starts from {start.note}"])) if isinstance(start, StartWeights) else reason


def _goes_on(row: PlanRow) -> str:
    """The step that a training would continue from, and the build of that checkpoint where it is another one."""
    found = starting_point(row.builds[0], row.builds[1:], row.step.trains.trunk_steps) if row.builds else None
    if found is None:
        return ""
    build, commit = found
    origin = "" if build == row.builds[0] else f" of {'/'.join(build.split('/')[-2:])}"
    return f"; goes on from step {commit['step']}{origin}"


def _run(cfg: Pipeline, rows: list[PlanRow], force: tuple[str, ...], inline: bool) -> int:
    """Runs the plan under observation; the exit status. Without Ray where nothing is to do."""
    from audiolm.pipeline.run_observer import RunObserver

    began = time.monotonic()
    todo = [r.step.name for r in rows if r.run]
    observer = RunObserver(cfg, rows, git_state())
    observer.say(f"audiolm: run {cfg.run.name!r}, corpus {cfg.corpus.name!r}, store {cfg.store}")
    observer.say(f"{len(todo)} of {len(rows)} steps to run" + (": " + ", ".join(todo) if todo else ", nothing to do"))
    code = 1

    def finished(name: str, artifact: Artifact) -> None:
        observer.finished(name, artifact)
        if name == "manifest":
            for remark in check_corpus_needs(cfg, [r.step for r in rows if r.run], artifact.path):
                observer.say(remark)

    try:
        if todo and not inline:
            start_ray(cfg.cluster, cfg.store, observer.say)
            take_signals()  # Ray took SIGTERM
            import torch.distributed  # noqa: F401  here, as two steps' threads that import torch at once crash the process
        if todo and cfg.cluster.device == "cuda":  # before hours of steps that need none
            cluster_device(cfg.cluster, inline, cfg.cluster.train_workers if any(r.run and r.step.trains for r in rows) else 1)
        with waits_told_to(observer.board.waits):
            execute(rows, cfg.store, force=force, inline=inline, slots=cfg.cluster.parallel_training, observer=observer,
                    retries=cfg.cluster.retries, may_retry=worker_died, kept=steps_kept, finished=finished)
        code = 0
    except (StepFailed, ConfigError) as e:
        observer.say(f"error: {e}")
        observer.say("what is done stays done; the same command continues after the fix")
    except KeyboardInterrupt:
        observer.say(STOPPED)
        _stop_ray()  # the steps' threads wait for its workers
        deadline = time.monotonic() + STOP_S
        for thread in (t for t in threading.enumerate() if t.name in todo):  # each gives its lease back
            thread.join(max(0.0, deadline - time.monotonic()))
        code = exit_status()
    observer.close({0: "FINISHED", 1: "FAILED"}.get(code, "KILLED"), time.monotonic() - began)
    if code > 1:  # a thread that still waits would hold the process
        sys.stdout.flush()
        os._exit(code)
    return code


def quiet() -> None:
    """Silences telemetry and the libraries' own messages, so that the terminal shows the run."""
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", MLFLOW_DISABLE_TELEMETRY="true", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
                      TF_CPP_MIN_LOG_LEVEL="3", DS_LOG_LEVEL="error", GIT_PYTHON_REFRESH="quiet")
    warnings.simplefilter("ignore")
    for name in ("ray", "mlflow", "alembic", "DeepSpeed", "botocore", "s3fs"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _check_corpus(cfg: Pipeline, rows: list[PlanRow]) -> None:
    """Raises ValueError where a manifest that would be skipped does not describe the files any more.

    Files that are gone stop no step that reads tokens alone: that is printed.
    """
    manifest = next((r for r in rows if r.step.name == "manifest" and not r.run), None)
    if manifest is None or manifest.state.artifact is None or cfg.corpus.changed == "ignore":
        return
    from audiolm.data.listing import changed_files

    readers = [r.step.name for r in rows if r.run and reads_audio(r.step)]
    try:
        changes = {k: v for k, v in changed_files(manifest.state.artifact.path, cfg.corpus).items() if v}
    except Exception as e:  # whatever a filesystem raises that is not there
        if not readers:
            print(f"corpus {cfg.corpus.name!r} cannot be read ({e}); what runs now needs its tokens alone", flush=True)
            return
        if others := [r.step.name for r in rows if r.run and r.step.trains and not reads_audio(r.step)]:
            raise ConfigError(f"{e}; {', '.join(readers)} read its audio, and {', '.join(others)} do not: to go on with those "
                              f"add --only {','.join(others)}") from e
        raise
    if changes.keys() == {"removed"} and not readers:
        print(f"corpus {cfg.corpus.name!r}: {len(changes['removed'])} files are gone; what runs now needs its tokens alone",
              flush=True)
    elif changes:
        text = "; ".join(f"{len(v)} {k}: {', '.join(v[:3])}{' ...' if len(v) > 3 else ''}" for k, v in changes.items())
        raise ValueError(f"corpus {cfg.corpus.name!r} changed since its manifest was built ({text}). To use the new files "
                         f"raise corpus.revision to {cfg.corpus.revision + 1}; to go on with the old manifest add "
                         "corpus.changed=ignore")


def git_state() -> dict[str, str]:
    """The checkout's commit and its dirty flag, as tags; empty outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, timeout=10)
        return {"mlflow.source.git.commit": commit.stdout.strip(), "git.commit": commit.stdout.strip(),
                "git.dirty": str(bool(dirty.stdout.strip())).lower()}
    except (OSError, subprocess.SubprocessError):
        return {}


def add_run_options(p: ArgumentParser, run: str = "--run") -> None:
    """`find_run`'s arguments: --run, or `run` as an argument that may be left out, --store and --tracking."""
    published = ", ".join(pretrained.systems()) or "none here"
    optional = {} if run.startswith("-") else {"nargs": "?"}
    p.add_argument(run, **optional, metavar="RUN", help="a run's name, its index (OUTPUTS/runs/NAME.json), its MLflow run id "
                   f"or a published system's name ({published}); default: quickstart, without that run the published system "
                   f"{pretrained.DEFAULT_SYSTEM}, where there is one")
    p.add_argument("--store", default=OUTPUTS, metavar="URI", help="where a run's name is looked up, and what MLflow names "
                   "must lie in (default %(default)s)")
    p.add_argument("--tracking", metavar="URI", help="the MLflow server of a run id; default: MLFLOW_TRACKING_URI, else the "
                   "store's database")
