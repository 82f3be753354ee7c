"""Copies of train clips at other speeds: in both token stores, aligned, and used by the language models' training alone."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from audiolm.data import clips, tokens
from audiolm.data.clips import Clip, Part, read_clips, token_clips
from audiolm.eval.metrics import likelihood
from audiolm.eval.metrics import token_statistics as ts
from audiolm.lm.batches import TokenBatches
from audiolm.lm.layouts import build_stages
from audiolm.tokenizers.base import padded_samples
from tests.worlds.basics import RecordingOut
from tests.worlds.encoded_corpus import N_Q, STAGES, VOCAB, K, run_encode

SPEEDS = (0.9, 1.1)


@pytest.fixture(scope="module")
def copied(world, tmp_path_factory):
    """(paths of both stores with copies, the steps' facts)."""
    root = tmp_path_factory.mktemp("copied")
    facts = {w: run_encode(world, w, RecordingOut(root / w), speeds=SPEEDS) for w in ("semantic", "acoustic")}
    return {w: str(root / w) for w in facts}, facts


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100])
@pytest.mark.parametrize("speed", [0.5, 0.9, 1.1, 1.333])
def test_a_copy_has_its_length_to_the_sample_and_another_pitch(tmp_path, rate, speed):
    for frames in (rate + 137, 640, 3):
        soundfile.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * np.arange(frames) / rate), rate)
        part = Part("a", "a.wav", 0, frames, 0, None)
        clip = Clip("a", "s", "s", "x", "train", rate, frames, (part,), speed=speed)
        wav_T = clips.read_clip(clip, {"s": str(tmp_path)})
        plain = -(-frames * 16_000 // rate)
        assert len(wav_T) == clip.samples == -(-plain * 16_000 // round(16_000 * speed))
        np.testing.assert_array_equal(clips.read_clip(clip, {"s": str(tmp_path)}, 1, len(wav_T) - 1), wav_T[1:])
        if frames > rate:
            peak_hz = np.abs(np.fft.rfft(wav_T * np.hanning(len(wav_T)))).argmax() * 16_000 / len(wav_T)
            assert peak_hz == pytest.approx(440 * speed, abs=1.5)
            assert clip.seconds == pytest.approx(len(wav_T) / 16_000, abs=1e-3)


def test_rows_of_a_store_are_the_clips_then_their_copies(world, copied):
    stores = {w: tokens.TokenStore(path) for w, path in copied[0].items()}
    tokens.check_pair(stores["semantic"], stores["acoustic"])
    assert stores["semantic"].speeds == SPEEDS
    rows = token_clips(str(world.root / "manifest"), SPEEDS)
    for k, split in enumerate(("train", "dev", "test")):
        own = [c.id for c in world.clips if c.shard == k]
        expected = own + [f"{i}@{s}" for s in SPEEDS for i in own if split == "train"]
        found = stores["semantic"].read(k, ["id", "n_frames"])
        mine = [c for c in rows if c.shard == k]
        assert list(found["id"]) == expected == [c.id for c in mine] and [c.row for c in mine] == list(range(len(expected)))
        assert list(found["n_frames"]) == [padded_samples(c.samples) // 640 for c in mine]
        assert stores["semantic"].originals(found["id"]) == len(own)
    assert [c.id for c in token_clips(str(world.root / "manifest"), SPEEDS, "dev")] == ["a/dev-0", "a/dev-1"]


def test_the_clips_own_tokens_and_figures_do_not_change(world, encoded, copied):
    paths, facts = copied
    for which, path in paths.items():
        plain = tokens.TokenStore(str(world.root / f"{which}_tokens"))
        for k in range(3):
            a, b = (s.levels(k, range(s.spec["n_q"])) for s in (plain, tokens.TokenStore(path)))
            for level in (n for n in a if n != "id"):
                assert all(np.array_equal(a[level][i], b[level][i]) for i in range(len(a["id"])))
        counted = {k: v for k, v in facts[which].items() if k not in ("audio_s", "seconds", "x_realtime", "copies")}
        assert counted == {k: encoded[which][k] for k in counted} and facts[which]["copies"] == 8
    assert ts.sampled_statistics(paths["semantic"]) == ts.sampled_statistics(str(world.root / "semantic_tokens"))
    group_of = {c.id: "all" for c in world.clips}
    a, b = (ts.tally(tokens.TokenStore(p), group_of, ["all"])["all"]
            for p in (paths["semantic"], str(world.root / "semantic_tokens")))
    assert (a.runs_K == b.runs_K).all() and (a.frames_K == b.frames_K).all()
    with pytest.raises(tokens.TokenError, match=r"speeds \[0.9, 1.1\] and \[\]; encode both .* with the same tokens.speeds"):
        tokens.check_pair(tokens.TokenStore(paths["semantic"]), tokens.TokenStore(str(world.root / "acoustic_tokens")))


@pytest.mark.parametrize("name", ["lm_semantic", "lm_coarse", "lm_fine"])
def test_training_uses_the_copies_and_validation_does_not(world, copied, name):
    stage, manifest = build_stages(STAGES, N_Q, VOCAB, K)[name], str(world.root / "manifest")
    train, dev = (TokenBatches(manifest, copied[0]["semantic"], copied[0]["acoustic"], stage, split, None, 2, 0)
                  for split in ("train", "dev"))
    assert [c.id for c in dev.clips] == [c.id for c in read_clips(manifest, "dev")]
    used = {train.clips[clip].id for step in range(60) for i in range(2) for clip, *_ in train.spans(step, i)}
    assert used == {c.id for c in token_clips(manifest, SPEEDS, "train")}
    for i, clip in enumerate(train.clips):
        assert len(train.packed(i, 0).ids) and train.frames[i] == padded_samples(clip.samples) // 640
    rows = [dev.packed(*c) for c in dev.fixed(9)]
    both = [likelihood.sums(stage, list(likelihood.train_rows(train, copies=c)), rows) for c in (False, True)]
    lowest, counted = likelihood.lowest(train, rows)
    assert all((s[0] == np.minimum(both[0][n][0], both[1][n][0])).all() for n, s in lowest.items())
    assert any((both[0][n][0] != both[1][n][0]).any() for n in lowest)
    assert counted == sum(train.packed(i, start).target.sum() for i, c in enumerate(train.clips) if c.speed == 1
                          for start in range(0, train.frames[i], 25))
