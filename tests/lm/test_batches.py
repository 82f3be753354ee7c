"""LM batches: the right tokens of the right crop, whatever the number of workers, the cache or the other rows."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from audiolm import store as stored
from audiolm.config.corpus import ClipFilter
from audiolm.config.lm import LMConfig, StageConfig
from audiolm.config.training import TrainConfig
from audiolm.data import tokens
from audiolm.data.clips import clips_parquet, read_clips
from audiolm.lm.batches import TokenBatches
from audiolm.lm.layouts import build_stages
from tests.worlds import token_corpus
from tests.worlds.layouts import PAPER

TRAIN = TrainConfig(steps=1, batch=4, lr=1e-3)
FRAMES = {"train": [70, 30, 9, 25, 50, 41, 26, 12], "dev": [33, 80, 20, 25]}


ALIGNED = {**PAPER, "conditioning": "aligned", "condition_dropout": 0.1}


def stages(dedupe=True, kind="flat"):
    shape = {"dim": 16, "layers": 1, "heads": 2, "ff": 32, "train": TRAIN}
    config = LMConfig(**(PAPER if kind == "flat" else ALIGNED), dedupe=dedupe, coarse_levels=2,
                      semantic=StageConfig(crop_s=2.0, **shape), coarse=StageConfig(crop_s=1.0, kind=kind, **shape),
                      fine=StageConfig(crop_s=0.4, **shape))
    return build_stages(config, token_corpus.N_Q, token_corpus.VOCAB, token_corpus.K)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return token_corpus.make(tmp_path_factory.mktemp("corpus"), FRAMES, sources=("a", "b"))


def data(corpus, name="lm_coarse", split="train", where=None, batch=4, seed=0, dedupe=True, kind="flat", **options):
    paths = [corpus.paths[n] for n in ("manifest", "semantic_tokens", "acoustic_tokens")]
    return TokenBatches(*paths, stages(dedupe and kind == "flat", kind)[name], split, where, batch, seed, **options)


def documents(d, row, i=0):
    """(ids, target) of each document of row i of a batch, and the slots left over."""
    doc_T = row["doc_BT"][i].numpy()
    assert (np.diff(doc_T) >= 0).all() and (np.diff(doc_T) <= 1).all() and doc_T[0] == 0
    parts = [(row["ids_BT"][i].numpy()[doc_T == n], row["target_BT"][i].numpy()[doc_T == n]) for n in range(doc_T[-1] + 1)]
    rest = 0
    if (parts[-1][0] == d.stage.bos).all():
        ids, target = parts.pop()
        rest = len(ids)
        assert not target.any()
    return parts, rest


@pytest.mark.parametrize("dedupe", [True, False])
@pytest.mark.parametrize("name", ["lm_semantic", "lm_coarse", "lm_fine"])
def test_documents_are_the_stages_packing_of_their_clips(corpus, name, dedupe):
    d = data(corpus, name, dedupe=dedupe)
    names = [c.id for c in d.clips]
    ends = set()
    for step in range(20):
        batch = d.batch(step, range(4))
        assert batch["ids_BT"].shape == (4, d.stage.max_len) == batch["target_BT"].shape == batch["doc_BT"].shape
        for i in range(4):
            parts, _ = documents(d, batch, i)
            spans = d.spans(step, i)
            assert len(parts) == len(spans)
            for (ids, target), (clip, start, stop) in zip(parts, spans, strict=True):
                z, codes = corpus.z[names[clip]], corpus.codes[names[clip]]
                at_end = stop == len(z)
                expected = d.stage.pack(z[start:stop] if d.semantic else None,
                                        codes[2 * start:2 * stop, d.stage.columns] if d.acoustic else None, at_end)
                assert np.array_equal(ids, expected.ids) and np.array_equal(target, expected.target)
                if name == "lm_semantic":
                    assert (ids[-1] == d.stage.eos) == at_end
                    assert not dedupe or start == 0 or z[start] != z[start - 1]  # a run is not cut
                ends.add(at_end)
    assert ends == {True, False}


def test_documents_of_frames_are_the_packed_crops_a_position_a_frame(corpus):
    d = data(corpus, kind="frame")
    dropped = 0
    for step in range(20):
        batch = d.batch(step, range(4))
        assert batch["ids_BT"].shape == (4, d.stage.max_len) == batch["cond_BTC"].shape[:2] and d.stage.max_len == 25 * 3 + 2
        for i in range(4):
            packed, (parts, _) = d.documents(step, i), documents(d, batch, i)
            ends = np.cumsum([len(ids) for ids, _ in parts])
            added = np.split(batch["cond_BTC"][i].numpy(), ends)[:len(packed)]
            for (ids, target), cond, flat, (clip, start, stop) in zip(parts, added, packed, d.spans(step, i), strict=True):
                codes, first = flat.ids[flat.target].reshape(-1, 2), int(flat.target.argmax())
                assert ids.tolist() == [*flat.ids[:first], *codes[:, 0]] and target.tolist() == [n >= first for n in
                                                                                                 range(len(ids))]
                assert cond[first:, 1].tolist() == codes[:, 1].tolist() and (cond[:first, 1] == d.stage.no_cond).all()
                z = corpus.z[d.clips[clip].id][start:stop].repeat(2)
                given = first > 2 or len(z) == 2
                dropped += not given
                assert cond[first - 1:-1, 0].tolist() == (z.tolist() if given else [d.stage.no_cond] * len(z))
                assert (cond[:first - 1, 0] == d.stage.no_cond).all() and cond[-1, 0] == d.stage.no_cond
    assert dropped


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Clips of 0.5 to 30 s with runs of about 1.5 frames: 13 minutes."""
    draw = np.random.default_rng(3)
    frames = [int(n) for n in np.concatenate([draw.integers(13, 751, 48), draw.integers(13, 60, 12)])]
    return token_corpus.make(tmp_path_factory.mktemp("speech"), {"train": frames, "dev": [30]}, per_shard=10, runs=True)


