"""Likelihood figures: baselines that are right on known laws, a planted better model wins, conditioning is noticed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from audiolm.config import LM, Stage, Train
from audiolm.data.batches import TokenBatches
from audiolm.eval import likelihood
from audiolm.lm.stages import build_stages
from tests import token_corpus
from tests.token_corpus import STAY, VOCAB, K

TRUE = STAY + (1 - STAY) / K  # chance of the semantic chain's next token
ENTROPY = -(TRUE * np.log(TRUE) + (K - 1) * (1 - STAY) / K * np.log((1 - STAY) / K))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return token_corpus.make(tmp_path_factory.mktemp("corpus"), {"train": [100] * 30, "dev": [50] * 12})


def stage(name, dedupe=False):
    shape = Stage(crop_s=1.0, train=Train(steps=1, batch=4, lr=1e-3))
    return build_stages(LM(dedupe=dedupe, coarse_levels=2, semantic=shape, coarse=shape, fine=shape),
                        token_corpus.N_Q, VOCAB, K)[name]


def data(corpus, value, split):
    paths = [corpus.paths[n] for n in ("manifest", "semantic_tokens", "acoustic_tokens")]
    return TokenBatches(*paths, value, split, None, 4, 0)


class Planted(nn.Module):
    """Knows how the tokens were made; `uses_prefix=False` leaves the prefix out and knows the rest."""

    def __init__(self, value, uses_prefix=True):
        super().__init__()
        self.stage, self.uses_prefix = value, uses_prefix

    def forward(self, ids_BT, docs, index_SN, label_SN):
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
            legal = torch.from_numpy(np.flatnonzero(s.slot_masks()[slot]))
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
    """Knows nothing: every legal id is as likely."""

    def __init__(self, value):
        super().__init__()
        self.stage = value

    def forward(self, ids_BT, docs, index_SN, label_SN):
        return nats(self.stage, torch.zeros(*ids_BT.shape, self.stage.vocab_size), index_SN, label_SN)


def nats(value, logits_BTV, index_SN, label_SN):
    """What a stage's heads would say where their scores were these."""
    return torch.stack([nn.functional.cross_entropy(logits_BTV.flatten(0, 1)[index_N][:, ids], label_N, reduction="none")
                        for ids, index_N, label_N in zip(value.slot_ids(), index_SN, label_SN, strict=True)])


def test_bigram_beats_unigram_on_a_markov_chain_and_the_true_law_wins(corpus):
    s = stage("lm_semantic")
    found = likelihood.stage_figures(Planted(s), s, data(corpus, s, "train"), data(corpus, s, "dev"), 100)
    assert found["unigram"] == pytest.approx(np.log(K), abs=0.1)
    assert found["loss"] < found["bigram"] < 0.75 * found["unigram"]
    assert ENTROPY - 0.1 < found["loss"] < ENTROPY + 0.3  # a crop's first token and its EOS cost more
    worse = likelihood.stage_figures(Blind(s), s, data(corpus, s, "train"), data(corpus, s, "dev"), 100)
    assert worse["loss"] == pytest.approx(np.log(K + 1), rel=1e-5)
    assert worse["loss"] > found["unigram"] and worse["bigram"] == found["bigram"]


def test_the_bigram_of_acoustic_stages_looks_one_frame_back_at_its_level(corpus):
    s = stage("lm_coarse")
    found = likelihood.stage_figures(Planted(s), s, data(corpus, s, "train"), data(corpus, s, "dev"), 100)
    one, two = found["levels"]
    assert (one["level"], two["level"]) == (1, 2)
    assert two["bigram"] < 0.7 * two["unigram"]  # level 2 repeats itself from frame to frame
    assert one["bigram"] < one["unigram"]  # two acoustic frames share a semantic one
    assert one["loss"] < one["bigram"]  # the semantic prefix tells more
    eos = 12 * 2  # dev crops, each with one EOS
    assert found["tokens"] == 12 * 100 * 2 + eos


