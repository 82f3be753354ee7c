"""`evaluate.py export`: writes for other toolkits' scorers: sounds for VERSA, stage 1's scores for ZeroSpeech 2021."""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import TYPE_CHECKING

from audiolm import store

if TYPE_CHECKING:
    from audiolm.config.pipeline import Pipeline
    from audiolm.tracking.target import Target


def add_options(p: argparse.ArgumentParser) -> None:
    from audiolm.dag.run_index import OUTPUTS

    p.add_argument("rest", nargs="+", metavar="MODEL_URI_OR_RUN a.b=c", help="as of an evaluation; and overrides of its config "
                   "(tables.utterances=4 tables.n_continuations=4)")
    scorer = p.add_mutually_exclusive_group(required=True)
    scorer.add_argument("--versa", metavar="FOLDER", help="where sounds, lists and configs for VERSA go")
    scorer.add_argument("--zerospeech", metavar="FOLDER", help="where a submission goes: stage 1's scores of the sets of "
                        "tables.probes={NAME: FOLDER}, ZeroSpeech 2021's lexical/dev and its like")
    p.add_argument("--ray", action="store_true", help="sounds as Ray tasks, on this machine or the cluster of RAY_ADDRESS")
    p.add_argument("--store", default=OUTPUTS, metavar="URI", help="where a run's name is looked up (default %(default)s)")
    p.add_argument("--tracking", metavar="URI", help="the MLflow server of a model or run id")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")


def export(args: argparse.Namespace) -> int:
    """Raises ValueError for a system that lacks a step, for a folder that holds another export, and as `write_submission`."""
    from audiolm.config.load import apply_overrides
    from audiolm.pipeline.cli import quiet
    from audiolm.tracking.target import resolve

    texts = [a for a in args.rest if "=" not in a]
    if len(texts) != 1:
        raise ValueError(f"one MODEL_URI_OR_RUN, got {', '.join(texts) or 'none'}")
    target = resolve(texts[0], args.store, args.tracking)
    device = [f"cluster.device={args.device}"] if args.device != "auto" else []
    config = apply_overrides(target.config, [a for a in args.rest if "=" in a] + device)
    quiet()
    (_sounds if args.versa else _scores)(args, target, config)
    return 0


def _scores(args: argparse.Namespace, target: Target, config: Pipeline) -> None:
    from audiolm.dag.run_index import missing_of
    from audiolm.data.parallel import pick_device
    from audiolm.eval.suites.zerospeech import write_submission
    from audiolm.pipeline.progress import ProgressBoard

    if not config.tables.probes:
        raise ValueError("--zerospeech scores the sets of tables.probes, which names none: add "
                         "tables.probes={words: FOLDER, sentences: FOLDER}, each with its gold.csv")
    if missing := missing_of(("kmeans", "semantic_tokens", "lm_semantic"), target.steps):
        raise ValueError(f"{target.title} cannot be scored: it has no {', '.join(missing)}")
    board, began = ProgressBoard(), time.monotonic()
    board.start("export")
    files = write_submission(list(config.tables.probes.values()), target.steps, store.absolute(args.zerospeech),
                             pick_device(config.cluster.device), partial(board.update, "export"))
    board.end("export", "DONE", time.monotonic() - began, f"{len(files)} files")
    print("\n".join(files))


def _sounds(args: argparse.Namespace, target: Target, config: Pipeline) -> None:
    from audiolm.dag.run_index import SYSTEM_STEPS
    from audiolm.data.parallel import Workers, cluster_device
    from audiolm.eval import versa
    from audiolm.eval.suites.base import SuiteContext, missing_steps
    from audiolm.eval.suites.run import digest
    from audiolm.pipeline.progress import ProgressBoard
    from audiolm.pipeline.ray_cluster import start_ray, wants_ray

    board, on_ray = ProgressBoard(), wants_ray(args.ray)
    identity = digest("versa", target.steps, config)
    out = Workers(not on_ray, "export", partial(board.update, "export"))
    folder = store.join(config.store, "evaluations", "cache", f"versa-{identity}")
    context = SuiteContext(target.steps, config, folder, cluster_device(config.cluster, out.inline), out)
    if why := missing_steps(context, ("manifest", *SYSTEM_STEPS)):
        raise ValueError(f"{target.title} cannot be exported: {why}")
    about, place = {"system": target.title, "digest": identity}, store.absolute(args.versa)
    if (there := store.get_json(store.join(place, "export.json"))) not in (None, about):
        raise ValueError(f"--versa {args.versa} holds another export, of {there.get('system')} with other models or settings: "
                         "give another folder")
    if on_ray:
        start_ray(config.cluster, config.store, board.say)
    store.put_json(store.join(place, "export.json"), about)
    board.start("export")
    began = time.monotonic()
    lists = versa.versa_lists(*versa.samples_of(context))
    versa.write_lists(lists, place, out.progress)
    board.end("export", "DONE", time.monotonic() - began, f"{sum(len(x.lines) for x in lists)} sounds")
    for x in lists:
        print(f"{x.name}: {len(x.lines)} sounds, {', '.join(m['name'] for m in x.metrics) or 'references alone'}")
    print(f"score them: sh {store.join(place, 'versa.sh')}")
