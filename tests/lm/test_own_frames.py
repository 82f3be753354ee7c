"""Frames that a stage draws itself in training: where they stand, how many they are, and that they are what it would draw."""

from __future__ import annotations

import pytest
import torch

from audiolm import rng
from audiolm.lm.frames import drawn_frames, own_draws, own_frames
from tests.train.test_carry import stage
from tests.worlds import token_corpus
from tests.worlds.training import learn


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A stage by frames on a corpus with a law, and a batch of it."""
    corpus = token_corpus.make(tmp_path_factory.mktemp("corpus"), {"train": [60] * 8, "dev": [40, 33]})
    objective = stage(corpus.paths, "lm_coarse frame", 1)
    objective.shape = objective.shape.model_copy(update={"own": 0.3})
    before = objective.evaluate()["loss"]
    learn(objective, 40)
    assert objective.evaluate()["loss"] < before - 0.3  # it learns with them as without
    return objective, objective.load(0, range(8))


def with_chance(trained, share: float, seed: int = 0, passes: int = 1) -> dict[str, torch.Tensor]:
    objective, batch = trained
    draws = [rng.generator(seed, "own", 0, row) for row in range(8)]
    return {**batch, **own_draws(objective.stage, batch, share, passes, draws)}


def owned(trained, share: float, seed: int = 0) -> dict[str, torch.Tensor]:
    objective, _ = trained
    return own_frames(objective.modules["lm"].eval(), objective.stage, with_chance(trained, share, seed))


def frames_of(stage, tensors) -> torch.Tensor:
    """codes_NS of the batch's frames, as they are read."""
    at_N = tensors["index_SN"][0][(tensors["label_SN"] >= 0).all(0)] + 1
    ids_N = tensors["ids_BT"].flatten()[at_N][:, None] - stage.offset
    others = tensors["cond_BTC"].flatten(0, 1)[at_N, stage.n_cond:] - stage.offset
    return torch.cat([ids_N, others], 1) - stage.vocab * torch.arange(stage.slots)


def test_frames_alone_change_and_labels_stay(trained):
    objective, batch = trained
    known = (batch["label_SN"] >= 0).all(0)
    truth = batch["label_SN"].T[known]
    assert torch.equal(frames_of(objective.stage, batch), truth)
    new = owned(trained, 0.5)
    codes = frames_of(objective.stage, new)
    assert torch.equal(new["label_SN"], batch["label_SN"]) and codes.min() >= 0 and codes.max() < objective.stage.vocab
    assert 0.1 < (codes != truth).any(1).float().mean() < 0.7
    same = torch.ones_like(batch["ids_BT"], dtype=torch.bool).flatten()
    same[batch["index_SN"][0][known] + 1] = False
    for name in ("ids_BT", "cond_BTC"):
        assert torch.equal(new[name].flatten(0, 1)[same], batch[name].flatten(0, 1)[same])
    assert torch.equal(new["cond_BTC"][..., :objective.stage.n_cond], batch["cond_BTC"][..., :objective.stage.n_cond])
    assert torch.equal(frames_of(objective.stage, owned(trained, 0.0)), truth)


def test_the_same_seed_draws_the_same_and_another_does_not(trained):
    objective, _ = trained
    one, again, other = (frames_of(objective.stage, owned(trained, 0.5, seed)) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_a_second_pass_draws_after_the_frames_of_the_first(trained):
    objective, _ = trained
    model, stage, tensors = objective.modules["lm"].eval(), objective.stage, with_chance(trained, 0.5, passes=2)
    parts = tensors["uniform_BTU"].split(stage.slots, 2)
    one, two = ({**tensors, "uniform_BTU": part, "own_BT": torch.ones_like(tensors["own_BT"])} for part in parts)
    first = own_frames(model, stage, one)
    expected = drawn_frames(model, stage, {**two, "ids_BT": first["ids_BT"], "cond_BTC": first["cond_BTC"]})
    known = (tensors["label_SN"] >= 0).all(0)
    assert torch.equal(drawn_frames(model, stage, tensors)[known], expected[known])
    assert not torch.equal(drawn_frames(model, stage, two)[known], expected[known])  # after true frames


def test_draws_have_the_models_probabilities(trained):
    """The mean log-probability of many drawn codes is the negative entropy of what they are drawn from."""
    objective, batch = trained
    model = objective.modules["lm"].eval()
    with torch.no_grad():
        h_ND = torch.randn(1, model.dim).repeat(4000, 1)
        uniform_NS = torch.rand(4000, objective.stage.slots, generator=torch.Generator().manual_seed(0))
        codes_NS = model.depth.drawn(h_ND, uniform_NS)
        first = torch.bincount(codes_NS[:, 0], minlength=objective.stage.vocab) / 4000
        label_SN = torch.stack([torch.arange(objective.stage.vocab), torch.zeros(objective.stage.vocab, dtype=torch.int64)])
        told = (-model.depth.nats(h_ND[:objective.stage.vocab], label_SN)[0]).exp()
    assert torch.allclose(first, told, atol=0.03)
