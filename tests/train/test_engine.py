"""The engines agree with each other and with themselves after a resume, whatever the world size."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from audiolm import rng
from audiolm.config.training import TrainConfig
from audiolm.models.lm.block import TransformerSizes
from audiolm.models.lm.transformer import Transformer
from audiolm.models.soundstream import SoundStream, SoundStreamSizes
from audiolm.train import engine as engines
from audiolm.train.engine import learning_rate, make_engine
from audiolm.train.objectives.base import Context
from tests.worlds.training import of_two_ranks, tiny_lm

ENGINES = [("torch", 0), *(("deepspeed", zero) for zero in range(4))]
NAMES = ["torch", "zero0", "zero1", "zero2", "zero3"]


def run(engine, zero, start, stop, saved=None, updates=0, rank=0, world=1, micro=4, dropout=0.1):
    """Losses of steps start..stop-1 and the canonical state after them."""
    torch.set_num_threads(1)
    engines.WHOLE_NUMEL = 0  # else ZeRO 3 would leave a model of this size whole
    train = TrainConfig(steps=100, batch=8, lr=3e-3, warmup_steps=3, clip=0.5, engine=engine, zero=zero)
    ctx = Context(rank, world, torch.device("cpu"), seed=1)
    objective = tiny_lm({"dropout": dropout}, {}, ctx)
    e = make_engine(objective.modules["model"], train, ctx, saved, updates)
    losses, share = [], 8 // world
    for step in range(start, stop):
        e.set_lr(learning_rate(train, step))
        torch.manual_seed(rng.derive(1, "step", step, rank))
        rows = range(rank * share, (rank + 1) * share)
        batches = [objective.load(step, rows[i:i + micro]) for i in range(0, share, micro)]
        losses.append(float(objective.train_step({"model": e}, batches, step)["loss"]))
    return losses, e.state(), e.updates


@pytest.fixture(scope="module")
def plain():
    return run("torch", 0, 0, 8)


@pytest.mark.parametrize(("engine", "zero"), ENGINES, ids=NAMES)
def test_losses_and_weights_equal_plain_torch(engine, zero, plain):
    losses, state, _ = run(engine, zero, 0, 8)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(plain[0]), rtol=1e-5, atol=1e-5)
    assert state.keys() == plain[1].keys()
    for name, value in state.items():
        torch.testing.assert_close(value, plain[1][name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(("engine", "zero"), ENGINES, ids=NAMES)
def test_resume_is_bit_exact(engine, zero):
    whole, end, _ = run(engine, zero, 0, 8)
    first, state, updates = run(engine, zero, 0, 4)
    second, resumed, _ = run(engine, zero, 4, 8, state, updates)
    assert first + second == whole
    assert all(torch.equal(resumed[name], end[name]) for name in end)


@pytest.mark.parametrize(("engine", "zero"), ENGINES[1:], ids=NAMES[1:])
def test_a_checkpoint_resumes_on_another_engine(engine, zero, plain):
    _, state, updates = run("torch", 0, 0, 4)
    losses, _, _ = run(engine, zero, 4, 8, state, updates)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(plain[0][4:]), rtol=1e-5, atol=1e-5)


def spared(module: torch.nn.Module) -> set[str]:
    """Last parts of the names of the tensors with at least two dimensions that do not decay."""
    train = TrainConfig(steps=1, batch=1, lr=1e-3, weight_decay=0.1, engine="torch")
    optimizer = make_engine(module, train, Context(0, 1, torch.device("cpu"), seed=1)).optimizer
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decay) == len(list(module.parameters()))
    by_name = {name: (p.ndim, decay[id(p)]) for name, p in module.named_parameters()}
    assert all(d == 0.0 for n, d in by_name.values() if n < 2)
    assert {name for name, (_, d) in by_name.items() if d} == set(engines.decayed(module))
    return {re.sub(r".*\d\.", "", name) for name, (n, d) in by_name.items() if n >= 2 and not d}


def test_weights_of_layers_decay_and_gains_and_tables_do_not():
    """Weight norm's gains have three dimensions; codes, embeddings and distance tables have two or three."""
    codec = SoundStream(SoundStreamSizes((2, 4, 5, 8), 4, 4, 16, 3, 16, quantizer="factorised", code_dim=4))
    gain, direction = "parametrizations.weight.original0", "parametrizations.weight.original1"
    assert {name.rpartition("conv.")[2] for name in spared(codec)} == {gain, "quantizer.codes_QNK"}
    names = {name for name, p in codec.named_parameters() if p.ndim >= 2}
    assert set(engines.decayed(codec)) == {name for name in names if name.endswith((direction, ".weight"))}
    assert any(name.startswith("quantizer.down.0") for name in engines.decayed(codec))

    lm = Transformer(TransformerSizes(vocab=20, dim=16, layers=1, heads=2, ff=32, dropout=0.0, positions="t5",
                                      slots=(9, 11)))
    assert spared(lm) == {"embed.weight", "bias.table"}
    assert {"head.weight", "blocks.0.out.weight"} <= set(engines.decayed(lm))


