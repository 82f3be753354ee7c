"""Kept memory and CUDA graphs of sampling: which buffers a call takes, what is evicted, what a replay draws."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from audiolm.generate import graphs
from audiolm.generate.graphs import LENGTH_STEP, SPARE, WARM_UP, Graphs, Kept, size_of
from audiolm.generate.params import SamplingParams
from audiolm.generate.sampler import Buffers
from audiolm.models.lm.cache import KEYS
from tests.generate.test_sampler import STAGES, TIMED, build, conditions, heads, prompt, sampler
from tests.worlds.gpu import recorded_graph

MB = 1 << 20


@pytest.fixture
def captures(monkeypatch) -> list[int]:
    """Keys of each graph that is captured, with a recording in a GPU's place."""
    seen = []

    def capture(step, own: Graphs):
        replay = recorded_graph.capture(step)
        m = step.args[0]
        assert m.graphs is own
        seen.append(m.cache.keys(0))  # the step has counted its token
        return replay

    monkeypatch.setattr(graphs, "run_aside", lambda step: step())
    monkeypatch.setattr(graphs, "capture", capture)
    return seen


def on_a_gpu(model, stage, limit: int = 64 * MB):
    out = sampler(model, stage)
    out.static, out._kept = True, Kept(limit)
    return out


def made(name: str) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = build(STAGES[name], 0.0).requires_grad_(False)
    (model.depth if STAGES[name].frames else model).head.weight.mul_(20.0)
    return model


