"""The engines agree with each other and with themselves after a resume, whatever the world size."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.multiprocessing as mp

from audiolm import rng
from audiolm.config import Train
from audiolm.train.engine import learning_rate, make_engine
from audiolm.train.objective import Context
from tests.tiny import tiny_lm

ENGINES = [("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2)]
NAMES = ["torch", "zero0", "zero1", "zero2"]


def run(engine, zero, start, stop, saved=None, updates=0, rank=0, world=1, micro=4, dropout=0.1):
    """Losses of steps start..stop-1 and the canonical state after them."""
    torch.set_num_threads(1)
    train = Train(steps=100, batch=8, lr=3e-3, warmup_steps=3, clip=0.5, engine=engine, zero=zero)
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


def test_a_checkpoint_of_another_configuration_is_refused():
    _, state, updates = run("torch", 0, 0, 1)
    state["param/extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match="another configuration: extra"):
        run("torch", 0, 1, 2, state, updates)


def _worker(rank, world, port, engine, zero, saved, updates, results):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    losses, state, n = run(engine, zero, 4, 8, saved, updates, rank, world, 2, 0.0)
    if rank == 0:
        results.put((losses, {k: v.numpy() for k, v in state.items()}, n))
        results.close()
        results.join_thread()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("engine", "zero"), [("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2)], ids=NAMES)
def test_two_workers_continue_what_one_began(engine, zero, monkeypatch):
    """Another world size on resume: losses within 1e-5 of the one-worker run (no dropout: it is drawn per rank)."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    _, state, updates = run("torch", 0, 0, 4, dropout=0.0)
    expected, end, _ = run("torch", 0, 4, 8, state, updates, dropout=0.0)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_worker, args=(r, 2, port, engine, zero, state, updates, results)) for r in range(2)]
    for w in workers:
        w.start()
    losses, resumed, _ = results.get(timeout=120)
    for w in workers:
        w.join(60)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    for name, value in end.items():
        torch.testing.assert_close(torch.from_numpy(resumed[name]), value, rtol=1e-3, atol=1e-4, msg=name)
