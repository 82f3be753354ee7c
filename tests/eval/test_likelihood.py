"""Likelihood figures: baselines that are right on known laws, a planted better model wins, conditioning is noticed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from audiolm.config.lm import LMConfig, StageConfig
from audiolm.config.training import TrainConfig
from audiolm.eval.metrics import likelihood
from audiolm.eval.metrics.token_statistics import sampled_statistics
from audiolm.lm.batches import TokenBatches
from audiolm.lm.layouts import build_stages
from tests.worlds import token_corpus
from tests.worlds.layouts import PAPER
from tests.worlds.token_corpus import STAY, VOCAB, K

TRUE = STAY + (1 - STAY) / K  # chance of the semantic chain's next token
ENTROPY = -(TRUE * np.log(TRUE) + (K - 1) * (1 - STAY) / K * np.log((1 - STAY) / K))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return token_corpus.make(tmp_path_factory.mktemp("corpus"), {"train": [100] * 30, "dev": [50] * 12})


def stage(name, dedupe=False):
    shape = StageConfig(crop_s=1.0, train=TrainConfig(steps=1, batch=4, lr=1e-3))
    return build_stages(LMConfig(**PAPER, dedupe=dedupe, coarse_levels=2, semantic=shape, coarse=shape, fine=shape),
                        token_corpus.N_Q, VOCAB, K)[name]


def data(corpus, value, split):
    paths = [corpus.paths[n] for n in ("manifest", "semantic_tokens", "acoustic_tokens")]
    return TokenBatches(*paths, value, split, None, 4, 0)


class Planted(nn.Module):
    """Predicts by the law that made the tokens; `uses_prefix=False` ignores the prefix."""

    def __init__(self, value, uses_prefix=True):
        super().__init__()
        self.stage, self.uses_prefix = value, uses_prefix

    def forward(self, ids_BT, docs, index_SN, label_SN, *_):
        out = torch.zeros(*ids_BT.shape, self.stage.vocab_size)
        for row, ids in zip(out, ids_BT.tolist(), strict=True):
            self._row(row, ids)
        return nats(self.stage, out, index_SN, label_SN)

    def _row(self, row, ids):
        s = self.stage
        if s.name == "semantic":
            for t, i in enumerate(ids[:-1]):
                row[t, (i + 5) % K if i < K else 0] += np.log(STAY * K / (1 - STAY) + 1) * (i < K)
                row[t, s.eos + 1:] -= 20.0
                row[t, K:s.eos] -= 20.0
            return
        sep = ids.index(s.sep)
        for t in range(sep, len(ids) - 1):
            slot, frame = (t - sep) % s.slots, (t - sep) // s.slots
            row[t, :] -= 20.0
            legal = torch.from_numpy(s.slot_ids()[slot][:s.vocab])
            row[t, legal] += 20.0
            if s.name == "coarse" and not slot:
                row[t, s.eos] += 20.0
            if slot or not self.uses_prefix:
                continue
            if s.name == "coarse":
                known = ids[1 + frame // 2] if 1 + frame // 2 < sep else None
            else:
                at = 1 + s.n_coarse * frame
                known = (ids[at] + 1) % VOCAB if at < sep else None
            if known is not None and 0 <= known < VOCAB:
                row[t, s.offset + s.levels[0] * VOCAB + known] += np.log(STAY * VOCAB / (1 - STAY) + 1)


class Blind(nn.Module):
    """Predicts every legal id with equal probability."""

    def __init__(self, value):
        super().__init__()
        self.stage = value

    def forward(self, ids_BT, docs, index_SN, label_SN, *_):
        return nats(self.stage, torch.zeros(*ids_BT.shape, self.stage.vocab_size), index_SN, label_SN)


def nats(value, logits_BTV, index_SN, label_SN):
    """What a stage's heads would say where their scores were these."""
    return torch.stack([nn.functional.cross_entropy(logits_BTV.flatten(0, 1)[index_N][:, ids], label_N, reduction="none")
                        for ids, index_N, label_N in zip(value.slot_ids(), index_SN, label_SN, strict=True)])


def test_the_bigram_beats_the_unigram_on_a_markov_chain_and_the_true_law_wins(corpus):
    s = stage("lm_semantic")
    result = likelihood.stage_figures(Planted(s), s, data(corpus, s, "train"), data(corpus, s, "dev"), 100)
    assert result["unigram"] == pytest.approx(np.log(K), abs=0.1)
    assert result["loss"] < result["bigram"] < 0.75 * result["unigram"]
    assert abs(result["fivegram"] - result["bigram"]) < 0.1  # longer contexts hold no more
    assert ENTROPY - 0.1 < result["loss"] < ENTROPY + 0.3  # a crop's first token and its EOS cost more
    assert result["better"] in ("bigram", "fivegram") and result["baseline"] == result[result["better"]]
    assert result["difference_percent"] == pytest.approx(100 * (result["loss"] / result["baseline"] - 1)) and result["loss"] > 0
    assert (result["counted"], result["tokens"]) == (30 * 101, 12 * 51)  # each clip's tokens once, with its EOS
    worse = likelihood.stage_figures(Blind(s), s, data(corpus, s, "train"), data(corpus, s, "dev"), 100)
    assert worse["loss"] == pytest.approx(np.log(K + 1), rel=1e-5)
    assert worse["loss"] > result["unigram"] and worse["bigram"] == result["bigram"] and worse["difference_percent"] > 0
    assert likelihood.above_baseline({"lm_semantic": result, "lm_b": worse}) == [
        {"stage": "lm_b", "level": None, "better": worse["better"], "percent": worse["difference_percent"]}]