def memory(rows: int, length: int, device: str | None, width: int = 64) -> SimpleNamespace:
    """Buffers of rows x length x width bytes."""
    cache = SimpleNamespace(kv=[torch.zeros(2, rows, 1, length, width // 2, dtype=torch.uint8, device=device)],
                            clear=lambda: None)
    return SimpleNamespace(rows=rows, length=length, cache=cache, graphs=Graphs())


def test_a_call_takes_the_smallest_buffers_that_are_large_enough():
    kept = Kept(64 * MB)
    large = kept.take("a", 30, 700, memory)
    assert (large.rows, large.length) == (32, 2 * LENGTH_STEP)
    assert kept.take("a", 16, 1024, memory) is large and kept.take("a", 32 // SPARE, 1, memory) is large
    small = kept.take("a", 32 // SPARE - 1, 512, memory)  # padding of more than that costs more than a capture
    assert (small.rows, small.length) == (8, LENGTH_STEP)
    assert kept.take("a", 8, 512, memory) is small and kept.take("a", 9, 512, memory) is large
    assert kept.take("a", 8, 513, memory) is large
    assert kept.take("b", 8, 512, memory) is not small
    longer = kept.take("a", 20, 1025, memory)
    assert (longer.rows, longer.length) == (32, 3 * LENGTH_STEP)
    assert [m for _, _, m in kept.held if m is large] == []  # the longer one does all that it did


def test_kept_memory_is_bounded_and_the_least_recently_used_goes_first():
    sizes = []

    def make(rows, length, device):
        sizes.append((device, sum(size for _, size, _ in kept.held)))
        return memory(rows, length, device)

    one = 4 * LENGTH_STEP * 64  # bytes of 4 rows
    kept = Kept(3 * one)
    a, b, _ = (kept.take(key, 4, 500, make) for key in "abc")
    assert kept.take("a", 4, 500, make) is a
    kept.take("d", 4, 500, make)  # the oldest is b
    assert [key for key, *_ in kept.held] == ["c", "a", "d"]
    assert all(held + one <= kept.limit for device, held in sizes if device is None)  # freed before the new ones are made
    kept.take("e", 64, 500, make)  # alone beyond the limit: kept until the next
    assert [key for key, *_ in kept.held] == ["e"]
    kept.take("b", 4, 500, make)
    assert [key for key, *_ in kept.held] == ["b"]


@pytest.mark.parametrize("name", ["aligned coarse", "frames"])
def test_the_size_of_buffers_is_known_before_they_are_made(name, captures):
    stage, one = STAGES[name], on_a_gpu(made(name), STAGES[name])
    one([prompt(name, 3, 0)] * 5, 6 * stage.slots, seeds=range(5), cond=conditions(name, [6 * stage.slots] * 5),
        params=SamplingParams(1.0, window=4))
    (_, size, m), = one._kept.held
    assert size == size_of(m) > sum(x.nbytes for x in m.cache.kv) == 2 * 2 * 8 * 32 * LENGTH_STEP * 4


@pytest.mark.parametrize("name", list(STAGES))
def test_replays_draw_the_same_ids(name, captures):
    """Whatever rows and lengths, and at each temperature, through the same graphs."""
    stage, model = STAGES[name], made(name)
    plain, static = sampler(model, stage), on_a_gpu(model, stage)
    for n, temperature in ((8, 1.0), (5, 0.7), (3, 1.3)):
        how = SamplingParams(temperature, top_p=0.95 - 0.1 * n / 8, window=3, repeats=0.4 / temperature,
                             guidance=1 + temperature if stage.dropped else 1.0)
        prompts = [prompt(name, 3 + 5 * i % 17, i % 3) for i in range(n)]
        counts = [(9 + 9 * i % 40) * stage.slots for i in range(n)]
        one, two = (s(prompts, counts, eos_from=None, params=how, seeds=range(n), cond=conditions(name, counts))
                    for s in (plain, static))
        assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert len(static._kept.held) == 1 and captures and len(captures) == len(set(captures))


def test_replays_draw_the_same_runs(captures):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = build(TIMED, 0.0).requires_grad_(False)
    model.head.weight.mul_(20.0)
    model.lengths.head.weight.mul_(20.0)
    static = on_a_gpu(model, TIMED)
    for rows in (7, 3):
        z, frames, how = heads()[:rows], [40, 10, 5, 25, 30, 60, 33][:rows], SamplingParams(1.5)
        want = sampler(model, TIMED).runs(z, frames, range(rows), params=how)
        for (a, ended), (b, end) in zip(want, static.runs(z, frames, range(rows), params=how), strict=True):
            np.testing.assert_array_equal(a, b)
            assert ended == end
    assert captures


def test_a_shrinking_batch_needs_one_set_of_graphs(captures):
    stage, model = STAGES["semantic"], made("semantic")
    static = on_a_gpu(model, stage)
    for n in (32, 16, 8):
        static([stage.prompt()] * n, 150 + n, seeds=range(n))
    assert captures == [KEYS, 2 * KEYS, 3 * KEYS] and len(static._kept.held) == 1
    assert static._kept.held[0][2].graphs.warmed == dict.fromkeys(captures, WARM_UP)
    static([stage.prompt()] * 8, 60, seeds=range(8), params=SamplingParams(0.5))
    assert len(captures) == 3
    static([stage.prompt()] * 8, 60, seeds=range(8), params=SamplingParams(0.0))  # another way to draw
    assert captures[3:] == [KEYS] and len(static._kept.held) == 2


def test_samplers_share_the_kept_memory(captures):
    one, two = (on_a_gpu(made(name), STAGES[name]) for name in ("semantic", "frames"))
    make = partial(Buffers, one.model, one.stage, back=0, guided=False)
    two._kept = one._kept = Kept(size_of(make(4, LENGTH_STEP, "meta")))  # room for one alone
    one([one.stage.prompt()] * 4, 5, seeds=range(4))
    assert [key[0] for key, *_ in one._kept.held] == [one.model]
    two([prompt("frames", 3, 0)] * 4, 6, seeds=range(4))
    assert [key[0] for key, *_ in one._kept.held] == [two.model]


def test_rows_of_padding_change_nothing(captures):
    stage, model = STAGES["coarse"], made("coarse")
    tight, spare = on_a_gpu(model, stage), on_a_gpu(model, stage)
    prompts, seeds = [prompt("coarse", 3 + i, i) for i in range(4)], [5, 6, 7, 8]
    spare([prompt("coarse", 20, 9)] * 16, 70, seeds=range(16), params=SamplingParams(3.0))  # leaves its keys and ids behind
    one, two = (s(prompts, 40, seeds=seeds, eos_from=8) for s in (tight, spare))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert [m.rows for _, _, m in spare._kept.held] == [16]


def test_a_recording_is_no_second_run_of_the_hosts_code():
    """The seam itself: what the host has changed since the capture does not reach a replay, what the device holds does."""
    x, host = torch.zeros(3), [1.0]
    replay = recorded_graph.capture(lambda: x.add_(torch.ones(3) * host[0]))
    assert x.tolist() == [0.0] * 3
    host[0] = 5.0
    x.fill_(10.0)
    replay()
    assert x.tolist() == [11.0] * 3
    with pytest.raises(AssertionError, match="cannot read"):
        recorded_graph.capture(lambda: x.sum().item())
