"""Part (a): a GPU computes what a CPU computes, and the fast ways what the plain ones do; each figure has its bound."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch

from audiolm import load_codec
from audiolm.generate import graphs as sampling_graphs
from audiolm.models.conformer import Encoder, EncoderSizes
from audiolm.models.lm.attention import attend, documents, mask_of
from audiolm.tokenizers.extractor import ConformerExtractor, Window
from audiolm.tokenizers.semantic import SemanticTokenizer
from audiolm.train.engine import make_engine
from tests.bench.figures import Figure
from tests.bench.generation import random_system
from tests.bench.lm import Setting, objective_of
from tests.worlds.training import Gradients

BF16 = 0.02  # relative error of a sum of products whose factors have 8 bits
STAGES = ("semantic", "coarse", "fine", "parallel")


def items(device: str, tiny: bool) -> dict[str, Callable[[], Iterator[Figure]]]:
    s = Setting(device=device, rows=2 if tiny else 4, paper=not tiny, eager=True)
    return {"flash attention against a mask": lambda: attention(device, tiny),
            "sampling graphs against plain steps": lambda: graphs(device, tiny),
            "bfloat16 against float32": lambda: precision(s),
            "codes of a CPU": lambda: codes(device, tiny),
            "semantic tokens of a CPU": lambda: tokens(device, tiny),
            "DeepSpeed against torch": lambda: engines(s)}


def error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative error in the Euclidean norm."""
    ours, reference = ours.double().cpu(), reference.double().cpu()
    return float((ours - reference).norm() / reference.norm())


