"""LM batches: the right tokens of the right crop, whatever the number of workers, the cache or the other rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from audiolm import store
from audiolm.config import LM, Stage, Train, Where
from audiolm.data import tokens
from audiolm.data.batches import TokenBatches
from audiolm.data.manifest import read_clips
from audiolm.lm.stages import build_stages, dedupe
from tests import token_corpus

TRAIN = Train(steps=1, batch=4, lr=1e-3)
FRAMES = {"train": [70, 30, 9, 25, 50, 41, 26, 12], "dev": [33, 80, 20, 25]}


def stages(dedupe=True):
    shape = {"dim": 16, "layers": 1, "heads": 2, "ff": 32, "train": TRAIN}
    config = LM(dedupe=dedupe, coarse_levels=2, semantic=Stage(crop_s=2.0, **shape), coarse=Stage(crop_s=1.0, **shape),
                fine=Stage(crop_s=0.4, **shape))
    return build_stages(config, token_corpus.N_Q, token_corpus.VOCAB, token_corpus.K)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return token_corpus.make(tmp_path_factory.mktemp("corpus"), FRAMES, sources=("a", "b"))


def data(corpus, name="lm_coarse", split="train", where=None, batch=4, seed=0, **options):
    paths = [corpus.paths[n] for n in ("manifest", "semantic_tokens", "acoustic_tokens")]
    return TokenBatches(*paths, stages()[name], split, where, batch, seed, **options)


def test_semantic_rows_are_the_crops_deduplicated(corpus):
    d = data(corpus, "lm_semantic")
    seen_end = set()
    for step in range(20):
        batch = d.batch(step, range(4))
        for i in range(4):
            clip, start = d.order.row(step, i)
            z = corpus.z[d.clips[clip].id]
            at_end = start + 50 >= len(z)
            expected = [d.stage.bos, *dedupe(z[start:start + 50]), *([d.stage.eos] if at_end else [])]
            n = int((batch["doc_BT"][i] == 0).sum())
            assert batch["ids_BT"][i, :n].tolist() == expected
            padding = len(batch["ids_BT"][i]) - n
            assert batch["target_BT"][i].tolist() == [False] + [True] * (n - 1) + [False] * padding
            seen_end.add(at_end)
    assert seen_end == {True, False}


def test_coarse_rows_join_both_stores_at_the_same_time(corpus):
    d = data(corpus, "lm_coarse")
    for step in range(20):
        for i, row in enumerate(d.order.row(step, i) for i in range(4)):
            clip, start = row
            about, batch = d.clips[clip].id, d.batch(step, [i])
            stop = min(start + 25, len(corpus.z[about]))
            head, targets = d.stage.split(batch["ids_BT"][0].numpy())
            assert head[1:-1].tolist() == dedupe(corpus.z[about][start:stop]).tolist()
            assert np.array_equal(d.stage.unpack(targets), corpus.codes[about][2 * start:2 * stop, :2])


def test_fine_rows_hold_all_levels(corpus):
    d = data(corpus, "lm_fine")
    clip, start = d.order.row(5, 1)
    ids, target = d.packed(clip, start)
    assert np.array_equal(d.stage.unpack(ids[target]), corpus.codes[d.clips[clip].id][2 * start:2 * (start + 10), 2:])


@pytest.mark.parametrize("name", ["lm_semantic", "lm_coarse", "lm_fine"])
@pytest.mark.parametrize("world", [2, 4])
def test_workers_together_hold_the_batches_of_one(corpus, name, world):
    one, share = data(corpus, name), 4 // world
    ranks = [data(corpus, name) for _ in range(world)]
    for step in range(8):
        whole = one.batch(step, range(4))
        for r, rank in enumerate(ranks):
            part = rank.batch(step, range(r * share, (r + 1) * share))
            for key in whole:
                mine = whole[key][r * share:(r + 1) * share]
                length = part[key].shape[1]
                assert torch.equal(mine[:, :length], part[key])
                assert not whole["target_BT"][r * share:(r + 1) * share, length:].any()  # what is cut off was padding


def test_any_step_is_read_directly_and_the_cache_changes_nothing(corpus):
    d = data(corpus)
    replay = [d.batch(s, range(4)) for s in range(30)]
    for step in (29, 3, 17):
        small = data(corpus, cache_mb=0).batch(step, range(4))
        assert all(torch.equal(small[k], replay[step][k]) for k in small)


def test_cache_is_bounded(corpus):
    d = data(corpus, cache_mb=0)
    for step in range(10):
        d.batch(step, range(4))
    assert len(d._cache) == 1
    assert d._held == next(iter(d._cache.values()))[2]


@pytest.mark.parametrize("name, columns", [("lm_semantic", {"q00"}), ("lm_coarse", {"q00", "q01"}),
                                           ("lm_fine", {"q00", "q01", "q02"})])
def test_only_the_stages_columns_are_read(corpus, monkeypatch, name, columns):
    asked = {}
    real = tokens.read_shard

    def spy(path, wanted):
        asked.setdefault(path.split("/")[-2], set()).update(wanted)
        return real(path, wanted)

    monkeypatch.setattr(tokens, "read_shard", spy)
    data(corpus, name).batch(0, range(4))
    store_of = "semantic_tokens" if name == "lm_semantic" else "acoustic_tokens"
    assert asked[store_of] == columns | {"id"}
    assert ("acoustic_tokens" in asked) == (name != "lm_semantic")
    assert ("semantic_tokens" in asked) == (name != "lm_fine")


def test_fixed_crops_are_legal_different_and_evenly_spread(corpus):
    d = data(corpus, split="dev")
    everything = d.fixed(1000)
    assert everything == [(0, 0), (0, 8), (1, 0), (1, 25), (1, 50), (1, 55), (2, 0), (3, 0)]
    some = d.fixed(4)
    assert some == data(corpus, split="dev", seed=9, batch=2).fixed(4)
    assert len(set(some)) == 4 and set(some) <= set(everything)
    assert len({clip for clip, _ in some}) >= 3


def test_splits_and_where_are_kept_apart(corpus):
    assert {c.split for c in data(corpus, split="dev").clips} == {"dev"}
    only = data(corpus, where=Where(source=("b",)))
    assert {c.source for c in only.clips} == {"b"} and len(only.clips) == 4
    with pytest.raises(ValueError, match="no train clips"):
        data(corpus, where=Where(source=("none",)))


def test_stores_that_do_not_belong_together_are_refused(corpus, tmp_path):
    other = token_corpus.make(tmp_path, {"train": [9, 9, 9, 9, 9, 9, 9, 9], "dev": [9, 9, 9, 9]}, seed=1)
    with pytest.raises(tokens.TokenError, match="1:2"):
        TokenBatches(corpus.paths["manifest"], corpus.paths["semantic_tokens"], other.paths["acoustic_tokens"],
                     stages()["lm_coarse"], "train", None, 4, 0)
    longer = TokenBatches(corpus.paths["manifest"], None, other.paths["acoustic_tokens"], stages()["lm_fine"], "train",
                          None, 4, 0)
    with pytest.raises(tokens.TokenError, match="manifest gives"):
        for step in range(10):
            longer.batch(step, range(4))
    with pytest.raises(ValueError, match="needs semantic_tokens"):
        TokenBatches(corpus.paths["manifest"], None, None, stages()["lm_semantic"], "train", None, 4, 0)


def test_a_clip_that_is_not_in_the_store_is_named(corpus, tmp_path):
    clip = read_clips(corpus.paths["manifest"])[0]
    renamed = type(clip)(**{**vars(clip), "id": "stranger"})
    store.put(str(tmp_path / "clips.parquet"), token_corpus.clips_parquet([renamed]))
    d = TokenBatches(str(tmp_path), corpus.paths["semantic_tokens"], None, stages()["lm_semantic"], "train", None, 1, 0)
    with pytest.raises(tokens.TokenError, match="clip stranger"):
        d.batch(0, [0])
