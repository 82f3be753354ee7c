"""Weights go on with another tokenizer's ids: renamed ids change no loss, split ids begin as what they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from audiolm import store
from audiolm.config.lm import ParallelConfig, StageConfig
from audiolm.config.start import StartConfig
from audiolm.config.training import TrainConfig
from audiolm.data import tokens
from audiolm.tokenizers.artifact import write_export
from audiolm.tokenizers.start import start_weights
from audiolm.train.objectives import carry, lm, parallel
from audiolm.train.objectives.base import Context
from tests.worlds import token_corpus
from tests.worlds.layouts import PAPER

K = token_corpus.K
RENAMED = np.random.default_rng(1).permutation(K)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return token_corpus.make(tmp_path_factory.mktemp("corpus"), {"train": [60] * 8, "dev": [40, 33]})


def stage(paths, name: str, seed: int, start=None, levels: int = 2):
    """A stage's or the parallel decoder's objective on a token corpus."""
    name, _, kind = name.partition(" ")
    train = TrainConfig(steps=40, batch=8, lr=1e-2, warmup_steps=5, engine="torch")
    sizes = {"crop_s": 0.8, "dropout": 0.0, "train": train, "dim": 32, "layers": 2, "heads": 2, "ff": 64}
    config = {"stage": name, "seed": seed, "rows": 6, **({"start": start} if start else {}),
              "layout": {**PAPER, "dedupe": name == "lm_semantic", "lengths": name == "lm_semantic", "coarse_levels": levels}}
    ctx = Context(0, 1, torch.device("cpu"), seed)
    if name == "lm_parallel":
        config |= {"lm": ParallelConfig(**sizes), "layout": {"condition_dropout": 0.2, "tied": False}}
        return parallel.parallel_objective(config, paths, ctx)
    shape = StageConfig(**sizes, kind=kind or "flat", depth={"dim": 16, "layers": 2, "ff": 32})
    return lm.lm_objective({**config, "lm": shape}, paths, ctx)


def exported(corpus, objective, folder, step: str):
    """A planned start at a run that has exported the objective and its tokens."""
    write_export(str(folder / step), *objective.export())
    steps = {step: {"path": str(folder / step)}, "semantic_tokens": {"path": corpus.paths["semantic_tokens"]}}
    store.put_json(str(folder / "runs" / "old.json"), {"steps": steps})
    return start_weights(f"lm.{step.removeprefix('lm_')}.start.uri", StartConfig(uri=str(folder / "runs" / "old.json")), step)


@pytest.mark.parametrize("name", ["lm_semantic", "lm_coarse", "lm_coarse frame", "lm_parallel"])
def test_renamed_ids_change_no_loss_and_split_ids_begin_as_they_were(corpus, name, tmp_path):
    first = stage(corpus.paths, name, 1)
    start = exported(corpus, first, tmp_path, name.split()[0])
    renamed = stage(token_corpus.retokenized(corpus.paths, tmp_path / "renamed", K, lambda z: RENAMED[z]), name, 2, start)
    assert renamed.evaluate()["loss"] == pytest.approx(first.evaluate()["loss"], rel=1e-5)
    halves = token_corpus.retokenized(corpus.paths, tmp_path / "halves", 2 * K, lambda z: z + K * (np.arange(len(z)) % 2))
    split = stage(halves, name, 2, start)
    weights = first.export()[0]
    for table in (["embed.weight"] if name == "lm_parallel" else carry.semantic_tables(first.stage)):
        old, new = weights[table], split.export()[0][table]
        assert torch.allclose(new[:2 * K], old[:K].repeat(2, 1)) and torch.equal(new[2 * K:], old[K:])


def test_stores_without_a_common_clip_leave_ids_as_they_are_and_other_numbers_are_refused(corpus, tmp_path):
    first = stage(corpus.paths, "lm_semantic", 1)
    start = exported(corpus, first, tmp_path, "lm_semantic")
    assert carry.shares(*(tokens.TokenStore(p["semantic_tokens"]) for p in (
        corpus.paths, token_corpus.retokenized(corpus.paths, tmp_path / "apart", K, lambda z: z, "new-")))) is None
    weights, k = carry.carried(first.export()[0], ["embed.weight"], K, start, str(tmp_path / "apart" / "tokens"))
    assert k == K and torch.equal(weights["embed.weight"], first.export()[0]["embed.weight"])
    alone = start.model_copy(update={"tokens": ""})
    more = token_corpus.retokenized(corpus.paths, tmp_path / "more", 2 * K, lambda z: z)
    with pytest.raises(ValueError, match=r"lm\.semantic\.start\.uri: .*semantic\.kmeans\.k is 24: set it to 12"):
        stage(more, "lm_semantic", 2, alone)


def test_an_id_of_no_frame_begins_as_the_mean_of_all_frames(corpus, tmp_path):
    new = tokens.TokenStore(token_corpus.retokenized(corpus.paths, tmp_path, K + 1, lambda z: z)["semantic_tokens"])
    share_NO = carry.shares(tokens.TokenStore(corpus.paths["semantic_tokens"]), new)
    ids = np.concatenate(list(corpus.z.values()))
    assert torch.equal(share_NO[:K], torch.eye(K, dtype=torch.float64))
    assert np.allclose(share_NO[K], np.bincount(ids, minlength=K) / len(ids))


def test_which_tokens_a_start_has_is_part_of_its_identity(corpus, tmp_path):
    start = exported(corpus, stage(corpus.paths, "lm_semantic", 1), tmp_path, "lm_semantic")
    assert start.tokens == corpus.paths["semantic_tokens"] and start.tokens_build
