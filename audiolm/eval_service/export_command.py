"""`evaluate.py export`: writes the sounds that the suites score for other toolkits' scorers."""

from __future__ import annotations

import argparse
import time

from audiolm import store


def add_options(p: argparse.ArgumentParser) -> None:
    from audiolm.dag.run_index import OUTPUTS

    p.add_argument("rest", nargs="+", metavar="MODEL_URI_OR_RUN a.b=c", help="as of an evaluation; and overrides of its config "
                   "(tables.utterances=4 tables.n_continuations=4)")
    p.add_argument("--versa", required=True, metavar="FOLDER", help="where sounds, lists and configs for VERSA go")
    p.add_argument("--ray", action="store_true", help="sounds as Ray tasks, on this machine or the cluster of RAY_ADDRESS")
    p.add_argument("--store", default=OUTPUTS, metavar="URI", help="where a run's name is looked up (default %(default)s)")
    p.add_argument("--tracking", metavar="URI", help="the MLflow server of a model or run id")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")


def export(args: argparse.Namespace) -> int:
    """Raises ValueError for a system that lacks a step, and for a folder that holds another export."""
    from functools import partial

    from audiolm.config.load import apply_overrides
    from audiolm.dag.run_index import SYSTEM_STEPS
    from audiolm.data.parallel import Workers, cluster_device
    from audiolm.eval import versa
    from audiolm.eval.suites.base import SuiteContext, missing_steps
    from audiolm.eval.suites.run import digest
    from audiolm.pipeline.cli import quiet
    from audiolm.pipeline.progress import ProgressBoard
    from audiolm.pipeline.ray_cluster import start_ray, wants_ray
    from audiolm.tracking.target import resolve

    texts = [a for a in args.rest if "=" not in a]
    if len(texts) != 1:
        raise ValueError(f"one MODEL_URI_OR_RUN, got {', '.join(texts) or 'none'}")
    target, board, on_ray = resolve(texts[0], args.store, args.tracking), ProgressBoard(), wants_ray(args.ray)
    device = [f"cluster.device={args.device}"] if args.device != "auto" else []
    config = apply_overrides(target.config, [a for a in args.rest if "=" in a] + device)
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
    quiet()
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
    return 0
