"""Sounds to be judged: what is made once is not made again, whoever asks; which utterances are chosen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import soundfile

from audiolm import store
from audiolm.data.clips import Clip, Part, clips_parquet
from audiolm.eval import generated, test_sets
from audiolm.eval.generated import make_samples, missing_batches, plan_samples, shuffled
from tests.worlds.tiny_system import build, token_store, voice

SR = 16_000


def clip(name: str, seconds: float, speaker: str = "s") -> Clip:
    n = round(seconds * SR)
    return Clip(f"o/{name}", "o", "o", speaker, "test", SR, n, (Part(name, f"{name}.wav", 0, n, 0, "hello"),), 0, 0)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("system"))
    return {**build(folder), "semantic_tokens": token_store(folder)}


CLIPS = [(clip("a", 1.2), voice(1.2)), (clip("b", 0.8, "t"), voice(0.8, 1))]
EACH = {"original": 1, "resynthesis": 1, "acoustic": 2, "shuffled": 1, "continuation": 1}


def test_sounds_are_made_once_and_do_not_depend_on_their_neighbours(paths, tmp_path, monkeypatch):
    cache, wanted = str(tmp_path), plan_samples(CLIPS, EACH, prompt_s=0.5)
    assert len(wanted) == 12 and [w.id for w in wanted] == [w.id for w in plan_samples(CLIPS, EACH, 0.5)]
    made = make_samples(paths, CLIPS, wanted, cache)
    assert [m.spec for m in made] == wanted and missing_batches(paths, CLIPS, wanted, cache) == []
    by_id = {m.spec.id: m for m in made}
    for (c, wav), prompt in zip(CLIPS, (7_680, 6_400), strict=True):  # whole frames; of a short clip half
        own = {mode: by_id[f"{c.id} {mode} 0"] for mode in EACH}
        assert own["original"].wav_T is wav
        assert len(own["resynthesis"].wav_T) == len(own["continuation"].wav_T) == len(wav)
        assert len(own["continuation"].after_T) == len(own["original"].after_T) == len(wav) - prompt
        assert len(own["acoustic"].after_T) == len(own["acoustic"].wav_T) > 0.5 * len(wav)
        np.testing.assert_allclose(own["continuation"].wav_T[:prompt], own["resynthesis"].wav_T[:prompt], atol=1e-4)
        other = by_id[f"{c.id} acoustic 1"].wav_T
        assert len(other) != len(own["acoustic"].wav_T) or not np.allclose(other, own["acoustic"].wav_T)
    again = make_samples(paths, CLIPS[1:], [w for w in wanted if w.clip == "o/b"][::-1], str(tmp_path / "alone"), batch=1)
    for m in again:
        np.testing.assert_array_equal(m.wav_T, by_id[m.spec.id].wav_T)
    monkeypatch.setattr(generated, "make_sample_batch", None)  # the cache alone
    for one, two in zip(make_samples(paths, CLIPS, wanted, cache), made, strict=True):
        np.testing.assert_array_equal(one.wav_T, two.wav_T)


def test_another_checkpoint_seed_or_recording_is_another_sound(paths, tmp_path):
    wanted = plan_samples(CLIPS, EACH, 0.5)
    make_samples(paths, CLIPS, wanted, str(tmp_path))

    def modes(paths=paths, clips=CLIPS, seed=0):
        return {w.mode for some, _ in missing_batches(paths, clips, wanted, str(tmp_path), seed) for w in some}

    assert modes() == set()
    assert modes({**paths, "lm_semantic": "elsewhere"}) == {"continuation"}
    assert modes({**paths, "lm_coarse": "elsewhere"}) == {"continuation", "acoustic", "shuffled"}
    assert modes(seed=1) == {"continuation", "acoustic", "shuffled"}
    assert modes(clips=[(c, wav + 1e-3) for c, wav in CLIPS]) == set(EACH) - {"original"}


def test_refusals(paths, tmp_path):
    with pytest.raises(ValueError, match=r"modes \['vocoder'\]: choose from original"):
        plan_samples(CLIPS, {"vocoder": 1})
    with pytest.raises(ValueError, match="exceed the 2 s the coarse stage"):
        long = [(clip("long", 2.4), voice(2.4))]
        make_samples(paths, long, plan_samples(long, {"continuation": 1}), str(tmp_path))
    assert generated.longest_s(paths) == 2
    with pytest.raises(ValueError, match="given twice"):
        plan_samples(CLIPS[:1] * 2, EACH)
    with pytest.raises(ValueError, match="sounds of o/b are wanted"):
        make_samples(paths, CLIPS[:1], plan_samples(CLIPS, EACH), str(tmp_path))


def test_shuffled_tokens_last_as_long_as_before():
    z = np.repeat(np.arange(40), np.arange(40) % 3 + 1)
    other = shuffled(z, 1)
    assert not np.array_equal(other, z) and (np.bincount(other) == np.bincount(z)).all()
    assert (other[1:] != other[:-1]).sum() == 39 and not np.array_equal(other, shuffled(z, 2))


def test_long_recordings_give_their_stretches_where_there_are_few(tmp_path):
    wav_T, manifest = voice(25.5, 1), str(tmp_path)
    soundfile.write(tmp_path / "a.wav", wav_T, SR, subtype="FLOAT")
    clip = Clip("o/a", "o", "o", "bach", "test", SR, 25 * SR, (Part("a", "a.wav", SR // 2, 25 * SR, 0, "words"),), 0, 0)
    store.put(store.join(manifest, "clips.parquet"), clips_parquet([clip]))
    assert [c.id for c in test_sets.to_continue(manifest, 1)] == ["o/a"]  # enough of them
    chosen = test_sets.to_continue(manifest, 3)
    assert sorted(c.id for c in chosen) == ["o/a#0", "o/a#1"] and all(c.text is None and c.seconds == 10 for c in chosen)
    for choice in (chosen, []):  # kept by id
        assert test_sets.frozen(f"{manifest}/chosen.json", manifest, lambda choice=choice: choice) == chosen
    read = {c.id: wav for c, wav in test_sets.read(chosen, {"o": manifest})}
    np.testing.assert_array_equal(read["o/a#1"], wav_T[21 * SR // 2:41 * SR // 2])


def test_utterances_of_a_manifest(tmp_path):
    """A clip that joins utterances gives each of them with its own text and sound; choices are kept by id."""
    def joined(speaker, split, names, source="o"):
        n = 5 * SR
        parts = tuple(Part(f"{speaker}{k}", f"{speaker}{k}.wav", 0, n, i * n, f"text {k}") for i, k in enumerate(names))
        return Clip(f"{source}/{speaker}", source, source, speaker, split, SR, n * len(parts), parts)

    clips = [joined("ann", "train", "abcd"), joined("bob", "dev", "abcd"), joined("cid", "dev", "abcde"),
             joined("dan", "dev", "ab", "p"), joined("eve", "dev", "ab", "p")]
    manifest = str(tmp_path)
    rows = [replace(c, shard=0, row=i) for i, c in enumerate(clips)]
    store.put(store.join(manifest, "clips.parquet"), clips_parquet(rows))
    chosen = test_sets.with_text(manifest, 4)
    assert {c.speaker for c in chosen} == {"bob", "cid", "dan", "eve"} and chosen == test_sets.with_text(manifest, 4)
    assert all(c.text == f"text {c.id[-1]}" and c.seconds == 5 for c in chosen)
    learn, judged = test_sets.of_speakers(manifest, 2, 2)
    assert len(learn) == 6 and {c.speaker for c in judged} == {"bob", "cid"}
    assert not {c.id for c in learn} & {c.id for c in judged} and {c.source for c in learn} == {"o"}
    with pytest.raises(ValueError, match="5 utterances of 4 s"):
        test_sets.of_speakers(manifest, 3, 2)
    with pytest.raises(ValueError, match="7 to 10 s has a text"):
        test_sets.with_text(manifest, 4, least_s=7)
    kept = test_sets.frozen(f"{manifest}/items.json", manifest, lambda: chosen)
    assert kept == test_sets.frozen(f"{manifest}/items.json", manifest, lambda: []) == chosen
    cid = next(c for c in test_sets.utterances(manifest) if c.id == "o/cidc")
    soundfile.write(tmp_path / "cidc.wav", voice(5, 3), SR, subtype="FLOAT")
    (_, wav), = test_sets.read([cid], {"o": manifest}, most_s=3)
    np.testing.assert_array_equal(wav, voice(5, 3)[:3 * SR])
    store.put_json(f"{manifest}/items.json", ["o/none"])
    with pytest.raises(ValueError, match="names 1 utterances that .* has not, o/none"):
        test_sets.frozen(f"{manifest}/items.json", manifest, lambda: [])