def paper_stage(corpus, name, dedupe=True, batch=1, seed=0, kind="flat"):
    coarse = LMConfig().coarse.model_copy(update={"kind": kind})
    config = LMConfig(**PAPER, dedupe=dedupe, coarse_levels=2, coarse=coarse)
    stage = build_stages(config, token_corpus.N_Q, token_corpus.VOCAB, token_corpus.K)[name]
    paths = [corpus.paths[n] for n in ("manifest", "semantic_tokens", "acoustic_tokens")]
    return TokenBatches(*paths, stage, "train", None, batch, seed)


@pytest.mark.parametrize("name, dedupe, kind", [
    ("lm_semantic", True, "flat"), ("lm_semantic", False, "flat"), ("lm_coarse", True, "flat"), ("lm_coarse", False, "flat"),
    ("lm_coarse", False, "frame"), ("lm_fine", True, "flat")])
def test_rows_are_full_and_an_epoch_sees_every_frame_about_once(speech, name, dedupe, kind):
    d = paper_stage(speech, name, dedupe, kind=kind)
    rows, full = d.plan.rows, []
    seen = [np.zeros(n, int) for n in d.frames]
    for epoch in range(4):
        for step in range(epoch * rows, (epoch + 1) * rows):
            _, rest = documents(d, d.batch(step, [0]))
            full.append(1 - rest / d.stage.max_len)
            for clip, start, stop in d.spans(step, 0):
                seen[clip][start:stop] += 1
        times = np.concatenate(seen)
        if epoch == 0:
            assert np.mean(times == 1) > 0.9 and np.mean(times == 0) < 0.05 and times.max() <= 2
        assert times.mean() == pytest.approx(epoch + 1, rel=0.05)
    assert np.mean(full) > 0.975 and min(full) > 0.85
    assert times.min() > 0  # what one epoch leaves out, another reads
    assert all(s.sum() > 0 for s in seen)


def test_fine_rows_hold_one_to_three_seconds(speech):
    d = paper_stage(speech, "lm_fine")
    assert (d.stage.min_crop_frames, d.stage.crop_frames) == (25, 75)
    rows = [d.spans(step, 0) for step in range(400)]
    inner = [stop - start for row in rows for clip, start, stop in row if 0 < start and stop < d.frames[clip]]
    assert min(inner) >= 9 and max(inner) == 75 and np.mean([25 <= n <= 75 for n in inner]) > 0.9
    assert {1, 2} <= {len(row) for row in rows}
    assert len({n for n in inner if 25 <= n < 75}) > 20
    whole = build_stages(LMConfig(fine=LMConfig().fine.model_copy(update={"min_crop_s": 0.0})), 12, 16, 12)["lm_fine"]
    assert whole.min_crop_frames == 0 and build_stages(LMConfig(), 12, 16, 12)["lm_coarse"].min_crop_frames == 0


