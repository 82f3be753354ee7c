"""ABX phone discriminability of features on a ZeroSpeech item file, within and across speaker, with 95 % intervals.

    python workflows/abx.py --items dev-clean.item --audio LibriSpeech/dev-clean --features mfcc
    python workflows/abx.py --items dev-clean.item --audio LibriSpeech/dev-clean --features centroids \
        --tokenizer outputs/kmeans/FINGERPRINT/BUILD --speakers 1272,1462
"""

from __future__ import annotations

import argparse
import json
import posixpath
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="abx.py", description="Prints the ABX error of features, in %: libri-light's protocol.")
    p.add_argument("--items", required=True, metavar="FILE", help="triphones: #file onset offset #phone prev-phone next-phone "
                   "speaker")
    p.add_argument("--audio", required=True, nargs="+", metavar="FOLDER", help="where the items' files lie, at any depth, as "
                   "#file and an audio ending")
    p.add_argument("--features", required=True, choices=("mfcc", "mel", "semantic", "centroids"), help="mfcc (39 at 100 Hz), "
                   "mel (80 at 100 Hz), a tokenizer's z-scored features or its centroids (25 Hz)")
    p.add_argument("--tokenizer", metavar="BUILD", help="a finished kmeans build, for semantic and centroids")
    p.add_argument("--speakers", metavar="A,B", help="only these, as A, B and X; default: all of the item file")
    p.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the tokenizer")
    p.add_argument("--json", metavar="FILE", help="write the figures there too, those of each speaker among them")
    return p


def measure(args: argparse.Namespace) -> dict:
    """`eval.abx.abx` of the audio's features, with "seconds"."""
    import torch

    from audiolm.data import audio
    from audiolm.data.sources import AUDIO
    from audiolm.eval import abx
    from audiolm.tokenizers import files
    from audiolm.tokenizers.semantic import load_semantic

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no GPU that torch can use; give --device cpu or auto")
    items = abx.read_items(args.items)
    items = items.of(args.speakers.split(",")) if args.speakers else items
    device = "cpu" if args.device == "cpu" or not torch.cuda.is_available() else "cuda"
    tokenizer = load_semantic(args.tokenizer, device) if args.tokenizer else None
    extract, rate_hz = abx.extractor(args.features, tokenizer)
    paths = {posixpath.splitext(posixpath.basename(name))[0]: path for name, path in files.find(args.audio, AUDIO)}

    def features(file: str):
        return extract(audio.resample(*audio.decode(paths[file]), audio.SAMPLE_RATE_HZ)) if file in paths else None

    began = time.monotonic()
    found = abx.abx(features, items, rate_hz, seed=args.seed)
    return {"features": args.features, **found, "seconds": round(time.monotonic() - began, 1)}


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 wrong usage, 130 stopped."""
    args = parser().parse_args(argv)
    from audiolm import store
    from audiolm.eval.abx import MODES

    try:
        found = measure(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, FileNotFoundError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    for mode in MODES:
        lo, hi = found[f"interval_{mode}"]
        print(f"{args.features} {mode} speaker: {found[mode]:.2f} % [{lo:.2f}, {hi:.2f}]  {found[f'triplets_{mode}']} "
              f"triplets, {found[f'phone_pairs_{mode}']} phone pairs, {len(found[f'by_speaker_{mode}'])} speakers")
    print(f"{found['items']} items ({found['dropped']} shorter than a frame left out), {found['seconds']} s")
    if args.json:
        store.put(args.json, json.dumps(found, indent=1).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
