"""The paper's Table I for a trained pair: ABX and quality of the sound, of acoustic tokens and of semantic ones.

    python workflows/table1.py --run outputs/runs/speech.json --items dev-clean.item --audio LibriSpeech/dev-clean
    python workflows/table1.py --items dev-clean.item --audio LibriSpeech/dev-clean --speakers 1272,1462 \
        --codec outputs/codec/FINGERPRINT/BUILD --tokenizer outputs/kmeans/FINGERPRINT/BUILD \
        --vocoder outputs/semantic_vocoder/FINGERPRINT/BUILD
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

STEPS = {"codec": "codec", "tokenizer": "kmeans", "residual": "residual", "vocoder": "semantic_vocoder"}  # option: step


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="table1.py", description="Prints ABX error and quality of the decoded sound of acoustic "
                                "and semantic tokens, by bit rate. What is not given is left out.")
    p.add_argument("--items", required=True, metavar="FILE", help="triphones: #file onset offset #phone prev-phone next-phone "
                   "speaker")
    p.add_argument("--audio", required=True, nargs="+", metavar="FOLDER", help="where the items' files lie, at any depth, as "
                   "#file and an audio ending")
    p.add_argument("--run", metavar="FILE", help="a run's index (OUTPUTS/runs/NAME.json): takes its builds for those not named")
    p.add_argument("--codec", metavar="PATH", help="a codec build, a run's index or the folder of an imported codec")
    p.add_argument("--tokenizer", metavar="BUILD", help="a kmeans build")
    p.add_argument("--residual", metavar="BUILD", help="a residual build of that tokenizer, for more levels")
    p.add_argument("--vocoder", metavar="BUILD", help="a semantic_vocoder build, for the sound of semantic tokens")
    p.add_argument("--clips", nargs="+", metavar="PATH", help="audio files or folders to decode; default: the items' files")
    p.add_argument("--number", type=int, default=20, metavar="N", help="of clips, spread evenly over them all (default 20)")
    p.add_argument("--seconds", type=float, default=8.0, metavar="S", help="of each clip, from its start (default 8)")
    p.add_argument("--speakers", metavar="A,B", help="only items of these speakers; default: all of the item file")
    p.add_argument("--seed", type=int, default=0, help="of ABX's draws (default 0)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")
    p.add_argument("--json", metavar="FILE", help="write the table there too, with each speaker's ABX")
    return p


def builds(args: argparse.Namespace) -> dict[str, str | None]:
    """Path by option, from the options and then from the run's index. Raises ValueError where neither side is there."""
    from audiolm.dag.run_index import steps_of

    steps = steps_of(args.run) if args.run else {}
    found = {option: getattr(args, option) or steps.get(step) for option, step in STEPS.items()}
    if not found["codec"] and not found["tokenizer"]:
        raise ValueError(f"{args.run} names no finished step codec or kmeans" if args.run else
                         "nothing to measure: give --codec, --tokenizer (with --vocoder), or --run")
    for option in ("residual", "vocoder"):
        if found[option] and not found["tokenizer"]:
            raise ValueError(f"--{option} needs the tokenizer it was made for: give --tokenizer")
    return found


def measure(args: argparse.Namespace) -> dict:
    """`eval.suites.tokens.table1` of the builds, with their paths and "wall_s"."""
    from audiolm.data import audio
    from audiolm.data.parallel import pick_device
    from audiolm.data.sources import AUDIO
    from audiolm.eval.metrics import abx
    from audiolm.eval.metrics.audio_quality import scorers
    from audiolm.eval.suites.tokens import acoustic_side, semantic_side, table1
    from audiolm.eval.test_sets import audio_paths, wav_of
    from audiolm.tokenizers import codec_files
    from audiolm.tokenizers.residual import load_residual
    from audiolm.tokenizers.vocoder import load_vocoder

    if args.number < 1 or args.seconds <= 0:
        raise ValueError(f"--number {args.number} and --seconds {args.seconds}: both must be above 0")
    device = pick_device(args.device)
    began, paths = time.monotonic(), builds(args)
    items = abx.read_items(args.items)
    items = items.of(args.speakers.split(",")) if args.speakers else items
    by_name = audio_paths(tuple(args.audio), set(items.file.tolist()), "--audio")
    sides = [acoustic_side(codec_files.open_codec(paths["codec"], device))] if paths["codec"] else []
    if paths["tokenizer"]:
        tokenizer = load_residual(paths["tokenizer"], paths["residual"], device)
        vocoder = load_vocoder(paths["vocoder"], tokenizer, device) if paths["vocoder"] else None
        sides.append(semantic_side(tokenizer, vocoder))
    places = [path for _, path in codec_files.find_files(args.clips, AUDIO)] if args.clips else list(by_name.values())
    some = [places[i * len(places) // args.number] for i in range(args.number)] if len(places) > args.number else places
    wavs = [wav_of(place)[:round(args.seconds * audio.SAMPLE_RATE_HZ)] for place in some]

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    found = table1(sides, items, lambda name: wav_of(by_name[name]), wavs, scorers(), args.seed, say)
    return {**found, "builds": paths, "wall_s": round(time.monotonic() - began, 1)}


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 wrong usage, 130 stopped."""
    args = parser().parse_args(argv)
    from soundfile import SoundFileError

    from audiolm import store
    from audiolm.eval.suites.tokens import format_table

    try:
        found = measure(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, FileNotFoundError, SoundFileError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(format_table(found))
    if args.json:
        store.put(args.json, json.dumps(found, indent=1).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