@pytest.mark.parametrize("name, kind", [("lm_semantic", "flat"), ("lm_coarse", "flat"), ("lm_coarse", "frame"),
                                        ("lm_fine", "flat")])
@pytest.mark.parametrize("world", [2, 4])
def test_workers_together_hold_the_batches_of_one(corpus, name, kind, world):
    one, share = data(corpus, name, kind=kind), 4 // world
    ranks = [data(corpus, name, kind=kind) for _ in range(world)]
    for step in range(8):
        whole = one.batch(step, range(4))
        parts = [rank.batch(step, range(r * share, (r + 1) * share)) for r, rank in enumerate(ranks)]
        assert all(torch.equal(torch.cat([p[key] for p in parts]), whole[key]) for key in whole)


def test_any_step_is_read_directly_and_neither_cache_nor_threads_change_it(corpus):
    d = data(corpus)
    replay = [d.batch(s, range(4)) for s in range(30)]
    for step in (29, 3, 17):
        small = data(corpus, cache_mb=0).batch(step, range(4))
        assert all(torch.equal(small[k], replay[step][k]) for k in small)
    shared = data(corpus)
    with ThreadPoolExecutor(4) as pool:
        for step, got in enumerate(pool.map(lambda s: shared.batch(s, range(4)), range(30))):
            assert all(torch.equal(got[k], replay[step][k]) for k in got)


def test_the_cache_knows_what_its_shards_take(corpus):
    for name, kind in (("lm_semantic", "flat"), ("lm_coarse", "flat"), ("lm_coarse", "frame"), ("lm_fine", "flat")):
        d = data(corpus, name, kind=kind, cache_mb=0)
        for step in range(10):
            d.batch(step, range(4))
            assert len(d.cache) == 1
        shard = d.cache[0]
        assert d.cache.bytes == sum(a.nbytes for a in (shard.firsts, shard.z_T, shard.codes_TQ, shard.ids_before)
                                    if a is not None) - 16  # two ends


@pytest.mark.parametrize("lengths", [[30], [5, 3, 9], [1]])
def test_a_corpus_shorter_than_a_row_fills_it_by_repeating(tmp_path, lengths):
    c = token_corpus.make(tmp_path, {"train": lengths, "dev": [9]}, per_shard=1)
    for name in ("lm_semantic", "lm_coarse", "lm_fine"):
        d = paper_stage(c, name, batch=3)
        for step in range(4):
            batch = d.batch(step, range(3))
            for i in range(3):  # less than the shortest piece is left
                assert documents(d, batch, i)[1] < 8 * (d.stage.frame_ids + 1) + d.stage.n_special


def test_an_object_store_gives_the_same(corpus, store):
    for name, path in corpus.paths.items():
        for file in stored.names(path):
            stored.put(stored.join(store, name, file), stored.get(stored.join(path, file)))
    paths = [stored.join(store, n) for n in ("manifest", "semantic_tokens", "acoustic_tokens")]
    there, here = TokenBatches(*paths, stages()["lm_coarse"], "train", None, 4, 0), data(corpus)
    for step in range(5):
        a, b = there.batch(step, range(4)), here.batch(step, range(4))
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name, columns", [("lm_semantic", {"q00"}), ("lm_coarse", {"q00", "q01"}),
                                           ("lm_fine", {"q00", "q01", "q02"})])
def test_only_the_stages_columns_are_read(corpus, monkeypatch, name, columns):
    asked = {}
    real = tokens.open_columns

    def spy(path, wanted):
        asked.setdefault(path.split("/")[-2], set()).update(wanted)
        return real(path, wanted)

    monkeypatch.setattr(tokens, "open_columns", spy)
    data(corpus, name).batch(0, range(4))
    assert asked.get("acoustic_tokens") == (columns if name != "lm_semantic" else None)
    assert asked.get("semantic_tokens") == ({"q00"} if name != "lm_fine" else None)


def test_fixed_crops_are_legal_different_and_evenly_spread(corpus):
    d = data(corpus, split="dev")
    everything = d.fixed(1000)
    assert everything == [(0, 0), (0, 8), (1, 0), (1, 25), (1, 50), (1, 55), (2, 0), (3, 0)]
    some = d.fixed(4)
    assert some == data(corpus, split="dev", seed=9, batch=2).fixed(4)
    assert len(set(some)) == 4 and set(some) <= set(everything)
    assert len({clip for clip, _ in some}) >= 3


