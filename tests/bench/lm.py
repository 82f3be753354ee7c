"""How fast a language-model stage trains here: whole steps of its objective, optimizer included; nothing is asserted.

    python tests/bench/lm.py                                          a tiny model on the CPU
    python tests/bench/lm.py --device cuda --engines torch deepspeed  the paper's 12 x 1024, bfloat16, compiled

Rows of 768 tokens are stage 1's, of 2,298 stage 2's (767 where positions are frames: --kinds frame), all packed with random
clips of --clip-s seconds at most.  Targets are codes, of which a frame's position predicts several.  A step is
what is left of the fastest of --repeats; FLOPs are counted as 6 N + 6 L d T and set beside the measured rate of a matmul.
"""

from __future__ import annotations

import argparse
import resource
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from audiolm.config.lm import LMConfig, StageConfig
from audiolm.config.training import TrainConfig  # noqa: E402
from audiolm.data.tokens import RATIO  # noqa: E402
from audiolm.lm import stages  # noqa: E402
from audiolm.lm.batches import pack_rows  # noqa: E402
from audiolm.lm.frames import packed_frames  # noqa: E402
from audiolm.lm.layouts import build_stages  # noqa: E402
from audiolm.train.engine import make_engine  # noqa: E402
from audiolm.train.objectives.base import Context  # noqa: E402
from audiolm.train.objectives.lm import LMObjective  # noqa: E402
from tests.bench.timing import best  # noqa: E402

CROPS_S = {"lm_semantic": 30.64, "lm_coarse": 10.2}
PAPER, TINY = {"dim": 1024, "layers": 12, "heads": 16, "ff": 4096}, {"dim": 64, "layers": 2, "heads": 4, "ff": 256}


class Random:
    """Packed rows of random tokens, made once: what is timed is the step."""

    def __init__(self, stage: stages.Stage, rows: int, clip_s: float):
        draw, T = np.random.default_rng(0), stage.max_len
        each, made = (T - 2) // stage.crop_frames, []  # ids of a semantic frame
        for _ in range(rows):
            at, documents = 0, []
            while (fits := (T - at - 3) // each) > 4:
                frames = min(int(draw.uniform(0.3, 1) * clip_s * stages.SEMANTIC_HZ), fits)
                codes_TQ = draw.integers(0, stage.vocab, (RATIO * frames, len(stage.columns)))
                documents.append(stage.pack(draw.integers(0, stage.k, frames), codes_TQ, True))
                at += len((packed_frames(stage, documents[-1]) if stage.frames else documents[-1]).ids)
            made.append(documents)
        self.made = pack_rows(stage, made, T)

    def batch(self, step, rows):
        return {name: x[list(rows)] for name, x in self.made.items()}


def matmul_rate(device: str) -> float:
    """FLOP/s of large products in the training's dtype."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / best(lambda: a @ b, 10, device)


def training(name: str, kind: str, args: argparse.Namespace, positions: str, engine: str, rate: float) -> None:
    gpu = args.device == "cuda"
    train = TrainConfig(steps=1, batch=args.rows, lr=1e-4, engine=engine, zero=args.zero,
                        dtype="bfloat16" if gpu else "float32")
    shape = StageConfig(crop_s=CROPS_S[name], positions=positions, train=train, checkpointing=args.checkpointing,
                        gated=args.gated, kind=kind, **(PAPER if gpu or args.paper else TINY))
    stage = build_stages(LMConfig(**{name.removeprefix("lm_"): shape}), 12, 1024, 1024)[name]
    ctx = Context(0, 1, torch.device(args.device), 0, compile=gpu and not args.eager)
    objective = LMObjective(stage, shape, Random(stage, args.rows, args.clip_s), None, [], ctx)
    lm = make_engine(objective.modules["lm"], train, ctx)
    lm.set_lr(1e-4)
    batch = objective.load(0, range(args.rows))
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    took = best(lambda: objective.train_step({"lm": lm}, [batch], 0), args.repeats, args.device)
    targets, tokens = batch["count_2"].tolist()
    peak = torch.cuda.max_memory_allocated() if gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    parameters = sum(p.numel() for p in objective.modules["lm"].parameters())
    print(f"{name:12} {kind:5} {args.rows} x {stage.max_len:5,} {positions:7} {engine:10} {parameters / 1e6:7.1f} M parameters "
          f"{tokens / took:11,.0f} tokens/s ({tokens / args.rows / stage.max_len:.1%} of the slots)  "
          f"{targets / took:11,.0f} targets/s  {peak / 2**30:5.1f} GiB  "
          f"MFU {objective.flops_per_unit * tokens / took / rate:.1%}", flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--paper", action="store_true", help="the paper's width on a CPU too")
    p.add_argument("--rows", type=int, help="of a step; default 16 on a GPU, 2 on a CPU")
    p.add_argument("--clip-s", type=float, default=15.0, help="longest clip; above 31 every row is one")
    p.add_argument("--positions", nargs="+", choices=("rotary", "t5"), default=["rotary", "t5"])
    p.add_argument("--kinds", nargs="+", choices=("flat", "frame"), default=["flat"], help="of stage 2")
    p.add_argument("--engines", nargs="+", choices=("torch", "deepspeed"), default=["torch"])
    p.add_argument("--zero", type=int, default=1)
    p.add_argument("--repeats", type=int, default=5)
    for flag in ("eager", "checkpointing", "gated"):
        p.add_argument(f"--{flag}", action="store_true")
    args = p.parse_args()
    gpu = args.device == "cuda"
    args.rows = args.rows or (16 if gpu else 2)
    rate = matmul_rate(args.device)
    name = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU thread(s)"
    print(f"torch {torch.__version__}, {name}, matmul {rate / 1e12:.3g} TFLOP/s", flush=True)
    for engine in args.engines:
        for positions in args.positions:
            for stage, kind in (("lm_semantic", "flat"), *(("lm_coarse", kind) for kind in args.kinds)):
                training(stage, kind, args, positions, engine, rate)


if __name__ == "__main__":
    main()
