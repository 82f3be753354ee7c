"""Audio files through a codec: to codes files, back to sound, and measured beside Opus and Lyra; publishes a codec.

    python workflows/codec.py encode recordings/ --out codes/
    python workflows/codec.py decode codes/ --out again/ --levels 4
    python workflows/codec.py evaluate recordings/ --clips 20 --seconds 8
    python workflows/codec.py encode s3://bucket/talk.mp3 --codec s3://bucket/outputs/runs/speech.json --out codes/
    python workflows/codec.py encode recordings/ --codec speech-16k --out codes/
    python workflows/codec.py publish --codec outputs/runs/speech.json --out audiolm/pretrained --name speech-16k
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


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
    evaluate = do.add_parser("evaluate", help="quality against bit rate, beside Opus and Lyra", description="Prints PESQ, "
                             "ViSQOL, STOI, SI-SDR, mel distance and WER of the codec at some numbers of levels and of Opus "
                             "(and Lyra v2 with --lyra) on the same clips. WER is against what the recogniser hears in the "
                             "original.")
    add_publish(do.add_parser("publish", help="a trained codec as float16 weights to ship", description="Writes the export of "
                              "a codec build in float16, and its recipe, as a folder that --codec and audiolm.load_codec take. "
                              "Compares its codes with the build's on the INPUTs or on a synthetic sound."))
    published = ", ".join(pretrained.names()) or "none here"
    sounds = f"audio files, or folders to search for {', '.join(ENDINGS)}"
    for sub, kind in ((encode, sounds), (decode, "codes files, or folders to search for .safetensors"),
                      (evaluate, f"held-out {sounds}")):
        sub.add_argument("inputs", nargs="+", metavar="INPUT", help=f"{kind}; a local path or any fsspec URI (s3://...)")
        sub.add_argument("--codec", metavar="CODEC", help=f"a published codec's name ({published}), a codec build, a run's "
                         "index (OUTPUTS/runs/NAME.json) or the folder of an imported codec; default: the codec of "
                         f"./outputs/runs/quickstart.json, without that run the published codec {pretrained.DEFAULT_CODEC}")
        sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")
    for sub in (encode, decode):
        sub.add_argument("--out", required=True, metavar="FOLDER",
                         help="where to write; a file keeps its path below the INPUT folder, with another ending")
        sub.add_argument("--levels", type=int, metavar="N", help="take the first N levels alone: fewer bits, rougher sound")
        sub.add_argument("--force", action="store_true", help="make files again that are done already")
    decode.add_argument("--format", choices=("wav", "flac"), default="wav", help="of the audio files (default wav)")
    evaluate.add_argument("--clips", type=int, default=20, metavar="N", help="files, spread evenly over what is found")
    evaluate.add_argument("--seconds", type=float, default=8.0, metavar="S", help="of each file, from its start")
    evaluate.add_argument("--levels", type=int, nargs="+", metavar="N", help="default: one, 2 kb/s, half, all")
    evaluate.add_argument("--lyra", metavar="FOLDER", help="Lyra v2's three tflite models, for rows of it")
    evaluate.add_argument("--json", metavar="FILE", help="write the table there too")
    return p


def add_publish(p: argparse.ArgumentParser) -> None:
    """The options of `publish`."""
    p.add_argument("inputs", nargs="*", metavar="INPUT", help="held-out audio files, or folders; default: a synthetic sound")
    p.add_argument("--codec", required=True, metavar="CODEC", help="a codec build or a run's index, of a codec trained here")
    p.add_argument("--out", required=True, metavar="FOLDER", help="where to write export/ and recipe.json")
    p.add_argument("--name", help="write to FOLDER/NAME (default: FOLDER itself)")
    p.add_argument("--force", action="store_true", help="replace another codec there")


def read_clips(inputs: list[str], clips: int, seconds: float) -> list:
    """wav_T of the first `seconds` of at most `clips` files. Raises ValueError where none can be read."""
    from soundfile import SoundFileError

    from audiolm.data.audio import SAMPLE_RATE_HZ, start_of
    from audiolm.data.containers.layout import ENDINGS
    from audiolm.tokenizers.codec_files import find_files

    found, samples = find_files(inputs, ENDINGS), round(seconds * SAMPLE_RATE_HZ)
    # Evenly spread over the sorted names: corpora list a speaker's files together.
    picked = [found[i * len(found) // clips] for i in range(clips)] if len(found) > clips else found
    wavs = []
    for _, path in picked:
        try:
            wavs.append(start_of(path, samples))
        except (OSError, ValueError, SoundFileError) as e:
            print(f"left out: {path}: {e}", file=sys.stderr)  # the table says how many clips it is of
    if not wavs:
        raise ValueError("none of the files can be read: name others")
    return wavs


def evaluate(codec, args: argparse.Namespace, device: str) -> int:
    """Prints `eval.codec_quality.compare` of the clips, which are the first --seconds of --clips files."""
    from audiolm import store
    from audiolm.eval.codec_quality import compare, format_table
    from audiolm.eval.codec_wer import Spoken
    from audiolm.eval.models.baseline_codecs import baselines

    wavs = read_clips(args.inputs, args.clips, args.seconds)
    table = compare(codec, wavs, baselines(args.lyra), args.levels, spoken=Spoken(wavs, device=device))
    print(format_table(table))
    if args.json:
        store.put(args.json, json.dumps(table, indent=1).encode())
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
    if args.do == "evaluate" and args.clips < 1:
        raise ValueError(f"--clips {args.clips}: at least one")
    device = pick_device(args.device)
    place = args.codec or default_codec()
    codec = open_codec(place, device)
    if not args.codec and place != DEFAULT_RUN:
        print(f"there is no {DEFAULT_RUN}: the published codec {place} is used", flush=True)
    if args.do == "evaluate":
        return evaluate(codec, args, device)
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
