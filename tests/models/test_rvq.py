"""Residual quantizer: search, start, moving codebooks, dead codes, several workers."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from audiolm import rng
from audiolm.models.rvq import ResidualVQ, kmeans, nearest


def alone(x: torch.Tensor) -> torch.Tensor:
    return x


def noise(*shape: int, index: int = 0) -> torch.Tensor:
    return torch.from_numpy(rng.generator(0, "test-rvq", index).standard_normal(shape).astype(np.float32))


def started(dim: int = 8, n_q: int = 3, vocab: int = 16, decay: float = 0.99, dead_share: float = 0.1) -> ResidualVQ:
    vq = ResidualVQ(dim, n_q, vocab, decay, dead_share)
    vq.initialise(noise(32 * vocab, dim, index=1), seed=0, reduce=alone)
    return vq


def test_nearest_is_the_nearest_whatever_the_model_runs_in():
    x_MD, codes_ND = noise(50, 8), noise(16, 8, index=1)
    expected = torch.cdist(x_MD.double(), codes_ND.double()).argmin(1)
    assert torch.equal(nearest(x_MD, codes_ND), expected)
    vq = started().bfloat16()
    assert vq.codebook_QND.dtype == vq.share_QN.dtype == torch.float32
    x_BDT = noise(2, 8, 20, index=2)
    with torch.autocast("cpu", torch.bfloat16):
        inside = vq.encode(x_BDT)
    assert torch.equal(inside, vq.encode(x_BDT))


def test_kmeans_finds_separate_groups():
    centres_KD = 10 * noise(4, 8)
    x_MD = (centres_KD[:, None] + 0.1 * noise(4, 50, 8, index=1)).flatten(0, 1)
    result = max((kmeans(x_MD, 4, seed, 0) for seed in range(8)), key=lambda r: float(r[1].min()))  # any start may be poor
    assert torch.allclose(result[1], torch.full((4,), 0.25))
    assert torch.cdist(centres_KD, result[0]).min(1).values.max() < 0.1


def test_start_lowers_the_error_with_every_level_and_wants_enough_frames():
    vq = started(n_q=4)
    x_BDT = noise(4, 8, 50, index=2)
    codes_BTQ = vq.encode(x_BDT)
    errors = [float((x_BDT - vq.decode(codes_BTQ[..., :q])).square().mean()) for q in range(1, 5)]
    assert int(vq.initialised) == 1 and float(x_BDT.square().mean()) > errors[0]
    assert all(b < a for a, b in zip(errors, errors[1:], strict=False))
    with pytest.raises(ValueError, match=r"codec\.vocab is 16 but only 10 frames"):
        ResidualVQ(8, 1, 16).initialise(noise(10, 8), seed=0, reduce=alone)


def test_dropout_masks_the_output_and_no_level_s_learning():
    vq = started()
    x_BDT = noise(3, 8, 20, index=2).requires_grad_()
    full, some = vq(x_BDT), vq(x_BDT, torch.tensor([1, 2, 3]))
    assert torch.equal(full["codes_BTQ"], some["codes_BTQ"]) and torch.equal(full["commitment"], some["commitment"])
    for row, levels in enumerate((1, 2, 3)):
        expected = vq.decode(full["codes_BTQ"][row:row + 1, :, :levels])[0]
        assert torch.allclose(some["quantized_BDT"][row], expected, atol=1e-6)
    some["quantized_BDT"].sum().backward()
    assert torch.equal(x_BDT.grad, torch.ones_like(x_BDT))  # straight through


def test_decode_refuses_more_levels_than_there_are():
    with pytest.raises(ValueError, match="4 levels; this codec decodes 1 to 3"):
        started().decode(torch.zeros(1, 5, 4, dtype=torch.int64))


def test_codes_are_the_moving_mean_of_their_frames():
    vq = ResidualVQ(2, 1, 2, decay=0.9, dead_share=0.0)
    vq.codebook_QND.copy_(torch.tensor([[[0.0, 0.0], [10.0, 10.0]]]))
    count, total = torch.tensor([0.5, 0.5]), 0.5 * vq.codebook_QND[0].clone()
    for step in range(5):
        x_MD = noise(20, 2, index=step) + 1.0  # all fall to code 0
        codes_MQ = vq.encode(x_MD.T[None])[0]
        vq.update(x_MD, codes_MQ, seed=0, step=step, reduce=alone)
        count = 0.9 * count + 0.1 * torch.tensor([1.0, 0.0])
        total = 0.9 * total + 0.1 * torch.stack([x_MD.mean(0), torch.zeros(2)])
    assert torch.allclose(vq.codebook_QND[0], total / count[:, None], atol=1e-5)
    assert torch.allclose(vq.share_QN[0], count)


def test_a_dead_code_becomes_a_frame_of_the_batch_and_gets_time():
    vq = ResidualVQ(4, 2, 8, decay=0.5)
    vq.codebook_QND[:, :4] = noise(2, 4, 4)
    vq.codebook_QND[:, 4:] = 1e3  # near no frame
    replaced = torch.zeros(2, dtype=torch.int64)
    for step in range(5):
        x_MD = noise(64, 4, index=10 + step)
        codes_MQ = vq.encode(x_MD.T[None])[0]
        before = vq.codebook_QND.clone()
        now_Q = vq.update(x_MD, codes_MQ, seed=0, step=step, reduce=alone)
        if now_Q[0] and not replaced[0]:
            fresh = torch.cdist(vq.codebook_QND[0, 4:], x_MD)
            assert fresh.min(1).values.max() < 2e-3 and before[0, 4:].min() == 1e3
            assert torch.allclose(vq.share_QN[0, 4:], torch.tensor(1 / 8))
        replaced += now_Q
    assert replaced.tolist() == [4, 4]  # each once: a replacement is not dead again at once
    assert vq.codebook_QND.abs().max() < 10


def test_a_dead_code_s_frame_does_not_depend_on_which_others_are_dead():
    one, two = ResidualVQ(4, 2, 8, decay=0.5), ResidualVQ(4, 2, 8, decay=0.5)
    x_MD, codes_MQ = noise(64, 4), torch.arange(64)[:, None].expand(-1, 2) % 6  # 6 and 7 have no frame
    for vq, dead in ((one, [6]), (two, [6, 7])):
        vq.codebook_QND.fill_(1e3)
        vq.share_QN[:, dead] = 1e-3
        assert vq.update(x_MD, codes_MQ, seed=0, step=0, reduce=alone).tolist() == [len(dead)] * 2
    assert torch.equal(one.codebook_QND[:, 6], two.codebook_QND[:, 6])
    assert (two.codebook_QND[0, 6:, None] == x_MD).all(-1).any(-1).all()
    assert (two.codebook_QND[0, 6] != two.codebook_QND[0, 7]).any()


def test_nothing_is_replaced_on_uniform_data():
    vq = ResidualVQ(2, 1, 32, decay=0.99)
    draw = rng.generator(0, "uniform")
    grid = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(4.0), indexing="ij"), -1).reshape(32, 2) + 0.5
    vq.codebook_QND.copy_(grid[None])
    for step in range(1000):
        x_MD = torch.from_numpy(draw.random((48, 2), dtype=np.float32)) * torch.tensor([8.0, 4.0])  # 1.5 frames a code
        codes_MQ = vq.encode(x_MD.T[None])[0]
        assert int(vq.update(x_MD, codes_MQ, seed=0, step=step, reduce=alone).sum()) == 0
    assert float(vq.perplexity()) > 31


def in_step(world: int, work) -> list:
    """Runs work(rank, reduce) in `world` threads; reduce sums over them in rank order."""
    barrier, slots, results = threading.Barrier(world, timeout=30), [None] * world, [None] * world

    def run(rank: int) -> None:
        def reduce(x: torch.Tensor) -> torch.Tensor:
            slots[rank] = x
            barrier.wait()
            total = torch.stack(slots).sum(0)
            barrier.wait()
            return total

        results[rank] = work(rank, reduce)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return results


def test_one_and_two_workers_keep_the_same_codebooks():
    steps = [noise(64, 8, index=100 + s) + 4 * s for s in range(6)]  # the data moves, so that codes die

    def work(world: int):
        def run(rank: int, reduce) -> tuple[ResidualVQ, int]:
            vq, replaced = ResidualVQ(8, 3, 16, decay=0.7, dead_share=0.3), 0
            vq.initialise(noise(512, 8, index=1), seed=0, reduce=reduce, rank=rank)
            for step, x_MD in enumerate(steps):
                mine_MD = x_MD.chunk(world)[rank]
                codes_MQ = vq.encode(mine_MD.T[None])[0]
                gone_Q = vq.update(mine_MD, codes_MQ, seed=0, step=step, reduce=reduce, rank=rank, world=world)
                replaced += int(gone_Q.sum())
            return vq, replaced

        return run

    (one, replaced), = in_step(1, work(1))
    first, second = in_step(2, work(2))
    assert replaced > 0 and first[1] == second[1] == replaced
    for name, value in one.state_dict().items():
        assert torch.allclose(value, first[0].state_dict()[name], atol=1e-5), name
        assert torch.equal(first[0].state_dict()[name], second[0].state_dict()[name]), name