def test_acoustic_baselines_look_one_frame_back_and_one_level_down(corpus):
    s = stage("lm_coarse")
    result = likelihood.stage_figures(Planted(s), s, data(corpus, s, "train"), data(corpus, s, "dev"), 100)
    one, two = result["levels"]
    assert (one["level"], two["level"]) == (1, 2)
    assert two["previous"] < 0.7 * two["unigram"] and two["better"] == "previous"  # level 2 repeats itself
    assert one["previous"] < one["unigram"]  # two acoustic frames share a semantic one
    assert one["loss"] < one["previous"]  # the semantic prefix holds more
    assert one["below"] is None and result["below"] is None and two["below"] == pytest.approx(two["unigram"], abs=0.1)
    assert result["tokens"] == 12 * 100 * 2  # without deduplication stage 2 has no EOS
    assert result["baseline"] == pytest.approx((one["previous"] + two["previous"]) / 2)
    over = likelihood.above_baseline({"lm_coarse": result})  # Planted has no law for level 2
    assert [(r["stage"], r["level"]) for r in over if r["level"]] == [("lm_coarse", 2)]


def test_the_level_below_a_fine_level_is_the_last_coarse_one():
    s, draw = stage("lm_fine"), np.random.default_rng(0)

    def rows(n):
        codes = draw.integers(0, VOCAB, (n, 50, 3))
        codes[:, :, 2] = (codes[:, :, 1] * 3 + 1) % VOCAB
        return [s.pack(None, c, True) for c in codes]

    result = {name: sums[0, 3] / sums[1, 3] for name, sums in likelihood.sums(s, rows(40), rows(5)).items()}
    assert result["below"] < 0.1 and result["previous"] > 2.5 and result["unigram"] == pytest.approx(np.log(VOCAB), abs=0.05)


@pytest.mark.parametrize("name, dedupe", [("lm_semantic", True), ("lm_semantic", False), ("lm_coarse", True),
                                          ("lm_fine", True)])
def test_baselines_count_what_the_stage_counts_and_know_what_it_may_say(corpus, name, dedupe):
    s = stage(name, dedupe)
    dev = data(corpus, s, "dev")
    rows = [dev.packed(*c) for c in dev.fixed(100)]
    counted = likelihood.loss_sums(Planted(s), s, dev, rows)[1]
    legal = {"lm_semantic": [K + 1], "lm_coarse": [0, VOCAB + 1, VOCAB], "lm_fine": [0, 0, 0, VOCAB]}[name]  # level 1 has EOS
    for result, (nats, number) in likelihood.sums(s, [], rows).items():
        absent = result == "below" and name == "lm_coarse"
        assert (number == np.where(absent & (np.arange(len(number)) < 2), 0, counted)).all()
        if not dedupe or name != "lm_semantic":  # nothing was counted: all that is legal is as likely
            assert nats == pytest.approx(number * np.log(np.maximum(legal, 1)))
        else:
            assert nats == pytest.approx(len(rows) * np.log(K + 1) + (number - len(rows)) * np.log(K))


def test_baselines_count_originals_of_spread_shards(corpus):
    s = stage("lm_semantic")
    train = data(corpus, s, "train")
    few = list(likelihood.train_rows(train, most=600))  # of ten shards of 300 frames
    expected = [c for c in corpus.clips if c.split == "train" and c.shard in (2, 7)]
    assert sum(len(row.ids) for row in few) == sum(len(corpus.z[c.id]) + -(-len(corpus.z[c.id]) // 25) + 1 for c in expected)
    assert len(list(likelihood.train_rows(train, most=1))) == 12 and len(list(likelihood.train_rows(train))) == 120


@pytest.mark.parametrize("name", ["lm_coarse", "lm_fine"])
def test_shuffled_conditioning_hurts_who_uses_it_and_nobody_else(corpus, name):
    s = stage(name)
    d = data(corpus, s, "dev")
    crops = d.fixed(100)
    used = likelihood.conditioning(Planted(s), s, d, crops, seed=0)
    assert used["shuffled"] > used["true"] + 0.2 and 0 < used["se"] < 0.1
    assert used == likelihood.conditioning(Planted(s), s, d, crops, seed=0)
    ignored = likelihood.conditioning(Planted(s, uses_prefix=False), s, d, crops, seed=0)
    assert ignored["shuffled"] == pytest.approx(ignored["true"], abs=1e-6) and ignored["se"] < 1e-6


def test_conditioning_takes_clips_of_other_lengths_and_refuses_what_it_cannot_do(tmp_path):
    corpus = token_corpus.make(tmp_path, {"train": [30], "dev": [25, 7, 60, 1]})
    for name in ("lm_coarse", "lm_fine"):
        d = data(corpus, stage(name), "dev")
        result = likelihood.conditioning(Planted(d.stage), d.stage, d, d.fixed(100), seed=1)
        assert np.isfinite(list(result.values())).all()
        with pytest.raises(ValueError, match="two held-out rows"):
            likelihood.conditioning(Planted(d.stage), d.stage, d, d.fixed(1), seed=1)
    with pytest.raises(ValueError, match="no prefix"):
        likelihood.conditioning(Planted(stage("lm_semantic")), stage("lm_semantic"), d, d.fixed(9), seed=1)


def test_token_statistics_by_hand(corpus):
    result = sampled_statistics(corpus.paths["semantic_tokens"])
    everything = np.concatenate([corpus.z[c.id] for c in corpus.clips])
    runs = sum(1 + int((z[1:] != z[:-1]).sum()) for z in corpus.z.values())
    p = np.bincount(everything, minlength=K) / len(everything)
    assert result["mean_run"] == pytest.approx(len(everything) / runs)
    assert result["entropy_bits"] == pytest.approx(-(p * np.log2(p)).sum())
    assert result["perplexity"] == pytest.approx(2 ** result["entropy_bits"])
    assert result["used"] == K
