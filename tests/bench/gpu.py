"""Everything that only a GPU can prove, in one command that ends in time.

    python tests/bench/gpu.py --minutes 13 --out DIR                    the paper's sizes, on a GPU
    python tests/bench/gpu.py --minutes 2 --out DIR --tiny              the same at tiny sizes, on a CPU too
    python tests/bench/gpu.py --minutes 13 --out DIR --config my.yaml --train lm_coarse,lm_decoder store=DIR
    python tests/bench/gpu.py --unpack DIR --store STORE                takes home what the third command trained

Parts, in order of worth, each in processes of its own and bounded in time: (a) equality, (b) training steps, (c) generation,
(d) codec and tokenizers, (e) with what is left the steps --train of a pipeline, from their newest checkpoints, saved every
minute.  A part that fails is reported and the next one runs.  DIR gets gpu.json and gpu.md, a table with the anchors,
gpu.log with all that was printed, and the pieces of (e), below 16 MB each.
What a machine must have: Python 3.11 or later, torch with its own dependencies, numpy, pydantic, pyyaml, fsspec, pyarrow,
safetensors, psutil, pytest.  The rows of DeepSpeed also need deepspeed, einops, hjson, msgpack, packaging and tqdm; HuBERT's
transformers and scipy; those of files, and training on sound, soundfile and soxr.  Ray, MLflow and all else of
pyproject.toml are not needed; an item without its modules is reported as failed.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.gpu_parts import published, worker  # noqa: E402
from tests.bench.gpu_parts.report import Report  # noqa: E402

HERE = "tests.bench.gpu_parts"
PARTS = {"a": (f"{HERE}.equality", 0.15), "b": (f"{HERE}.training", 0.3), "c": (f"{HERE}.sampling", 0.2),
         "d": (f"{HERE}.coding", 0.2)}  # each with its share of the time


def machine(device: str) -> dict[str, str]:
    """What the figures were measured on."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "torch": f"torch {torch.__version__}", "cuda": f"CUDA {torch.version.cuda}",
            "python": f"Python {platform.python_version()}"}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=__doc__.partition("\n\n")[2],
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("overrides", nargs="*", metavar="a.b=c", help="of --config")
    p.add_argument("--minutes", type=float, default=13.0, help="for everything")
    p.add_argument("--out", metavar="DIR")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    p.add_argument("--tiny", action="store_true", help="tiny sizes: a test of this command, not of the machine")
    p.add_argument("--parts", default="abcde", metavar="abcde", help="only these")
    p.add_argument("--config", metavar="YAML", help="of part e: a pipeline with its store")
    p.add_argument("--train", default="", metavar="STEPS", help="of part e: its training steps, in order")
    p.add_argument("--unpack", metavar="DIR", help="puts the pieces of an earlier --out into --store, and stops")
    p.add_argument("--store", metavar="DIR")
    for name in ("part", "skip", "lines"):  # a worker's
        p.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = p.parse_intermixed_args()
    if args.unpack:
        return print(f"{published.unpack(args.unpack, args.store)} files written to {args.store}")
    if args.part:
        return worker.work(args.part, int(args.skip), args.lines, args.device, args.tiny)
    if not args.out:
        p.error("--out says where the results go")
    import torch

    device, deadline = args.device or ("cuda" if torch.cuda.is_available() else "cpu"), time.monotonic() + 60 * args.minutes
    if device == "cpu" and not args.tiny:
        p.error("the paper's sizes take hours on a CPU: add --tiny, or run this where torch sees a GPU")
    report = Report(args.out, machine(device), compared=not args.tiny)
    log = Path(args.out) / "gpu.log"
    for letter, (part, share) in PARTS.items():
        if letter in args.parts:
            seconds = min(60 * args.minutes * share, deadline - time.monotonic())
            worker.watch(part, device, args.tiny, report, letter, seconds, log)
    if "e" in args.parts:
        published.train(args.config, args.overrides, args.train, report, deadline, log)
    print(report.table(), flush=True)
    sys.exit(0 if report.good else 1)


if __name__ == "__main__":
    main()