@pytest.mark.parametrize("name, dedupe", [("lm_semantic", True), ("lm_semantic", False), ("lm_coarse", True),
                                          ("lm_fine", True)])
def test_baselines_are_distributions(corpus, name, dedupe):
    s = stage(name, dedupe)
    d = data(corpus, s, "train")
    ngrams = likelihood.count(s, (ids[t] for ids, t in likelihood.packed_rows(d, d.fixed(5))))
    ids, target = d.packed(*d.fixed(1)[0])
    head = ids[target][:4 * s.slots]  # whole frames, then every id that may follow
    for row in (head, head[:0]):
        legal = np.flatnonzero(s.allowed(len(row))) if len(row) else np.flatnonzero(s.slot_masks()[0])
        if s.no_repeat and len(row):
            legal = np.union1d(legal, row[-1:])  # counts do not know that repeats are impossible
        p = np.exp([[-x[-1] for x in ngrams.nats(np.append(row, i))] for i in legal])
        if not len(row) and s.name != "fine":  # nothing was said yet: EOS keeps a little of the mass
            p = np.concatenate([p, np.exp([[-x[-1] for x in ngrams.nats(np.array([s.eos]))]])])
        assert p.sum(0) == pytest.approx([1, 1], abs=1e-9)


def test_counts_of_nothing_are_uniform():
    s = stage("lm_fine")
    unigram, bigram = likelihood.count(s, []).nats(np.array([s.offset + 2 * VOCAB + 3] * 4))
    assert unigram == pytest.approx(np.log(VOCAB)) and bigram == pytest.approx(np.log(VOCAB))


@pytest.mark.parametrize("name", ["lm_coarse", "lm_fine"])
def test_shuffled_conditioning_hurts_who_uses_it_and_nobody_else(corpus, name):
    s = stage(name)
    d = data(corpus, s, "dev")
    crops = d.fixed(100)
    used = likelihood.conditioning(Planted(s), s, d, crops, seed=0)
    assert used["shuffled"] > used["true"] + 0.2
    assert used == likelihood.conditioning(Planted(s), s, d, crops, seed=0)
    ignored = likelihood.conditioning(Planted(s, uses_prefix=False), s, d, crops, seed=0)
    assert ignored["shuffled"] == pytest.approx(ignored["true"], abs=1e-6)


def test_conditioning_takes_clips_of_other_lengths_and_refuses_what_it_cannot_do(tmp_path):
    corpus = token_corpus.make(tmp_path, {"train": [30], "dev": [25, 7, 60, 1]})
    for name in ("lm_coarse", "lm_fine"):
        d = data(corpus, stage(name), "dev")
        found = likelihood.conditioning(Planted(d.stage), d.stage, d, d.fixed(100), seed=1)
        assert np.isfinite(list(found.values())).all()
        with pytest.raises(ValueError, match="two held-out rows"):
            likelihood.conditioning(Planted(d.stage), d.stage, d, d.fixed(1), seed=1)
    with pytest.raises(ValueError, match="no prefix"):
        likelihood.conditioning(Planted(stage("lm_semantic")), stage("lm_semantic"), d, d.fixed(9), seed=1)


def test_token_statistics_by_hand(corpus):
    found = likelihood.token_statistics(corpus.paths["semantic_tokens"])
    everything = np.concatenate([corpus.z[c.id] for c in corpus.clips])
    runs = sum(1 + int((z[1:] != z[:-1]).sum()) for z in corpus.z.values())
    p = np.bincount(everything, minlength=K) / len(everything)
    assert found["mean_run"] == pytest.approx(len(everything) / runs)
    assert found["entropy_bits"] == pytest.approx(-(p * np.log2(p)).sum())
    assert found["perplexity"] == pytest.approx(2 ** found["entropy_bits"])
    assert found["used"] == K
