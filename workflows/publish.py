"""A trained run as a published system: the exports of its steps in float16, in one folder that loads by its name.

    python workflows/publish.py small --store /data/audiolm --out audiolm/pretrained held-out/
    python workflows/generate.py --run audiolm/pretrained/small/small.json --prompt clip.wav --out generated
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parser() -> argparse.ArgumentParser:
    from audiolm.dag.run_index import OUTPUTS

    p = argparse.ArgumentParser(prog="publish.py", description="Writes the tokenizers and language models of a finished run in "
                                "float16, with an index of relative paths. What lies in audiolm/pretrained is known by its "
                                "name: audiolm.load(NAME), --run NAME.")
    p.add_argument("run", metavar="RUN", help="a run's name, its index (OUTPUTS/runs/NAME.json) or its MLflow run id")
    p.add_argument("inputs", nargs="+", metavar="INPUT", help="held-out audio files, or folders, whose tokens are compared")
    p.add_argument("--store", default=OUTPUTS, metavar="URI", help="where a run's name is looked up (default %(default)s)")
    p.add_argument("--tracking", metavar="URI", help="the MLflow server of a run id")
    p.add_argument("--out", required=True, metavar="FOLDER", help="where to write the folder NAME")
    p.add_argument("--name", help="of the published system (default: the run's)")
    p.add_argument("--force", action="store_true", help="replace a folder that is there; its README.md stays")
    return p


def publish(args: argparse.Namespace) -> int:
    from audiolm.data.audio import SAMPLE_RATE_HZ, start_of
    from audiolm.data.containers.layout import ENDINGS
    from audiolm.generate.publish import publish_system
    from audiolm.tokenizers.codec_files import find_files
    from audiolm.tracking.lookup import find_run

    index = find_run(args.run, args.store, args.tracking)
    wavs = [start_of(path, 8 * SAMPLE_RATE_HZ) for _, path in find_files(args.inputs, ENDINGS)[:8]]
    done = publish_system(index, args.out, args.name or index.rsplit("/", 1)[-1].removesuffix(".json"), wavs, args.force)
    print(f"{done.path}: {done.size / 1e6:.1f} MB; of {len(wavs)} clips {100 * done.equal_tokens:.1f} % of the semantic tokens "
          f"and {100 * done.equal_codes:.1f} % of the codes are the run's")
    return 0


if __name__ == "__main__":
    from audiolm.pipeline.cli import run_command

    args = parser().parse_args()
    sys.exit(run_command(lambda: publish(args)))
