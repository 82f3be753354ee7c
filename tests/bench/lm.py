"""How fast a language-model stage trains here: whole steps of its objective, optimizer included; nothing is asserted.

    python tests/bench/lm.py                                          a tiny model on the CPU
    python tests/bench/lm.py --device cuda --engines torch deepspeed  the paper's 12 x 1024, bfloat16, compiled

Rows of 768 tokens are stage 1's, of 2,298 stage 2's (767 where positions are frames: --kinds frame), of 1,844 stage 3's, all
packed with random clips of --clip-s seconds at most; the parallel decoder's are crops of 10 s, 500 frames.  Targets are
codes, of which a frame's position predicts several.  A step is what is left of the fastest of --repeats; FLOPs are counted as
6 N + 6 L d T and set beside the measured rate of a matmul.
"""

from __future__ import annotations

import argparse
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from audiolm.config.lm import LMConfig, ParallelConfig, StageConfig  # noqa: E402
from audiolm.config.training import TrainConfig  # noqa: E402
from audiolm.data.tokens import RATIO  # noqa: E402
from audiolm.lm import parallel, stages  # noqa: E402
from audiolm.lm.batches import pack_rows  # noqa: E402
from audiolm.lm.frames import packed_frames  # noqa: E402
from audiolm.lm.layouts import build_stages  # noqa: E402
from audiolm.train.engine import make_engine  # noqa: E402
from audiolm.train.objectives.base import Context, Objective  # noqa: E402
from audiolm.train.objectives.lm import LMObjective  # noqa: E402
from audiolm.train.objectives.parallel import ParallelObjective  # noqa: E402
from tests.bench.figures import Figure  # noqa: E402
from tests.bench.timing import best  # noqa: E402

CROPS_S = {"semantic": 30.64, "coarse": 10.2, "fine": 3.0, "parallel": 10.0}
PAPER, TINY = ({"dim": 1024, "layers": 12, "heads": 16, "ff": 4096}, {"dim": 64, "layers": 2, "heads": 4, "ff": 256})


@dataclass(frozen=True)
class Setting:
    """What all rows of a table share; None: by the device."""

    device: str = "cpu"
    rows: int | None = None  # of a step: 16 on a GPU, 2 on a CPU
    clip_s: float = 15.0
    paper: bool | None = None  # the paper's width, or a tiny one
    dtype: str | None = None
    zero: int = 1
    repeats: int = 5
    eager: bool = False
    checkpointing: bool = False
    gated: bool = False

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def batch(self) -> int:
        return self.rows or (16 if self.gpu else 2)

    @property
    def sizes(self) -> dict[str, int]:
        return PAPER if self.gpu and self.paper is None or self.paper else TINY

    def train(self, engine: str) -> TrainConfig:
        return TrainConfig(steps=1, batch=self.batch, lr=1e-4, engine=engine, zero=self.zero,
                           dtype=self.dtype or ("bfloat16" if self.gpu else "float32"))


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


class RandomCrops:
    """Random crops for the parallel decoder, in place of TokenBatches."""

    def __init__(self, stage: stages.Stage, rows: int):
        draw, T = np.random.default_rng(0), stage.crop_frames
        self.crops = [(draw.integers(0, stage.k, T), draw.integers(0, stage.vocab, (RATIO * T, stage.slots)))
                      for _ in range(rows)]

    def expect(self, step, rows):
        pass

    def spans(self, step, row):
        return [(row,)]

    def read(self, row):
        return self.crops[row]