def test_splits_and_where_are_kept_apart(corpus):
    dev = data(corpus, split="dev")
    assert dev.frames.tolist() == FRAMES["dev"] and {c.split for c in dev.clips} == {"dev"}
    only, every = data(corpus, where=ClipFilter(source=("b",))), data(corpus)
    assert only.frames.tolist() == FRAMES["train"][1::2] and every.frames.tolist() == FRAMES["train"]
    for i, n in enumerate(only.frames):
        assert np.array_equal(only.read(i, 0, n)[1], every.read(2 * i + 1, 0, n)[1])
    only.batch(0, range(4))
    with pytest.raises(ValueError, match="no train clips"):
        data(corpus, where=ClipFilter(source=("none",)))


def test_stores_that_do_not_belong_together_are_refused(corpus, tmp_path):
    other = token_corpus.make(tmp_path, {"train": [9, 9, 9, 9, 9, 9, 9, 9], "dev": [9, 9, 9, 9]}, seed=1)
    with pytest.raises(tokens.TokenError, match="1:2"):
        TokenBatches(corpus.paths["manifest"], corpus.paths["semantic_tokens"], other.paths["acoustic_tokens"],
                     stages()["lm_coarse"], "train", None, 4, 0)
    with pytest.raises(tokens.TokenError, match="clip train-0 has 18 frames in .* the manifest gives 140"):
        TokenBatches(corpus.paths["manifest"], None, other.paths["acoustic_tokens"], stages()["lm_fine"], "train", None, 4, 0)
    with pytest.raises(ValueError, match="needs semantic_tokens"):
        TokenBatches(corpus.paths["manifest"], None, None, stages()["lm_semantic"], "train", None, 4, 0)


def test_copies_at_other_speeds_stand_behind_a_shards_clips(tmp_path):
    c, draw = token_corpus.make(tmp_path, {"train": [40, 30, 20, 60], "dev": [25]}), np.random.default_rng(0)
    path = c.paths["semantic_tokens"]
    meta = {k: v for k, v in tokens.read_meta(f"{path}/shard-00000.parquet").items() if k not in tokens.OWN}
    copies = {}
    for k in range(3):
        own = [clip for clip in c.clips if clip.shard == k]
        codes = {clip.id: c.z[clip.id] for clip in own}
        for clip in own if k < 2 else ():
            frames = math.ceil(math.ceil(clip.samples / 0.9) / 640)
            codes[f"{clip.id}@0.9"] = copies[f"{clip.id}@0.9"] = draw.integers(0, token_corpus.K, frames)
        data_k = tokens.shard_bytes(list(codes), [z[:, None] for z in codes.values()], {**meta, "speeds": [0.9]}, k, True)
        stored.put(f"{path}/{tokens.shard_name(k)}", data_k)
    tokens.index_shards(path)
    train, dev = (TokenBatches(c.paths["manifest"], path, None, stages()["lm_semantic"], split, None, 2, 0)
                  for split in ("train", "dev"))
    order = ["train-0", "train-1", "train-2", "train-0@0.9", "train-1@0.9", "train-2@0.9", "train-3", "train-3@0.9"]
    assert len(train.frames) == 8 and dev.frames.tolist() == [25]
    for i, name in enumerate(order):
        assert np.array_equal(train.read(i, 0, train.frames[i])[0], copies.get(name, c.z.get(name)))
    assert {clip for step in range(30) for i in range(2) for clip, *_ in train.spans(step, i)} == set(range(8))


def test_a_clip_that_is_not_in_the_store_is_named(corpus, tmp_path):
    clips = read_clips(corpus.paths["manifest"])
    for name, changed, text in (("strange", [replace(clips[0], id="stranger"), *clips[1:]], "clip stranger of the manifest"),
                                ("more", [*clips[:3], replace(clips[2], id="new", row=3)], "clip new of .* is not row 3"),
                                ("fewer", clips[:2], "has 3 clips, the manifest has 2"),
                                ("further", [*clips, replace(clips[0], shard=99)], "shard 99")):
        stored.put(str(tmp_path / name / "clips.parquet"), clips_parquet(changed))
        with pytest.raises(tokens.TokenError, match=text):
            TokenBatches(str(tmp_path / name), corpus.paths["semantic_tokens"], None, stages()["lm_semantic"], "train", None,
                         1, 0)
