"""Sampling: only legal ids, forced ids unchanged, a sample is the same whatever its batch, the law of the draws."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from audiolm.config.lm import DepthConfig, StageConfig
from audiolm.config.training import TrainConfig
from audiolm.generate import graphs
from audiolm.generate.frame_sampler import FrameSampler
from audiolm.generate.params import SamplingParams
from audiolm.generate.sampler import Sampler, sample_ids
from audiolm.lm.loss import inputs_of, prepare
from audiolm.lm.model import build_lm
from audiolm.lm.pack_rows import pack_rows
from audiolm.lm.run_lengths import MAX_RUN
from audiolm.lm.stages import Stage
from audiolm.models.lm.frame_transformer import FrameTransformer
from audiolm.models.lm.transformer import Transformer
from tests.worlds.token_corpus import legal_ids

K, VOCAB = 12, 10
STAGES = {
    "semantic": Stage("semantic", K, VOCAB, (0, 0), 2, True, 4.0),
    "coarse": Stage("coarse", K, VOCAB, (0, 2), 2, True, 4.0),
    "fine": Stage("fine", 0, VOCAB, (2, 5), 2, True, 2.0),
    "aligned coarse": Stage("coarse", K, VOCAB, (0, 2), 2, False, 4.0, aligned=True, dropped=0.1),
    "aligned fine": Stage("fine", 0, VOCAB, (2, 5), 2, True, 2.0, aligned=True, dropped=0.1),
    "frames": Stage("coarse", K, VOCAB, (0, 3), 3, False, 4.0, frames=True),
    "aligned frames": Stage("coarse", K, VOCAB, (0, 2), 2, False, 4.0, aligned=True, dropped=0.1, frames=True),
}
TIMED = Stage("semantic", K, VOCAB, (0, 0), 2, True, 4.0, lengths=True)


def build(stage: Stage, dropout: float) -> Transformer | FrameTransformer:
    shape = StageConfig(crop_s=stage.crop_s, dim=32, layers=2, heads=4, ff=64, dropout=dropout,
                        positions="t5" if stage.name == "coarse" and not stage.frames else "rotary",
                        depth=DepthConfig(dim=16, layers=2, ff=32), train=TrainConfig(steps=1, batch=1, lr=1e-3))
    return build_lm(stage, shape).eval()


def sampler(model, stage: Stage) -> Sampler | FrameSampler:
    return (FrameSampler if stage.frames else Sampler)(model, stage)


def run_at_once(static: Sampler | FrameSampler, monkeypatch) -> None:
    """Steps of a sampler that believes to be on a GPU: no graph is captured."""
    static._kept.limit = math.inf
    monkeypatch.setattr(graphs, "WARM_UP", math.inf)
    monkeypatch.setattr(graphs, "run_aside", lambda step: step())


@pytest.fixture(scope="module")
def models() -> dict[str, Transformer]:
    out = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, stage in STAGES.items():
            model = build(stage, 0.1).requires_grad_(False)
            (model.depth if stage.frames else model).head.weight.mul_(20.0)
            out[name] = model
    return out


def prompt(name: str, frames: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return STAGES[name].prompt(rng.integers(0, K, frames), rng.integers(0, VOCAB, (2 * frames, 2)))


def conditions(name: str, counts: list[int]) -> list[np.ndarray]:
    """A condition for each target of each row."""
    stage, draw = STAGES[name], np.random.default_rng(9)
    z = [draw.integers(0, K, n) for n in counts]
    codes = [draw.integers(0, VOCAB, (n, 2)) for n in counts]
    return [stage.conditions(*parts)[:n] for *parts, n in zip(z, codes, counts, strict=True)]


@pytest.mark.parametrize("name", list(STAGES))
def test_every_id_is_legal(models, name):
    stage = STAGES[name]
    for temperature, top_k, top_p in ((1, None, None), (50, None, None), (1, 3, None), (1, None, 0.5), (0, None, None)):
        out = sampler(models[name], stage)([prompt(name, 9, s) for s in range(3)], 60, eos_from=0, seeds=[1, 2, 3],
                                           params=SamplingParams(temperature, top_k, top_p))
        for ids in out:
            assert 0 < len(ids) <= 60
            for n, i in enumerate(ids):
                assert legal_ids(stage, n, int(ids[n - 1]) if n else None)[i]
            stage.unpack(ids)


def test_eos_ends_a_sample_or_is_never_drawn(models):
    stage, model = STAGES["semantic"], build(STAGES["semantic"], 0.0)
    model.load_state_dict(models["semantic"].state_dict())
    prompts, seeds = [stage.prompt()] * 12, list(range(12))
    free = Sampler(model, stage)(prompts, 50, params=SamplingParams(5.0), eos_from=0, seeds=seeds)
    ended = [ids for ids in free if len(ids) < 50]
    assert ended and all(ids[-1] == stage.eos and stage.eos not in ids[:-1] for ids in ended)
    late = Sampler(model, stage)(prompts, 50, params=SamplingParams(5.0), eos_from=list(range(12, 24)), seeds=seeds)
    assert all(len(ids) > n for n, ids in zip(range(12, 24), late, strict=True)) and any(len(ids) < 50 for ids in late)
    full = Sampler(model, stage)(prompts, 50, params=SamplingParams(5.0), eos_from=None, seeds=seeds)
    assert all(len(ids) == 50 and stage.eos not in ids for ids in full)


@pytest.mark.parametrize("name", list(STAGES))
def test_a_sample_is_the_same_whatever_the_batch(models, name):
    stage, n = STAGES[name], 11  # more than one group of rows
    prompts = [prompt(name, 3 + 5 * i % 17, i) for i in range(n)]
    counts = [6 * stage.slots + 9 * i % 40 * stage.slots for i in range(n)]
    seeds = list(range(100, 100 + n))
    cond, how = conditions(name, counts), SamplingParams(1.0, guidance=1.5 if stage.dropped else 1.0)
    batch = sampler(models[name], stage)(prompts, counts, params=how, seeds=seeds, cond=cond)
    for i in range(n):
        alone = sampler(models[name], stage)([prompts[i]], [counts[i]], params=how, seeds=[seeds[i]], cond=[cond[i]])[0]
        np.testing.assert_array_equal(batch[i], alone)
        assert len(alone) == counts[i]
    back = sampler(models[name], stage)(prompts[::-1], counts[::-1], params=how, seeds=seeds[::-1], cond=cond[::-1])[::-1]
    assert all(np.array_equal(a, b) for a, b in zip(batch, back, strict=True))


@pytest.mark.parametrize("name", list(STAGES))
def test_the_gpus_way_draws_the_same_ids(models, name, monkeypatch):
    """All of it but the capture: tables on the device, all slots scored, prompts padded together, memory kept."""
    stage, model = STAGES[name], models[name]
    plain, static = sampler(model, stage), sampler(model, stage)
    static.static = True
    run_at_once(static, monkeypatch)
    how = SamplingParams(1.0, top_p=0.9, window=3, repeats=0.4, guidance=1.5 if stage.dropped else 1.0)
    for n in (3, 5, 4):  # 4 and 8 rows; the last call finds its memory used
        prompts = [prompt(name, 3 + 5 * i % 17, i % 3) for i in range(n)]
        counts = [(6 + 9 * i % 40) * stage.slots for i in range(n)]
        for eos_from in (0, 12, None):
            one, two = (s(prompts, counts, eos_from=eos_from, params=how, seeds=range(n), cond=conditions(name, counts))
                        for s in (plain, static))
            assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert len(static._kept.held) == 2


@pytest.mark.parametrize(("name", "n", "count"), [("fine", 30, 2), ("coarse", 80, 3), ("frames", 30, 3)])
@pytest.mark.parametrize("static", [False, True])
def test_compiled_steps_draw_the_same_ids(models, name, n, count, static, monkeypatch):
    """In whole graphs, which layers and slots share: a layer for each run of keys, a code of the depth network, a draw."""
    stage = STAGES[name]
    model = build(stage, 0.0)
    model.load_state_dict(models[name].state_dict())
    plain, compiled = sampler(model, stage), sampler(model, stage)
    compiled.static = static
    run_at_once(compiled, monkeypatch)
    how = {"seeds": [1, 2], "params": SamplingParams(0.9, top_p=0.9)}
    prompts = [prompt(name, 6, i) for i in range(2)]
    want = plain(prompts, n, **how)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled.compile(backend="aot_eager")
    assert all(np.array_equal(a, b) for a, b in zip(compiled(prompts, n, **how), want, strict=True))
    counted = torch._dynamo.utils.counters
    assert counted["stats"]["unique_graphs"] == count and not counted["graph_break"]


def test_seeds_differ_and_repeat(models):
    stage, p = STAGES["coarse"], prompt("coarse", 5, 0)
    a, b, c = Sampler(models["coarse"], stage)([p, p, p], 40, seeds=[7, 8, 7])
    assert np.array_equal(a, c) and not np.array_equal(a, b)


@pytest.mark.parametrize("name", ["coarse", "aligned coarse", "frames", "aligned frames"])
def test_forced_ids_come_back_and_the_rest_follows_them(models, name):
    stage, p = STAGES[name], prompt(name, 10, 0)
    n, draw = 20 * stage.slots, sampler(models[name], stage)
    how = {"params": SamplingParams(1.0, window=4, guidance=1.5 if stage.dropped else 1.0)}
    cond = conditions(name, [n])
    whole = draw([p], n, seeds=[3], cond=cond, **how)[0]
    forced = [whole[:8 * stage.slots], whole[:0], whole]
    out = draw([p] * 3, [n] * 3, forced=forced, seeds=[3, 3, 3], cond=cond * 3, **how)
    # the draw at a position depends on the seed and the position, so the sample goes on as it did
    assert all(np.array_equal(ids, whole) for ids in out)
    with pytest.raises(ValueError, match="forced"):
        draw([p], stage.slots, forced=[whole], seeds=[3])
    if stage.frames:
        with pytest.raises(ValueError, match=f"1 ids are forced and 5 asked for beyond them, in frames of {stage.slots}"):
            draw([p], 6, forced=[whole[:1]], seeds=[3])


def test_no_repeat_at_the_prompts_boundary(models):
    stage = STAGES["semantic"]
    forced = [stage.targets(np.array([i])) for i in range(K)]
    out = Sampler(models["semantic"], stage)([stage.prompt()] * K, 30, forced=forced, params=SamplingParams(30.0),
                 seeds=list(range(K)))
    assert all((ids[1:] != ids[:-1]).all() for ids in out)


def test_cached_sampling_equals_the_whole_model_at_each_step(models):
    stage, model, p = STAGES["fine"], models["fine"], prompt("fine", 6, 1)
    ids = Sampler(model, stage)([p], 36, params=SamplingParams(0.0), seeds=[0])[0]
    for n in range(36):
        h_D = model.hidden(torch.from_numpy(np.concatenate([p, ids[:n]]))[None])[0, -1]
        scores_W = model.head.by_slot()[n % stage.slots][0] @ h_D
        chosen = stage.slot_ids()[n % stage.slots].tolist().index(ids[n])
        assert scores_W[chosen] >= scores_W.max() - 1e-5


@pytest.mark.parametrize("name", ["frames", "aligned frames"])
def test_the_most_likely_frames_are_those_of_the_whole_model(models, name):
    """Each drawn code has the fewest nats of its slot, given all before it, in the training pass."""
    stage, model, draw = STAGES[name], models[name], np.random.default_rng(2)
    z_T, n = draw.integers(0, K, 8), 16 * stage.slots
    how = {"params": SamplingParams(0.0), "seeds": [0], "cond": [stage.conditions(z_T)]}
    ids = sampler(model, stage)([stage.prompt(z_T)], n, **how)[0]
    codes_TQ = stage.unpack(ids)

    def nats(codes_TQ: np.ndarray) -> np.ndarray:
        tensors = prepare(stage, pack_rows(stage, [[stage.pack(z_T, codes_TQ, True)]]))
        return model(*inputs_of(tensors))[:, :16].numpy()

    own_QN = nats(codes_TQ)
    for t, q in itertools.product(range(16), range(stage.slots)):
        other_TQ = codes_TQ.copy()
        other_TQ[t, q] = (other_TQ[t, q] + 1 + draw.integers(VOCAB - 1)) % VOCAB
        assert nats(other_TQ)[q, t] >= own_QN[q, t] - 1e-4


def test_draws_follow_the_distribution():
    logits_V = torch.tensor([1.0, -torch.inf, 0.0, 2.0, -1.0, -torch.inf])
    ids_V = torch.arange(6)

    def drawn(noise: torch.Tensor, draw: SamplingParams, recent=()) -> torch.Tensor:
        n = len(noise)
        return sample_ids(logits_V.expand(n, 6), noise, draw, ids_V.expand(n, 6), torch.tensor(recent).expand(n, len(recent)))

    def shares(draw: SamplingParams, recent=()) -> torch.Tensor:
        noise = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return torch.bincount(drawn(noise, draw, recent), minlength=6) / len(noise)

    for t in (0.6, 1.0, 2.0):
        torch.testing.assert_close(shares(SamplingParams(t)), (logits_V / t).softmax(0), atol=0.015, rtol=0)
    assert shares(SamplingParams(1.0, top_k=2)).nonzero().flatten().tolist() == [0, 3]
    assert shares(SamplingParams(1.0, top_p=0.7)).nonzero().flatten().tolist() == [0, 3]  # 0.64 + 0.24 crosses 0.7
    assert shares(SamplingParams(1.0, top_p=1e-6)).tolist() == [0, 0, 0, 1, 0, 0]
    ends = torch.tensor([[0.0, 0.0], [1.0 - 2**-53, 0.0]], dtype=torch.float64)
    assert drawn(ends, SamplingParams(1.0)).tolist() == [0, 4]
    # repetition-aware: id 3 stands too often among the last ones, so where top_p draws it, all ids may come
    aware = SamplingParams(1.0, top_p=1e-6, window=10, repeats=0.2)
    assert shares(aware, (3, 3, 0, 0)).tolist() == [0, 0, 0, 1, 0, 0]
    torch.testing.assert_close(shares(aware, (3, 3, 3, 0)), logits_V.softmax(0), atol=0.015, rtol=0)


def test_bad_settings_are_refused():
    for settings, field in (((-1.0,), "temperature"), ((1.0, 0), "top_k"), ((1.0, None, 0.0), "top_p"),
                            ((1.0, None, None, 0), "window"), ((1.0, None, None, 5, 1.0), "repeats")):
        with pytest.raises(ValueError, match=field):
            SamplingParams(*settings)


@pytest.fixture(scope="module")
def timed() -> Transformer:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = build(TIMED, 0.0).requires_grad_(False)
        model.head.weight.mul_(20.0)
        model.lengths.head.weight.mul_(20.0)
    return model


def heads() -> list[np.ndarray]:
    """Prompts in frames, also empty ones and one whose last run is long."""
    draw = np.random.default_rng(4)
    return [np.repeat(draw.integers(0, K, n), draw.integers(1, 5, n)) for n in (0, 1, 7, 3, 0, 12, 5, 2, 9)] + [np.full(60, 3)]


def test_runs_fill_the_frames_and_go_on_where_the_prompt_was(timed):
    z, frames = heads(), [40, 1, 0, 25, 3, 60, 33, 12, 50, 20]
    out = Sampler(timed, TIMED).runs(z, frames, range(10), may_end=False)
    for prompt, n, (z_T, ended) in zip(z, frames, out, strict=True):
        assert len(z_T) == len(prompt) + n and not ended
        np.testing.assert_array_equal(z_T[:len(prompt)], prompt)
        assert 0 <= z_T.min(initial=0) and z_T.max(initial=0) < K
    free = Sampler(timed, TIMED).runs([np.zeros(0, np.int64)] * 30, [80] * 30, range(30), params=SamplingParams(4.0))
    ended = [z_T for z_T, end in free if end]
    assert ended and min(map(len, ended)) < 80 and all(len(z_T) == 80 for z_T, end in free if not end)


def test_a_cut_run_lasts_at_least_as_long_as_the_prompt_has_of_it(timed):
    """Lengths follow p(length | id, length >= seen), counted over many seeds."""
    prompt = np.repeat([2, 5], [3, 2])
    out = Sampler(timed, TIMED).runs([prompt] * 400, [MAX_RUN + 5] * 400, range(400), may_end=False)
    more = [int((np.append(z_T[3:], -1) != 5).argmax()) for z_T, _ in out]
    assert min(more) >= 2
    ids, length = torch.tensor([[TIMED.bos, 2]]), torch.tensor([[0, 3]])
    scores_L = timed.lengths.scores(timed.hidden(ids, length_BT=length)[0, -1], torch.tensor(5))
    chances_L = scores_L[1:].softmax(0)  # a length of 1 is not possible
    # another 5 may follow, so runs are at least as long as the first length: compare the shortest
    assert np.mean(np.array(more) == 2) == pytest.approx(float(chances_L[0]), abs=0.1)


def test_runs_are_the_same_whatever_the_batch_and_on_the_gpus_way(timed, monkeypatch):
    z, frames, how = heads(), [40, 1, 0, 25, 3, 60, 33, 12, 50, 20], SamplingParams(1.5, top_p=0.9)
    batch = Sampler(timed, TIMED).runs(z, frames, range(10), params=how)
    static = Sampler(timed, TIMED)
    static.static = True
    run_at_once(static, monkeypatch)
    for i, (z_T, ended) in enumerate(batch):
        alone = Sampler(timed, TIMED).runs([z[i]], [frames[i]], [i], params=how)[0]
        np.testing.assert_array_equal(alone[0], z_T)
        assert alone[1] == ended
    for (a, _), (b, _) in zip(batch, static.runs(z, frames, range(10), params=how), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_cached_sampling_of_aligned_conditions_equals_the_whole_model(models, guidance):
    name, n = "aligned coarse", 24
    stage, model = STAGES[name], models[name]
    p, cond = prompt(name, 6, 1), conditions(name, [n])[0]
    ids = Sampler(model, stage)([p], n, params=SamplingParams(0.0, guidance=guidance), seeds=[0], cond=[cond])[0]
    for i in range(n):
        scores = []
        for head, own in ((p, cond), (stage.no_prompt(), cond[:0])):
            row = np.concatenate([head, ids[:i]])
            cond_TC = torch.from_numpy(stage.place_conditions(len(row), len(head), own))
            h_D = model.hidden(torch.from_numpy(row)[None], cond_BTC=cond_TC[None])[0, -1]
            scores.append((model.head.by_slot()[i % stage.slots][0] @ h_D).log_softmax(0))
        scores_W = scores[1] + guidance * (scores[0] - scores[1])
        chosen = stage.slot_ids()[i % stage.slots].tolist().index(ids[i])
        assert scores_W[chosen] >= scores_W.max() - 1e-4
    with pytest.raises(ValueError, match="guidance 2 needs a coarse stage that was also trained without its condition"):
        Sampler(models["coarse"], STAGES["coarse"])([prompt("coarse", 3, 0)], 4, seeds=[0], params=SamplingParams(guidance=2.0))
