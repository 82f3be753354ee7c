"""`evaluate.py abx`: the ABX error of features on a triphone list."""

from __future__ import annotations

import argparse
import json

from audiolm import store
from audiolm.tokenizers.base import SAMPLE_RATE, SEMANTIC_HOP

MODEL_HZ = SAMPLE_RATE // SEMANTIC_HOP  # 25, the rate of a masked model's frames


def names(text: str) -> list[str]:
    """The names in "A,B"."""
    return [n.strip() for n in text.split(",") if n.strip()]


def add_item_options(p: argparse.ArgumentParser) -> None:
    """Options of `tokens` and `abx`: a triphone list and its audio."""
    p.add_argument("--items", required=True, metavar="FILE", help="triphones: #file onset offset #phone prev-phone next-phone "
                   "speaker")
    p.add_argument("--audio", required=True, nargs="+", metavar="FOLDER", help="where the items' files lie, at any depth, as "
                   "#file and an audio ending")
    p.add_argument("--speakers", type=names, metavar="A,B", help="only these, as A, B and X; default: all of the item file")
    p.add_argument("--seed", type=int, default=0, help="of ABX's draws (default 0)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")
    p.add_argument("--json", metavar="FILE", help="write the figures there too, with each speaker's ABX")


def add_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--features", required=True, choices=("mfcc", "mel", "semantic", "centroids", "layer"), help="mfcc (39 at "
                   "100 Hz), mel (80 at 100 Hz), a tokenizer's z-scored features or its centroids, or a masked model's layer, "
                   "z-scored over the items' files")
    p.add_argument("--hz", type=int, choices=(MODEL_HZ, 2 * MODEL_HZ, 4 * MODEL_HZ), default=MODEL_HZ, help="frames a second "
                   "of a model's features; above %(default)s it reads each file again, moved by a part of a frame")
    p.add_argument("--tokenizer", metavar="BUILD", help="a finished kmeans build, for semantic and centroids")
    p.add_argument("--model", metavar="BUILD", help="a masked_model build, for layer")
    p.add_argument("--layer", type=int, metavar="N", help="block whose output is measured, from 1, for layer")
    p.add_argument("--checkpoints", action="store_true", help="with layer: a row for each checkpoint that was kept "
                   "(semantic.model.train.keep), the curve over the training")
    p.add_argument("--plot", metavar="PNG", help="with --checkpoints: draw the curve")
    add_item_options(p)


def abx(args: argparse.Namespace) -> None:
    """Prints the ABX error of features; a row for each checkpoint with --checkpoints."""
    from audiolm.data.parallel import pick_device
    from audiolm.eval.metrics.abx import MODES
    from audiolm.eval.suites import tokens as suite
    from audiolm.eval.test_sets import items_and_audio, wav_of
    from audiolm.render import plots

    has_layer = args.model is not None and args.layer is not None
    if args.plot and not args.checkpoints:
        raise ValueError("--plot draws a curve over checkpoints: add --checkpoints, or leave it out")
    if (args.features == "layer") != has_layer or (args.checkpoints and not has_layer):
        raise ValueError("--features layer goes with --model BUILD and --layer N, and --checkpoints with them; the other "
                         "features with none of these")
    if args.hz != MODEL_HZ and args.features in ("mfcc", "mel"):
        raise ValueError(f"--hz {args.hz} is for features of a model; {args.features} has 100 Hz: leave it out")
    device, times = pick_device(args.device), args.hz // MODEL_HZ
    extract, rate_hz = (None, 0.0) if has_layer else suite.load_extractor(args.features, args.tokenizer, device, times)
    items, files = items_and_audio(args.items, args.audio, args.speakers, "--audio")
    sources = (suite.features_of_layer(args.model, args.layer, files, device, args.checkpoints, times) if has_layer else
               [(args.features, None, lambda file: extract(wav_of(files[file])), rate_hz)])
    rows = suite.abx_rows(sources, items, args.seed)
    print(suite.format_abx(rows))
    if args.json:
        store.put(args.json, json.dumps(rows, indent=1).encode())
    if args.plot:
        curves = {f"{mode} speaker": [row[mode] for row in rows] for mode in MODES}
        store.put(args.plot, plots.curves([row["step"] for row in rows], curves, f"ABX, layer {args.layer}", "error, %"))
