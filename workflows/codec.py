"""Audio files through a codec: to codes files, back to sound, and several codecs in one table; publishes a codec.

    python workflows/codec.py encode recordings/ --out codes/
    python workflows/codec.py decode codes/ --out again/ --levels 4
    python workflows/codec.py evaluate recordings/ --codec speech-16k --codec /models/dac_16khz --levels all --out table
    python workflows/codec.py encode s3://bucket/talk.mp3 --codec s3://bucket/outputs/runs/speech.json --out codes/
    python workflows/codec.py encode recordings/ --codec speech-16k --out codes/
    python workflows/codec.py publish --codec outputs/runs/speech.json --out audiolm/pretrained --name speech-16k
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CODEC = "a published codec's name, a codec build, a run's index (OUTPUTS/runs/NAME.json) or an imported codec's folder"


def parser() -> argparse.ArgumentParser:
    from audiolm import pretrained
    from audiolm.data.containers.layout import ENDINGS

    p = argparse.ArgumentParser(prog="codec.py", description="Audio to the codes of a trained codec, and back; long files in "
                                "constant memory. Files that are done are skipped, so that the same command continues.")
    do = p.add_subparsers(dest="do", required=True)
    encode = do.add_parser("encode", help="audio files to codes files", description="Writes one .safetensors of codes per "
                           "audio file: tensor `codes` uint16 (frames, levels), and what is needed to decode it.")
    decode = do.add_parser("decode", help="codes files to audio files", description="Writes one 16-bit audio file per codes "
                           "file, at the codec's sample rate and as long as the original.")
    add_evaluate(do.add_parser("evaluate", help="a table of codecs by number of levels, beside Opus and Lyra",
                               description="Measures PESQ, ViSQOL, STOI, SI-SDR, mel distance, F0 correlation, WER and the "
                               "speaker's cosine of codecs at some numbers of levels, of Opus (and Lyra v2 with --lyra), of "
                               "the original and of noise, on the same clips. Clips are Ray tasks, here or on the cluster of "
                               "RAY_ADDRESS. What is scored is kept, so that the same command continues."))
    add_publish(do.add_parser("publish", help="a trained codec as float16 weights to ship", description="Writes the export of "
                              "a codec build in float16, and its recipe, as a folder that --codec and audiolm.load_codec take. "
                              "Compares its codes with the build's on the INPUTs or on a synthetic sound."))
    sounds = f"audio files, or folders to search for {', '.join(ENDINGS)}"
    for sub, kind in ((encode, sounds), (decode, "codes files, or folders to search for .safetensors")):
        sub.add_argument("inputs", nargs="+", metavar="INPUT", help=f"{kind}; a local path or any fsspec URI (s3://...)")
        sub.add_argument("--codec", metavar="CODEC", help=f"{CODEC} ({', '.join(pretrained.names()) or 'none here'}); default: "
                         "the codec of ./outputs/runs/quickstart.json, without that run the published codec "
                         f"{pretrained.DEFAULT_CODEC}")
        sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")
    for sub in (encode, decode):
        sub.add_argument("--out", required=True, metavar="FOLDER",
                         help="where to write; a file keeps its path below the INPUT folder, with another ending")
        sub.add_argument("--levels", type=int, metavar="N", help="take the first N levels alone: fewer bits, rougher sound")
        sub.add_argument("--force", action="store_true", help="make files again that are done already")
    decode.add_argument("--format", choices=("wav", "flac"), default="wav", help="of the audio files (default wav)")
    return p


def add_evaluate(p: argparse.ArgumentParser) -> None:
    """The options of `evaluate`."""
    from audiolm.dag.run_index import OUTPUTS

    p.add_argument("inputs", nargs="+", metavar="INPUT", help="held-out audio files, or folders of them; any fsspec URI")
    p.add_argument("--codec", action="append", metavar="CODEC", help=f"{CODEC}; give it again for each further codec")
    p.add_argument("--levels", nargs="+", metavar="N", help="numbers of levels, or all; default: one, 2 kb/s, half, all")
    p.add_argument("--clips", type=int, default=20, metavar="N", help="files, spread evenly over what is found (default 20)")
    p.add_argument("--seconds", type=float, default=8.0, metavar="S", help="of each file, from its start (default 8)")
    p.add_argument("--speaker", choices=("none", "parent", "grandparent"), default="none", help="the folder that names a "
                   "file's speaker, for intervals over speakers; none: over files (default)")
    p.add_argument("--metrics", type=lambda text: text.split(","), metavar="A,B", help="these alone: pesq, visqol, stoi, "
                   "si_sdr_db, mel, f0, wer, speaker; visqol takes the longest (default: all)")
    p.add_argument("--lyra", metavar="FOLDER", help="Lyra v2's three tflite models, for rows of it")
    p.add_argument("--asr", metavar="FOLDER", help="a speech recogniser in place of Whisper tiny.en, for WER")
    p.add_argument("--out", default=f"{OUTPUTS}/evaluations/codecs", metavar="FOLDER", help="table.json, rows.json, "
                   "report.html and parts/ of what is scored (default %(default)s)")
    p.add_argument("--inline", action="store_true", help="in this one process, without Ray; the bits are the same")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")


def add_publish(p: argparse.ArgumentParser) -> None:
    """The options of `publish`."""
    p.add_argument("inputs", nargs="*", metavar="INPUT", help="held-out audio files, or folders; default: a synthetic sound")
    p.add_argument("--codec", required=True, metavar="CODEC", help="a codec build or a run's index, of a codec trained here")
    p.add_argument("--out", required=True, metavar="FOLDER", help="where to write export/ and recipe.json")
    p.add_argument("--name", help="write to FOLDER/NAME (default: FOLDER itself)")
    p.add_argument("--force", action="store_true", help="replace another codec there")


def spread(inputs: list[str], clips: int) -> list[str]:
    """At most `clips` audio files, spread evenly over the sorted names: corpora list a speaker's files together."""
    from audiolm.data.containers.layout import ENDINGS
    from audiolm.tokenizers.codec_files import find_files

    found = [path for _, path in find_files(inputs, ENDINGS)]
    return [found[i * len(found) // clips] for i in range(clips)] if len(found) > clips else found


def read_clips(inputs: list[str], clips: int, seconds: float) -> list:
    """wav_T of the first `seconds` of at most `clips` files. Raises ValueError where none can be read."""
    from soundfile import SoundFileError

    from audiolm.data.audio import SAMPLE_RATE_HZ, start_of

    wavs = []
    for path in spread(inputs, clips):
        try:
            wavs.append(start_of(path, round(seconds * SAMPLE_RATE_HZ)))
        except (OSError, ValueError, SoundFileError) as e:
            print(f"left out: {path}: {e}", file=sys.stderr)  # the line below says how many clips it is of
    if not wavs:
        raise ValueError("none of the files can be read: name others")
    return wavs


def evaluate(args: argparse.Namespace) -> int:
    """Prints the table of `eval.codec_table`, and writes it, its rows and a page. Raises ValueError for wrong usage."""
    import time
    from functools import partial

    from audiolm import store
    from audiolm.config.run import ClusterConfig
    from audiolm.data.parallel import Workers, cluster_device
    from audiolm.eval import codec_scores, codec_table
    from audiolm.pipeline.progress import ProgressBoard
    from audiolm.pipeline.ray_cluster import start_ray
    from audiolm.report.results_page import build
    from audiolm.tokenizers.codec_lookup import default_codec

    if args.clips < 1 or args.seconds <= 0:
        raise ValueError(f"--clips {args.clips} and --seconds {args.seconds:g}: both above 0")
    metrics = tuple(args.metrics or codec_scores.METRICS)
    if unknown := set(metrics) - codec_scores.METRICS.keys():
        raise ValueError(f"--metrics {', '.join(sorted(unknown))}: there are {', '.join(codec_scores.METRICS)}")
    try:
        levels = "all" if args.levels == ["all"] else args.levels and list(map(int, args.levels))
    except ValueError:
        raise ValueError(f"--levels {' '.join(args.levels)}: give numbers from 1, or all") from None
    codecs = [codec_scores.codec_system(place, levels) for place in args.codec or [default_codec()]]
    if len({c.name for c in codecs}) < len(codecs):  # builds are called 0001
        codecs = [codec_scores.codec_system(place, levels, place) for place in args.codec]
    systems, absent = codec_scores.systems_beside(codecs, args.lyra)
    clips = codec_scores.file_clips(spread(args.inputs, args.clips), args.seconds, args.speaker)

    out, cluster, board, began = store.absolute(args.out), ClusterConfig(device=args.device), ProgressBoard(), time.monotonic()
    if not args.inline:
        start_ray(cluster, out, board.say)
    board.start("evaluate")
    scoring = codec_scores.Scoring(metrics, args.asr and store.absolute(args.asr), cluster_device(cluster, args.inline))
    table = codec_table.measure(clips, systems, absent, scoring, store.join(out, "parts"),
                                Workers(args.inline, "evaluate", partial(board.update, "evaluate")), cluster)
    rows = codec_table.results(table)
    store.put_json(store.join(out, "table.json"), table)
    store.put_json(store.join(out, "rows.json"), [r.to_json() for r in rows])
    store.put(store.join(out, "report.html"), build("Codecs", [("value", rows, [])]).encode())
    board.end("evaluate", "DONE", time.monotonic() - began, f"{len(rows)} rows")
    for clip, why in table["left_out"].items():
        print(f"left out: {clip}: {why}", file=sys.stderr)
    print(f"{codec_table.as_text(table)}\nreport: {store.join(out, 'report.html')}")
    return 0


def publish(args: argparse.Namespace) -> int:
    """Writes the float16 codec and prints its size, its hash and the share of codes that are the build's."""
    from audiolm import store
    from audiolm.tokenizers.publish import publish as publish_codec
    from audiolm.tokenizers.semantic import golden_clip

    # 20 clips of 8 s: as many as `evaluate` takes, 8,000 frames.
    wavs = read_clips(args.inputs, 20, 8.0) if args.inputs else [golden_clip()[0].numpy()]
    made = publish_codec(args.codec, store.join(args.out, args.name) if args.name else args.out, wavs, args.force)
    print(f"codec {made.hash} in {made.path}: {made.size / 1e6:.2f} MB in float16, {made.original_size / 1e6:.2f} MB before")
    print(f"equal codes: {100 * made.equal:.2f} % of {made.codes}, {100 * made.equal_first:.2f} % on the first level, on "
          + (f"{len(wavs)} clips" if args.inputs else "a synthetic sound"))
    print("recipe.json: the build's, without paths" if made.recipe else "recipe.json: left out, the build has none")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 some files failed, 2 wrong usage, 130 stopped."""
    args = parser().parse_args(argv)  # before torch is imported, so that --help is quick
    from audiolm.pipeline.cli import run_command

    return run_command(lambda: run(args), "stopped; the same command continues with the remaining files")


def run(args: argparse.Namespace) -> int:
    """Encodes, decodes or evaluates; 1 where some files failed. Raises ValueError for wrong usage, with nothing written."""
    from audiolm.data.containers.layout import ENDINGS
    from audiolm.data.parallel import pick_device
    from audiolm.tokenizers import codec_files
    from audiolm.tokenizers.codec_lookup import DEFAULT_RUN, default_codec, open_codec

    if args.do == "publish":
        return publish(args)
    if args.do == "evaluate":
        return evaluate(args)
    device = pick_device(args.device)
    place = args.codec or default_codec()
    codec = open_codec(place, device)
    if not args.codec and place != DEFAULT_RUN:
        print(f"there is no {DEFAULT_RUN}: the published codec {place} is used", flush=True)
    if args.levels is not None and not 1 <= args.levels <= codec.spec.n_q:
        raise ValueError(f"--levels {args.levels}: this codec has 1 to {codec.spec.n_q}")
    # Encode reads audio and writes codes; decode the other way round.
    suffixes, ending = (ENDINGS, codec_files.CODES) if args.do == "encode" else ((codec_files.CODES,), f".{args.format}")
    jobs = codec_files.plan(args.inputs, suffixes, args.out, ending)

    # From here on a bad file is reported by `work` and the others go on.
    def do(job: codec_files.FileJob, tick: codec_files.Tick) -> codec_files.FileResult | None:
        if args.do == "encode":
            return codec_files.encode_file(codec, job, args.levels or codec.spec.n_q, args.force, tick)
        return codec_files.decode_file(codec, job, args.levels, args.format, args.force, tick)

    print(f"codec {codec.spec.name} {codec.hash} on {device}: {len(jobs)} files to {args.out}", flush=True)
    return 1 if codec_files.work(jobs, do) else 0


if __name__ == "__main__":
    sys.exit(main())
