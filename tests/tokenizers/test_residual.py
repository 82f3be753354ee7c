"""Residual k-means: the step, its codes beside the plain tokenizer's, and what is refused."""

from __future__ import annotations

import pytest
import torch

from audiolm import store
from audiolm.tokenizers.artifact import ArtifactError
from audiolm.tokenizers.residual import ResidualTokenizer, load_residual
from audiolm.tokenizers.semantic import load_semantic
from tests.worlds import tiny_vocoder as tiny
from tests.worlds.basics import RecordingOut


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(corpus, kmeans build, residual build, facts of the residual step)."""
    folder = tmp_path_factory.mktemp("residual")
    corpus = tiny.corpus(folder)
    path = tiny.built_tokenizer(f"{folder}/kmeans", corpus.wavs[:6])
    out = RecordingOut(folder / "fit")
    facts = tiny.run_residual(corpus, path, out)
    return corpus, path, out.path, facts


def batch(corpus) -> tuple[torch.Tensor, torch.Tensor]:
    held_out = corpus.wavs[6:]
    wav_BT = torch.zeros(len(held_out), max(map(len, held_out)))
    for row, wav in zip(wav_BT, held_out, strict=True):
        row[:len(wav)] = torch.from_numpy(wav)
    return wav_BT, torch.tensor([len(w) for w in held_out])


def test_level_1_is_the_plain_tokenizer_bit_for_bit(made):
    corpus, path, residual, _ = made
    plain, more = load_semantic(path), load_residual(path, residual)
    wav_BT, lengths_B = batch(corpus)
    assert more.spec.n_q == 4 and more.spec.vocab == tiny.K and more.spec.rate_hz == 25
    for one, all_ in zip(plain.encode(wav_BT, lengths_B), more.encode(wav_BT, lengths_B), strict=True):
        assert all_.shape == (len(one), 4) and all_.dtype == torch.int64 and torch.equal(all_[:, :1], one)
        assert torch.equal(more.vectors_of(all_, 1), plain.centroids_KD[one[:, 0]])
        assert int(all_.max()) < tiny.K and all(len(level.unique()) > 1 for level in all_.T)
    alone = load_residual(path)
    assert torch.equal(alone.encode(wav_BT, lengths_B)[0], plain.encode(wav_BT, lengths_B)[0])
    assert alone.hash == plain.hash == more.hash_of(1) != more.hash


def test_each_level_brings_held_out_features_closer(made):
    corpus, path, residual, facts = made
    tokenizer = load_residual(path, residual)
    wav_BT, lengths_B = batch(corpus)
    x_BTD, frames_B = tokenizer.tokenizer.features(wav_BT, lengths_B)
    codes = tokenizer.encode(wav_BT, lengths_B)
    errors = [sum(float((x_TD[:n] - tokenizer.vectors_of(c, levels)).square().sum())
                  for x_TD, n, c in zip(x_BTD, frames_B.tolist(), codes, strict=True)) for levels in range(1, 5)]
    assert all(after < before for before, after in zip(errors, errors[1:], strict=False)) and errors[-1] < 0.8 * errors[0]
    shares = [facts[f"explained/q{level:02d}"] for level in range(4)]
    assert shares == sorted(shares) and 0 < shares[0] and shares[-1] < 1
    assert facts["levels"] == 4 and facts["k"] == tiny.K and facts["frames"] == sum(-(-len(w) // 640) for w in corpus.wavs[:6])


def test_the_step_is_the_same_again_and_samples_up_to_max_frames(made, tmp_path):
    corpus, path, residual, _ = made
    again = RecordingOut(tmp_path / "again")
    tiny.run_residual(corpus, path, again)
    name = "export/model.safetensors"
    assert store.get(f"{again.path}/{name}") == store.get(f"{residual}/{name}")
    facts = tiny.run_residual(corpus, path, RecordingOut(tmp_path / "few"), max_frames=150, levels=2)
    assert 145 <= facts["frames"] <= 150 and "explained/q01" in facts and "explained/q02" not in facts
    with pytest.raises(ValueError, match="needs train clips"):
        tiny.run_residual(corpus, path, RecordingOut(tmp_path / "none"),
                          tiny.write_manifest(f"{tmp_path}/held-out", corpus.clips[6:]))


def test_levels_of_another_tokenizer_are_refused(made, tmp_path):
    corpus, path, residual, _ = made
    other = tiny.built_tokenizer(f"{tmp_path}/other", corpus.wavs[:6], seed=1)
    with pytest.raises(ArtifactError, match="go on from the tokenizer"):
        load_residual(other, residual)
    with pytest.raises(ArtifactError, match="give the path of a residual build"):
        load_residual(path, other)
    config = store.get_json(f"{residual}/export/config.json")
    for change, text in (({"levels": 3}, r"expected 2 of \(12, 16\)"), ({"weights_sha256": "0" * 64}, "not the file")):
        store.put(f"{tmp_path}/bad/export/model.safetensors", store.get(f"{residual}/export/model.safetensors"))
        store.put_json(f"{tmp_path}/bad/export/config.json", {**config, **change})
        with pytest.raises(ArtifactError, match=text):
            load_residual(path, f"{tmp_path}/bad")


def test_batch_equals_single(made):
    corpus, path, residual, _ = made
    tokenizer = load_residual(path, residual)
    assert isinstance(tokenizer, ResidualTokenizer)
    wav_BT, lengths_B = batch(corpus)
    for row, n, codes_TQ in zip(wav_BT, lengths_B, tokenizer.encode(wav_BT, lengths_B), strict=True):
        alone, = tokenizer.encode(row[None, :n], n[None])
        assert (alone == codes_TQ).float().mean() > 0.99  # products of other sizes round otherwise