def attention(device: str, tiny: bool) -> Iterator[Figure]:
    """Packed documents: output and gradients of the operator of training, in bfloat16, against a mask in float32."""
    torch.manual_seed(0)
    rows, T, heads, width = (2, 96, 2, 32) if tiny else (4, 768, 16, 64)
    doc_BT = torch.randint(0, 40, (rows, T)).eq(0).cumsum(1)
    docs = documents(doc_BT, flash=True)
    x = torch.randn(3, rows, T, heads, width, device=device)
    weight = torch.randn(rows, T, heads * width, device=device)

    def run(dtype: torch.dtype, mask: torch.Tensor | None, bounds: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        qkv = x.clone().to(dtype).requires_grad_()
        out = attend(*qkv.unbind(), mask, bounds)
        (out.float() * weight).sum().backward()
        return out.detach(), qkv.grad

    dense = run(torch.float32, mask_of(doc_BT.to(device)), None)
    flash = run(torch.bfloat16, None, docs.bounds_N.to(device))
    yield Figure("flash attention, relative error", error(flash[0], dense[0]), "", most=BF16)
    yield Figure("flash attention, error of gradients", error(flash[1], dense[1]), "", most=BF16)


def graphs(device: str, tiny: bool) -> Iterator[Figure]:
    """Ids drawn by CUDA graphs, and by the same steps one kernel after another: 32 rows, then 8 in the same memory, beyond 256
    keys; and ids of compiled steps, whose rounding is another one."""
    rows, frames = ((3, 2), 12) if tiny else ((32, 8), 70)
    for kind in ("flat", "frame"):
        drawn = {name: _drawn(device, tiny, kind, rows, frames, warm_up, compiled) for name, warm_up, compiled in (
            ("graph", sampling_graphs.WARM_UP, False), ("plain", 10**9, False), ("compiled", sampling_graphs.WARM_UP, True))}
        equal = {name: float((ids == drawn["plain"]).mean()) for name, ids in drawn.items()}
        yield Figure(f"equal ids of a graph, {kind}", equal["graph"], "", least=1.0)
        yield Figure(f"equal ids of compiled steps, {kind}", equal["compiled"], "")


def _drawn(device: str, tiny: bool, kind: str, rows: tuple[int, ...], frames: int, warm_up: int, compiled: bool) -> np.ndarray:
    """Ids of the coarse stage of a random system, call after call."""
    before, sampling_graphs.WARM_UP = sampling_graphs.WARM_UP, warm_up
    try:
        torch.manual_seed(0)
        system = random_system(device, kind, *(("scratch.yaml", 2) if tiny else ("paper.yaml",)))
        (_, stage), sampler, z = system.models["coarse"], system._samplers["coarse"], np.arange(frames // 2)
        if compiled:
            sampler.compile(*(("eager",) if tiny else ()))
        z = z % stage.k
        return np.concatenate([ids for n in rows for ids in sampler(
            [stage.prompt(z)] * n, frames * stage.slots, seeds=range(n),
            cond=[stage.conditions(z)] * n if stage.aligned else None)])
    finally:
        sampling_graphs.WARM_UP = before


def precision(s: Setting) -> Iterator[Figure]:
    """Loss and gradients of a step of each stage in bfloat16, against float32 at the same weights."""
    for name in STAGES:
        made = {}
        for dtype in ("float32", "bfloat16"):
            torch.manual_seed(0)
            objective = objective_of(name, replace(s, dtype=dtype))
            for module in objective.modules.values():
                module.to(s.device)
                for part in module.modules():  # other dropout masks would be other losses
                    if hasattr(part, "dropout"):
                        part.dropout = 0.0
                    if isinstance(part, torch.nn.Dropout):
                        part.p = 0.0
            engine = Autocast(objective.modules["lm"], s.device, dtype)
            loss = objective.train_step({"lm": engine}, [objective.load(0, range(s.batch))], 0)["loss"]
            made[dtype] = float(loss), engine.taken
        (loss, gradient), (half_loss, half_gradient) = made["float32"], made["bfloat16"]
        yield Figure(f"{name} in bfloat16, relative error of the loss", abs(half_loss / loss - 1), "", most=0.01)
        yield Figure(f"{name} in bfloat16, error of gradients", error(half_gradient, gradient), "", most=0.1)


class Autocast(Gradients):
    """An engine that keeps the gradients, changes nothing and computes in a dtype as the real ones do."""

    def __init__(self, module: torch.nn.Module, device: str, dtype: str):
        super().__init__(module)
        self.device, self.half = torch.device(device).type, dtype == "bfloat16"

    def __call__(self, *args):
        with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            return super().__call__(*args)


def sounds(tiny: bool) -> torch.Tensor:
    """wav_BT of voice-like noise: harmonics of a gliding pitch under a slow envelope."""
    draw = torch.Generator().manual_seed(0)
    rows, seconds = (2, 1) if tiny else (16, 8)
    t = torch.arange(seconds * 16_000) / 16_000
    wav = torch.zeros(rows, len(t))
    for row in wav:
        pitch, glide = (float(torch.rand(1, generator=draw)) for _ in range(2))
        phase = 2 * np.pi * (80 + 120 * pitch) * (t + 0.1 * glide * torch.sin(2 * np.pi * 0.7 * t))
        row += sum(torch.sin(n * phase) / n for n in range(1, 20)) * (0.5 + 0.5 * torch.sin(2 * np.pi * 3 * t)) ** 2
        row += 0.05 * torch.randn(len(t), generator=draw)
    return 0.1 * wav


def codes(device: str, tiny: bool) -> Iterator[Figure]:
    """Codes of the published codec: encoded on the device and on the CPU, and what the device decodes from them."""
    wav_BT = sounds(tiny)
    cpu, other = (load_codec("speech-16k", device=where) for where in ("cpu", device))
    lengths_B = torch.full((len(wav_BT),), wav_BT.shape[1])
    ours, theirs = torch.stack(cpu.encode(wav_BT, lengths_B)), torch.stack(other.encode(wav_BT, lengths_B))
    for level in (0, ours.shape[2] - 1):
        equal = (ours[..., level] == theirs[..., level]).float().mean()
        yield Figure(f"equal codes of level {level + 1}", float(equal), "", least=0.99)
    yield Figure("decoded sound, relative error", error(other.decode(ours), cpu.decode(ours)), "", most=0.05)


def tokens(device: str, tiny: bool) -> Iterator[Figure]:
    """Semantic tokens of a random Conformer on the device, in float32 and bfloat16, against the CPU's."""
    torch.manual_seed(0)
    dim, layers = (32, 2) if tiny else (512, 12)
    encoder, codebook = Encoder(EncoderSizes(dim, layers, 4, 4 * dim)).eval(), torch.randn(500, dim)
    wav_BT = sounds(tiny)
    lengths_B, reference = torch.full((len(wav_BT),), wav_BT.shape[1]), None
    for where, dtype in (("cpu", torch.float32), (device, torch.float32), (device, torch.bfloat16)):
        tokenizer = SemanticTokenizer(ConformerExtractor(copy.deepcopy(encoder)), layers, torch.zeros(dim), torch.ones(dim),
                                      codebook, Window(750, 50), "", where, dtype)
        made = torch.cat(tokenizer.encode(wav_BT, lengths_B))
        if reference is None:
            reference = made
        else:
            name = str(dtype).removeprefix("torch.")
            yield Figure(f"equal semantic tokens, {name}", float((made == reference).float().mean()), "",
                         least=0.98 if dtype == torch.float32 else None)


def engines(s: Setting) -> Iterator[Figure]:
    """Losses of three steps under DeepSpeed and under torch."""
    losses = {}
    for engine in ("torch", "deepspeed"):
        torch.manual_seed(0)
        objective = objective_of("semantic", s, engine)
        lm = make_engine(objective.modules["lm"], s.train(engine), objective.ctx)
        lm.set_lr(1e-4)
        batch = objective.load(0, range(s.batch))
        for step in range(3):
            torch.manual_seed(step)  # dropout
            losses[engine] = float(objective.train_step({"lm": lm}, [batch], step)["loss"])
    yield Figure("DeepSpeed, relative error of the third loss", abs(losses["deepspeed"] / losses["torch"] - 1), "", most=2e-3)
