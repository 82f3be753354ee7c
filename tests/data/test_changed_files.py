"""Audio files that change between the manifest and the token steps: their clips are rejected, the others are as ever."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from audiolm.config.corpus import CorpusConfig
from audiolm.data.tokens import TokenError, TokenStore, check_pair, level_name, shard_name
from audiolm.lm.batches import TokenBatches
from audiolm.lm.layouts import build_stages
from tests.worlds.basics import RecordingOut
from tests.worlds.encoded_corpus import N_Q, RATE, STAGES, VOCAB, K, run_encode

CHANGED = "train-1"


def spoil(path, how):
    if how == "gone":
        path.unlink()
        return
    wav, _ = soundfile.read(path, dtype="float32")
    wav = wav[::-1] if how == "as long" else wav[:-100]
    soundfile.write(path, wav, RATE)


def moved(world, folder, max_rejected):
    """The world with its audio in another folder."""
    shutil.copytree(world.root / "audio", folder)
    source = {"kind": "folder", "name": "a", "root": str(folder)}
    return SimpleNamespace(root=world.root, clips=world.clips,
                           corpus=CorpusConfig(name="t", sources=[source], max_rejected=max_rejected))


def codes(path, which):
    store = TokenStore(str(path))
    levels = [level_name(q) for q in range(1 if which == "semantic" else N_Q)]
    found = {}
    for k in range(store.shards):
        data = store.read(k, ["id", *levels])
        found |= {i: np.stack([data[q][row] for q in levels]) for row, i in enumerate(data["id"])}
    return found


@pytest.mark.parametrize("how", ["as long", "shorter", "gone"])
def test_the_clip_is_rejected_with_a_remark_and_the_others_are_as_ever(world, encoded, tmp_path, how):
    changed, out = moved(world, tmp_path / "audio", 0.2), RecordingOut(tmp_path / "z")
    file = tmp_path / "audio" / f"{CHANGED}.wav"
    right = file.read_bytes()
    spoil(file, how)
    facts = run_encode(changed, "semantic", out)
    (note,) = facts["notes"]
    assert facts["rejected"] == 1 and f"a/{CHANGED}" in note and str(file) in note
    ours, theirs = codes(tmp_path / "z", "semantic"), codes(world.root / "semantic_tokens", "semantic")
    assert ours.keys() == theirs.keys()
    assert {i for i in ours if not np.array_equal(ours[i], theirs[i])} == {f"a/{CHANGED}"}

    # It is no clip of a stage that reads this store, whatever the other store holds.
    z, y = str(tmp_path / "z"), str(world.root / "acoustic_tokens")
    check_pair(TokenStore(z), TokenStore(y))
    stage = build_stages(STAGES, N_Q, VOCAB, K)["lm_coarse"]
    args = (stage, "train", None, 2, 0)
    without, whole = (TokenBatches(str(world.root / "manifest"), path, y, *args)
                      for path in (z, str(world.root / "semantic_tokens")))
    assert len(without.frames) == len(whole.frames) - 1
    rows = [c.row for c in world.clips if c.split == "train" and c.id != f"a/{CHANGED}"]
    assert without.lengths.rows.tolist() == rows

    # Once the file is right again, its shard alone is made anew.
    file.write_bytes(right)
    again = run_encode(changed, "semantic", out)
    assert "rejected" not in again and again["shards_skipped"] == again["shards"] - 1
    assert all(np.array_equal(a, theirs[i]) for i, a in codes(tmp_path / "z", "semantic").items())


def test_too_many_rejected_clips_end_the_step(world, tmp_path):
    changed = moved(world, tmp_path / "audio", 0.05)
    spoil(tmp_path / "audio" / f"{CHANGED}.wav", "as long")
    with pytest.raises(TokenError, match=rf"1 clips rejected: a/{CHANGED} \(.*more than corpus.max_rejected \(0.05\)"):
        run_encode(changed, "acoustic", RecordingOut(tmp_path / "y"))


def test_the_step_stops_once_too_many_are_rejected_and_the_next_try_keeps_what_was_finished(world, tmp_path):
    gone, out = moved(world, tmp_path / "audio", 0.2), RecordingOut(tmp_path / "z")
    for file in (tmp_path / "audio").glob("[dt]e*.wav"):  # dev's two exceed a fifth of the nine clips
        file.unlink()
    with pytest.raises(TokenError, match="^2 clips rejected: a/dev-0 .* is gone.*allows of 9 clips"):
        run_encode(gone, "semantic", out)
    assert sorted(path.name for path in (tmp_path / "z").iterdir()) == [shard_name(0), shard_name(1)]
    shutil.copytree(world.root / "audio", tmp_path / "audio", dirs_exist_ok=True)
    assert run_encode(gone, "semantic", out)["shards_skipped"] == 1


def test_where_silence_stands_for_every_clip_the_error_begins_with_the_rejected_clips(world, tmp_path):
    (tmp_path / "audio").mkdir()
    for share, end in ((0.05, "is more than corpus.max_rejected"), (1, "the acoustic tokenizer collapsed")):
        source = {"kind": "folder", "name": "a", "root": str(tmp_path / "audio")}
        empty = SimpleNamespace(root=world.root, corpus=CorpusConfig(name="t", sources=[source], max_rejected=share))
        with pytest.raises(TokenError, match=rf"^\d clips rejected: a/train-0 \(.*train-0.wav is gone\).*{end}"):
            run_encode(empty, "acoustic", RecordingOut(tmp_path / f"y{share}"))
