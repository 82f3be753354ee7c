"""Which seconds of a sound were generated, as the detector of a run's tables hears it.

    python workflows/detect.py a.wav b.flac
    python workflows/detect.py calls/ --run s3://bucket/audiolm/runs/speech.json --json judged.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parser() -> argparse.ArgumentParser:
    from audiolm.pipeline.cli import add_run_options

    p = argparse.ArgumentParser(prog="detect.py", description="Prints each file's mean probability that its seconds were "
                                "generated, and that of every second. The detector knows the models of its own run alone.")
    p.add_argument("inputs", nargs="+", metavar="PATH", help="audio files of any rate, or folders of them; local or any fsspec "
                   "URI")
    add_run_options(p)
    p.add_argument("--detector", metavar="FOLDER", help="a trained detector's own folder, instead of a run's")
    p.add_argument("--json", metavar="FILE", help="write the probabilities there too")
    return p


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 some files could not be judged, 2 wrong usage, 130 stopped."""
    args = parser().parse_args(argv)
    from audiolm import store
    from audiolm.dag.run_index import steps_of
    from audiolm.data.audio import start_of
    from audiolm.data.audio_check import audio_errors, check_audio, error_line
    from audiolm.data.sources import AUDIO
    from audiolm.eval.suites.detector import of_run, score_windows
    from audiolm.tokenizers.codec_files import find_files
    from audiolm.tracking.lookup import find_run

    judged, failed = {}, 0
    try:
        path = args.detector or of_run(steps_of(find_run(args.run, args.store, args.tracking)))
        for _, file in find_files(args.inputs, AUDIO):
            try:
                check_audio(file)
                with audio_errors(file):
                    wav_T = start_of(file, None)
                p_S = score_windows(path, wav_T)
            except (ValueError, FileNotFoundError) as e:
                failed += 1
                print(f"error: {error_line(file, e)}", file=sys.stderr)
                continue
            judged[file] = [round(float(p), 4) for p in p_S]
            print(f"{p_S.mean():6.1%}  {file}  {' '.join(f'{p:.2f}' for p in p_S)}", flush=True)
    except KeyboardInterrupt:
        return 130
    except (ValueError, FileNotFoundError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    if args.json:
        store.put(args.json, json.dumps(judged, indent=1).encode())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