def test_a_checkpoint_of_another_configuration_is_refused():
    _, state, updates = run("torch", 0, 0, 1)
    state["param/extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match="another configuration: extra"):
        run("torch", 0, 1, 2, state, updates)


class Reused(nn.Module):
    """Uses one layer twice a pass. There a wrapper that reduces gradients as they arrive can lose one of two, silently."""

    def __init__(self):
        super().__init__()
        self.embed, self.twice = nn.Embedding(17, 32), nn.Linear(32, 32)
        self.norm, self.out = nn.LayerNorm(32), nn.Linear(32, 17)

    def forward(self, ids_BT):
        h = self.embed(ids_BT)
        self.dtype = (a := self.twice(h)).dtype
        return self.out(h + torch.tanh(self.twice(self.norm(h + torch.tanh(a)))))


def bf16_gradients(engine, zero, rank=0, world=1):
    """Gradients of one step in bfloat16, averaged over ranks, by name: eight micro-batches in all, of 2 x 24 ids."""
    engines.WHOLE_NUMEL = 0
    torch.manual_seed(0)
    module = Reused()
    train = TrainConfig(steps=1, batch=16, lr=1e-3, clip=0, betas=(0.5, 0.9), engine=engine, zero=zero, dtype="bfloat16")
    e = make_engine(module, train, Context(rank, world, torch.device("cpu"), seed=1))
    ids_NBT = torch.randint(17, (8, 2, 24), generator=torch.Generator().manual_seed(1))
    for ids_BT in ids_NBT[rank::world]:
        scores = e(ids_BT)[:, :-1].float()
        e.backward(F.cross_entropy(scores.flatten(0, 1), ids_BT[:, 1:].flatten()) * world / len(ids_NBT))
    assert module.dtype == torch.bfloat16
    e.step()
    # the first moment after one step is (1 - 0.5) x gradient
    return {name.partition("/")[2]: 2 * x for name, x in e.state().items() if name.startswith("exp_avg/")}


def of_engines(rank, world, saved, updates):
    """(name of an engine, [losses, state, bf16_gradients]) of one of two workers."""
    for (engine, zero), name in zip(ENGINES, NAMES, strict=True):
        losses, state, _ = run(engine, zero, 4, 8, saved, updates, rank, world, 2, 0.0)
        gradients = bf16_gradients(engine, zero, rank, world)
        yield name, [losses, *({k: v.numpy() for k, v in x.items()} for x in (state, gradients))]


@pytest.fixture(scope="module")
def two_workers():
    """Steps 4 to 7: losses and state of one worker of plain torch; of two workers of each engine, with bf16_gradients."""
    _, state, updates = run("torch", 0, 0, 4, dropout=0.0)  # dropout is drawn per rank
    expected, end, _ = run("torch", 0, 4, 8, state, updates, dropout=0.0)
    by_engine = of_two_ranks(of_engines, state, updates, n=len(NAMES), patience_s=180)
    return expected, end, by_engine


@pytest.mark.parametrize("name", NAMES)
def test_two_workers_continue_what_one_began(name, two_workers):
    """Another world size and another engine on resume: losses within 1e-5 of one worker of plain torch."""
    expected, end, by_engine = two_workers
    losses, resumed, _ = by_engine[name]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    for name, value in end.items():
        torch.testing.assert_close(torch.from_numpy(resumed[name]), value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture(scope="module")
def whole_gradients():
    return bf16_gradients("torch", 0)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_gradients_of_micro_batches_equal_plain_torch(name, two_workers, whole_gradients):
    """Four micro-batches on each of two ranks: within 1e-5 of eight on one, where bfloat16's own rounding is 5e-3."""
    gradients = two_workers[2][name][2]
    assert gradients.keys() == whole_gradients.keys()
    for name, whole in whole_gradients.items():
        assert (torch.from_numpy(gradients[name]) - whole).norm() <= 1e-5 * whole.norm(), name