def objective_of(name: str, s: Setting, engine: str = "torch", kind: str = "flat", positions: str = "rotary") -> Objective:
    """The objective of a stage, or of the parallel decoder, on random tokens: 12 levels of 1,024 codes, 4 of them coarse."""
    ctx = Context(0, 1, torch.device(s.device), 0, compile=s.gpu and not s.eager)
    levels, vocab = (12, 1024) if s.sizes is PAPER else (6, 64)
    if name == "parallel":
        shape = ParallelConfig(crop_s=CROPS_S[name], train=s.train(engine), **s.sizes)
        stage = parallel.parallel_stage(LMConfig(parallel=shape), levels, vocab, vocab)
        return ParallelObjective(stage, shape, RandomCrops(stage, s.batch), None, [], ctx)
    shape = StageConfig(crop_s=CROPS_S[name], positions=positions, train=s.train(engine), checkpointing=s.checkpointing,
                        gated=s.gated, kind=kind, **s.sizes)
    stage = build_stages(LMConfig(**{name: shape}), levels, vocab, vocab)[f"lm_{name}"]
    return LMObjective(stage, shape, Random(stage, s.batch, s.clip_s), None, [], ctx)


def training(name: str, s: Setting, rate: float, engine: str = "torch", kind: str = "flat",
             positions: str = "rotary") -> list[Figure]:
    """Tokens (or frames) and targets a second of whole steps, memory and share of the matmul `rate`."""
    objective = objective_of(name, s, engine, kind, positions)
    lm = make_engine(objective.modules["lm"], s.train(engine), objective.ctx)
    lm.set_lr(1e-4)
    batch = objective.load(0, range(s.batch))
    if s.gpu:
        torch.cuda.reset_peak_memory_stats()
    took = best(lambda: objective.train_step({"lm": lm}, [batch], 0), s.repeats, s.device)
    targets, tokens = batch["count_2"].tolist()
    peak = torch.cuda.max_memory_allocated() if s.gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    what = f"train {name}{'' if kind == 'flat' else ', frames'}{'' if positions == 'rotary' else f', {positions}'}, {engine}"
    return [Figure(what, tokens / took, f"{objective.unit}/s"), Figure(f"{what}: targets", targets / took, "targets/s"),
            Figure(f"{what}: memory", peak / 2**30, "GiB"),
            Figure(f"{what}: MFU", objective.flops_per_unit * tokens / took / rate, "")]


def matmul_rate(device: str) -> float:
    """FLOP/s of large products in the training's dtype."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / best(lambda: a @ b, 10, device)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--paper", action="store_true", default=None, help="the paper's width on a CPU too")
    p.add_argument("--rows", type=int, help="of a step; default 16 on a GPU, 2 on a CPU")
    p.add_argument("--clip-s", type=float, default=15.0, help="longest clip; above 31 every row is one")
    p.add_argument("--positions", nargs="+", choices=("rotary", "t5"), default=["rotary", "t5"])
    p.add_argument("--kinds", nargs="+", choices=("flat", "frame"), default=["flat"], help="of stage 2")
    p.add_argument("--stages", nargs="+", choices=tuple(CROPS_S), default=["semantic", "coarse"])
    p.add_argument("--engines", nargs="+", choices=("torch", "deepspeed"), default=["torch"])
    p.add_argument("--zero", type=int, default=1)
    p.add_argument("--repeats", type=int, default=5)
    for flag in ("eager", "checkpointing", "gated"):
        p.add_argument(f"--{flag}", action="store_true")
    args = vars(p.parse_args())
    positions, kinds, names, engines = (args.pop(n) for n in ("positions", "kinds", "stages", "engines"))
    setting = Setting(**args)
    rate = matmul_rate(setting.device)
    device = torch.cuda.get_device_name() if setting.gpu else f"{torch.get_num_threads()} CPU thread(s)"
    print(f"torch {torch.__version__}, {device}, matmul {rate / 1e12:.3g} TFLOP/s", flush=True)
    for engine in engines:
        for name in names:
            for kind in kinds if name == "coarse" else ("flat",):
                for position in ("rotary",) if name == "parallel" else positions:
                    print(*training(name, setting, rate, engine, kind, position), sep="\n", flush=True)


if __name__ == "__main__":
    main()
