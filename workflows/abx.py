"""ABX phone discriminability of features on a ZeroSpeech item file, within and across speaker, with 95 % intervals.

    python workflows/abx.py --items dev-clean.item --audio LibriSpeech/dev-clean --features mfcc
    python workflows/abx.py --items dev-clean.item --audio LibriSpeech/dev-clean --features centroids \
        --tokenizer outputs/kmeans/FINGERPRINT/BUILD --speakers 1272,1462
    python workflows/abx.py --items dev-clean.item --audio LibriSpeech/dev-clean --features layer --layer 7 \
        --model outputs/masked_model/FINGERPRINT/BUILD --checkpoints
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="abx.py", description="Prints the ABX error of features, in %: libri-light's protocol.")
    p.add_argument("--items", required=True, metavar="FILE", help="triphones: #file onset offset #phone prev-phone next-phone "
                   "speaker")
    p.add_argument("--audio", required=True, nargs="+", metavar="FOLDER", help="where the items' files lie, at any depth, as "
                   "#file and an audio ending")
    p.add_argument("--features", required=True, choices=("mfcc", "mel", "semantic", "centroids", "layer"), help="mfcc (39 at "
                   "100 Hz), mel (80 at 100 Hz), a tokenizer's z-scored features or its centroids, or a masked model's layer, "
                   "z-scored over the items' files (25 Hz)")
    p.add_argument("--tokenizer", metavar="BUILD", help="a finished kmeans build, for semantic and centroids")
    p.add_argument("--model", metavar="BUILD", help="a masked_model build, for layer")
    p.add_argument("--layer", type=int, metavar="N", help="block whose output is measured, from 1, for layer")
    p.add_argument("--checkpoints", action="store_true", help="with layer: a row for each checkpoint that was kept "
                   "(semantic.model.train.keep), the curve over the training")
    p.add_argument("--speakers", metavar="A,B", help="only these, as A, B and X; default: all of the item file")
    p.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the tokenizer")
    p.add_argument("--json", metavar="FILE", help="write the figures there too, those of each speaker among them")
    p.add_argument("--plot", metavar="PNG", help="with --checkpoints: draw the curve")
    return p


def measure(args: argparse.Namespace) -> list[dict]:
    """`eval.metrics.abx.abx` of the audio's features, with "name" and "seconds"; several rows for checkpoints."""
    from audiolm.eval.metrics import abx

    whole = args.model is not None and args.layer is not None
    if args.plot and not args.checkpoints:
        raise ValueError("--plot draws a curve over checkpoints: add --checkpoints, or leave it out")
    if (args.features == "layer") != whole or (args.checkpoints and not whole):
        raise ValueError("--features layer goes with --model BUILD and --layer N, and --checkpoints with them; the other "
                         "features with none of these")
    items = abx.read_items(args.items)
    items = items.of(args.speakers.split(",")) if args.speakers else items
    rows, began = [], time.monotonic()
    for name, step, features, rate_hz in sources(args, set(items.file.tolist())):
        rows.append({"name": name, "step": step, **abx.abx(features, items, rate_hz, abx.Protocol(args.seed)),
                     "seconds": round(time.monotonic() - began, 1)})
        began = time.monotonic()
    return rows


def sources(args: argparse.Namespace, files: set[str]) -> Iterator[tuple[str, int | None, Any, float]]:
    """(name, step of a checkpoint, features by file, rate in Hz)."""
    from audiolm.data.parallel import pick_device
    from audiolm.eval.metrics import abx
    from audiolm.eval.steps import layers
    from audiolm.eval.steps.layers import checkpoints
    from audiolm.eval.test_sets import audio_paths, wav_of
    from audiolm.tokenizers.extractor import window_of
    from audiolm.tokenizers.semantic import load_extractor, load_semantic

    device = pick_device(args.device)
    if args.features != "layer":
        extract, rate_hz = abx.extractor(args.features, load_semantic(args.tokenizer, device) if args.tokenizer else None)
    paths = audio_paths(tuple(args.audio), files, "--audio")
    if args.features != "layer":
        yield args.features, None, lambda file: extract(wav_of(paths[file])), rate_hz
        return
    from audiolm.config.semantic import KMeansConfig  # its windows, which tokens are made with

    window = window_of(KMeansConfig().window_s, KMeansConfig().overlap_s)
    models = checkpoints(args.model, device) if args.checkpoints else [(None, load_extractor(args.model, device))]
    for step, model in models:
        name = f"layer {args.layer}" + ("" if step is None else f", step {step}")
        yield name, step, layers.zscored(layers.frames_of(paths, model, args.layer, window)), layers.RATE_HZ


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 wrong usage, 130 stopped."""
    args = parser().parse_args(argv)
    from soundfile import SoundFileError

    from audiolm import store
    from audiolm.eval.metrics.abx import MODES
    from audiolm.render import plots

    try:
        rows = measure(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, FileNotFoundError, SoundFileError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    for found, mode in ((row, mode) for row in rows for mode in MODES):
        lo, hi = found[f"interval_{mode}"]
        print(f"{found['name']} {mode} speaker: {found[mode]:.2f} % [{lo:.2f}, {hi:.2f}]  {found[f'triplets_{mode}']} "
              f"triplets, {found[f'phone_pairs_{mode}']} phone pairs, {len(found[f'by_speaker_{mode}'])} speakers")
    last = rows[-1]
    print(f"{last['items']} items ({last['dropped']} shorter than a frame left out), {sum(r['seconds'] for r in rows):.1f} s")
    if args.json:
        store.put(args.json, json.dumps(rows, indent=1).encode())
    if args.plot:
        curve = {f"{mode} speaker": [row[mode] for row in rows] for mode in MODES}
        store.put(args.plot, plots.curves([row["step"] for row in rows], curve, f"ABX, layer {args.layer}", "error, %"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
