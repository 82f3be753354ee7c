"""The cascade with small real models: exact lengths, prompts unchanged, chunks, seeds, and the `samples` step."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from audiolm import store
from audiolm.config import corpus as corpus_config
from audiolm.config import lm as lm_config
from audiolm.config import run
from audiolm.dag.step import Artifact
from audiolm.data.clips import Clip, Part, clips_parquet
from audiolm.data.tokens import read_shard, shard_name
from audiolm.generate.load import load
from audiolm.generate.long_form import stream
from audiolm.generate.params import PAPER_PARAMS, SamplingParams
from audiolm.generate.prompts import whole_frames
from audiolm.lm.run_lengths import dedupe
from audiolm.tokenizers import encode
from tests.worlds.layouts import PAPER, TIMED
from tests.worlds.tiny_system import COARSE, RUN, VOCAB, Q, build, token_store, voice


@pytest.fixture(scope="module", params=[PAPER, TIMED, {**TIMED, "kind": "frame"}], ids=["paper", "timed", "frame-wise"])
def paths(request, tmp_path_factory) -> dict[str, str]:
    return build(str(tmp_path_factory.mktemp("system")), **request.param)


@pytest.fixture(scope="module")
def lm(paths):
    return load(paths, mean_run=RUN)


@pytest.mark.parametrize("seconds", [0.4, 0.7371, 2.0])
def test_unconditional_has_exactly_the_length_asked_for(lm, seconds):
    for sound in lm.unconditional(seconds, [1, 2], may_end=False):
        assert len(sound.wav_T) == round(seconds * 16_000) and not sound.ended
        frames = -(-len(sound.wav_T) // 640)
        assert sound.codes_TQ.shape == (2 * frames, Q)
        assert (sound.z[1:] != sound.z[:-1]).all()
        if lm.stage("coarse").dedupe:
            assert len(sound.z) >= int(np.ceil(frames / RUN))
        assert 0 <= sound.codes_TQ.min() and sound.codes_TQ.max() < VOCAB and np.isfinite(sound.wav_T).all()


def test_a_call_may_be_ended_before_any_step_of_a_stage(lm):
    steps = []
    lm.stop_when(lambda: steps.append(1))
    (whole,) = lm.unconditional(0.4, [1], may_end=False)
    assert len(steps) > 30
    for last in (1, len(steps) // 2, len(steps)):
        left = iter(range(last - 1))
        lm.stop_when(partial(next, left))
        with pytest.raises(StopIteration):
            lm.unconditional(0.4, [1], may_end=False)
    lm.stop_when(lambda: None)
    np.testing.assert_array_equal(lm.unconditional(0.4, [1], may_end=False)[0].wav_T, whole.wav_T)


def test_continuation_keeps_the_prompt_and_has_the_length(lm):
    prompts = [voice(0.5), voice(0.68, 1)]  # 12 and 17 whole frames; the first is cut to 0.48 s
    for wav, sound in zip(prompts, lm.continuation(prompts, 0.9, [1, 2], may_end=False), strict=True):
        cut = whole_frames(wav)
        assert len(sound.wav_T) == len(cut) + 14_400 and sound.prompt == len(cut)
        codes_TQ, z = lm.encode([cut])[0], dedupe(lm.tokenize([cut])[0])
        np.testing.assert_array_equal(sound.codes_TQ[:len(codes_TQ)], codes_TQ)
        np.testing.assert_array_equal(sound.z[:sound.z_prompt], z)
        assert len(sound.z) > len(z) and (sound.z[1:] != sound.z[:-1]).all()
        # the codec is causal: the prompt's sound is what the codec alone makes of it
        np.testing.assert_allclose(sound.wav_T[:len(cut)], lm.resynthesis([cut])[0].wav_T, atol=1e-5)


def test_without_semantic_tokens_stage_2_goes_on_with_the_prompt_alone(tmp_path):
    lm = load(build(str(tmp_path), **TIMED, ablation="acoustic"), mean_run=RUN)
    prompt = whole_frames(voice(0.5))
    sound, = lm.continuation([prompt], 0.9, [1], may_end=False)
    np.testing.assert_array_equal(sound.codes_TQ[:24], lm.encode([prompt])[0])
    assert len(sound.wav_T) == len(prompt) + 14_400 and "semantic" not in lm.spent_s  # no stage 1, whose ids nothing hears
    assert len(sound.z) == sound.z_prompt == len(dedupe(lm.tokenize([prompt])[0]))
    assert len(np.concatenate([*stream(lm, prompt, 3.0, 1)])) == len(prompt) + 48_000
    z_T = lm.tokenize([voice(1.0)])[0]
    one, other = lm.acoustic([z_T, z_T[::-1]], [1, 1])
    np.testing.assert_array_equal(one.codes_TQ, other.codes_TQ)  # whatever the tokens


def test_no_token_of_a_prompt_depends_on_what_follows_the_cut(lm):
    base, other = voice(0.5), voice(0.5)
    other[7680:] = 0.9  # after 12 whole frames
    one, two = (lm.continuation([w], 0.5, [3])[0] for w in (base, other))
    np.testing.assert_array_equal(one.z, two.z)
    np.testing.assert_array_equal(one.wav_T, two.wav_T)


def test_the_prompt_matters(lm):
    one, two = (lm.continuation([voice(0.48, seed)], 1.0, [3])[0] for seed in (0, 5))
    assert not np.array_equal(one.codes_TQ[24:], two.codes_TQ[24:])


def test_same_seed_same_sound_whatever_the_batch(lm):
    prompts, seeds = [voice(0.3 + 0.1 * i, i) for i in range(4)], [11, 12, 13, 14]
    batch = lm.continuation(prompts, 0.6, seeds)
    for i in (0, 2):
        alone = lm.continuation([prompts[i]], 0.6, [seeds[i]])[0]
        np.testing.assert_array_equal(batch[i].codes_TQ, alone.codes_TQ)
        np.testing.assert_array_equal(batch[i].wav_T, alone.wav_T)
    other = lm.continuation([prompts[0]], 0.6, [99])[0]
    assert not np.array_equal(other.codes_TQ, batch[0].codes_TQ)


def test_acoustic_generation_follows_the_clips_frames(lm):
    wav, timed = voice(1.23), not lm.stage("coarse").dedupe
    z_T = lm.tokenize([wav])[0]
    sounds = lm.acoustic([z_T, z_T], [1, 2], [len(wav), len(wav)])
    assert [len(s.wav_T) for s in sounds] == [len(wav)] * 2
    assert not np.array_equal(sounds[0].codes_TQ, sounds[1].codes_TQ)
    free = lm.acoustic([z_T] * 8, list(range(8)))  # stage 2 says how long the ids last, under a cap
    lengths = [len(s.wav_T) for s in free]
    assert set(lengths) == {640 * len(z_T)} if timed else len(set(lengths)) > 1 and max(lengths) <= 480 * 2 * len(z_T)
    assert all(len(s.codes_TQ) * 320 == len(s.wav_T) for s in free)


@pytest.mark.parametrize(("frames", "prompt"), [  # a chunk is 20
    (3, 0), (19, 7), (20, 0), (20, 7), (21, 0), (21, 7), (21, 20), (40, 20), (40, 33), (57, 0), (57, 7), (57, 45)])
def test_chunks_as_a_batch_equal_chunks_one_by_one(lm, frames, prompt):
    draw = np.random.default_rng(frames)
    coarse, known = draw.integers(0, VOCAB, (frames, COARSE)), draw.integers(0, VOCAB, (prompt, Q - COARSE))
    whole = lm.fine([coarse], [5], [known])[0]
    assert whole.shape == (frames, Q)
    np.testing.assert_array_equal(whole[:, :COARSE], coarse)
    np.testing.assert_array_equal(whole[:prompt, COARSE:], known)
    for a in range(0, max(frames - 19, 1), 20):  # the grid starts at 0; chunks are independent
        masked = coarse.copy()
        masked[:a], masked[a + 20:] = 0, 0
        np.testing.assert_array_equal(lm.fine([masked], [5], [known])[0][a:a + 20, COARSE:], whole[a:a + 20, COARSE:])
    beside = lm.fine([coarse[::-1].copy(), coarse], [6, 5], [known[:0], known])[1]
    np.testing.assert_array_equal(beside, whole)


def test_stage_1_ends_a_sound_or_goes_on_until_it_is_long_enough(lm):
    seeds, asked = list(range(24)), 6_400
    lm = replace(lm, sampling={**PAPER_PARAMS, "semantic": SamplingParams(50.0)})  # all ids alike: EOS comes now and then
    sounds = lm.unconditional(0.4, seeds)
    ended = [s for s in sounds if s.ended]
    assert 0 < len(ended) < len(sounds)
    assert all(len(s.wav_T) == asked for s in sounds if not s.ended)
    assert all(len(s.wav_T) == min(asked, 320 * len(s.codes_TQ)) for s in ended)
    assert min(len(s.wav_T) for s in ended) < asked
    if not lm.stage("coarse").dedupe:
        return
    # where stage 2 needed fewer frames for the ids than were asked for, stage 1 drew more of them
    whole = lm.unconditional(0.4, seeds, may_end=False)
    assert max(len(s.z) for s in whole) > int(np.ceil(10 / RUN)) == min(len(s.z) for s in whole)


def test_a_prompts_own_speed_sets_the_number_of_ids(lm, monkeypatch):
    if not lm.stage("coarse").dedupe:
        pytest.skip("with run lengths stage 1 is asked for frames")
    slow = np.repeat(np.arange(5), 6)  # 30 frames, 6 a token: 0.6 s more are 15 frames
    monkeypatch.setattr(lm, "tokenize", lambda wavs: [slow] * len(wavs))
    prompt, asked = voice(1.2), []
    drawn = lm.semantic
    monkeypatch.setattr(lm, "semantic", lambda z, more, *rest: asked.append(list(more)) or drawn(z, more, *rest))
    lm.continuation([prompt], 0.6, [0])
    assert asked[0] == [3]


def test_samples_of_one_prompt_share_its_tokens_and_its_cache(lm, monkeypatch):
    encoded = []
    encode = lm.tokenizer.encode
    monkeypatch.setattr(lm.tokenizer, "encode", lambda *a: encoded.append(1) or encode(*a))
    together = lm.continuation([voice(0.5)] * 3, 0.5, [1, 2, 3])
    assert len(encoded) == 1
    for seed, sound in zip((1, 2, 3), together, strict=True):
        np.testing.assert_array_equal(sound.wav_T, lm.continuation([voice(0.5)], 0.5, [seed])[0].wav_T)


def test_resynthesis_takes_fewer_levels(lm):
    wav = voice(0.77)
    full, few = lm.resynthesis([wav])[0], lm.resynthesis([wav], levels=1)[0]
    assert len(full.wav_T) == len(few.wav_T) == len(wav) and few.codes_TQ.shape[1] == 1
    assert not np.allclose(full.wav_T, few.wav_T)


@pytest.mark.parametrize("kind", ["flat", "frame"])
def test_works_without_a_fine_stage(tmp_path, kind):
    lm = load(build(str(tmp_path), coarse=Q, dedupe=kind == "flat", kind=kind), mean_run=RUN)
    sound = lm.continuation([voice(0.4)], 0.5, [0], may_end=False)[0]
    assert len(sound.wav_T) == 14_400 and sound.codes_TQ.shape == (46, Q)
    np.testing.assert_array_equal(sound.codes_TQ[:20], lm.encode([voice(0.4)])[0])


def test_clear_errors(lm, paths):
    with pytest.raises(ValueError, match=r"2\.04 s .* exceed the 2 s the coarse stage"):
        lm.continuation([voice(0.52)], 1.52, [0])
    with pytest.raises(ValueError, match="exceed the 2 s the coarse stage"):
        lm.acoustic([np.zeros(51, np.int64)], [0])
    with pytest.raises(ValueError, match="at least 640"):
        lm.continuation([voice(0.03)], 1.0, [0])
    with pytest.raises(ValueError, match="not finite"):
        lm.continuation([np.full(6400, np.nan, np.float32)], 1.0, [0])
    with pytest.raises(ValueError, match="lm_coarse is missing"):
        load({k: v for k, v in paths.items() if k != "lm_coarse"}, mean_run=RUN)
    with pytest.raises(ValueError, match="levels"):
        load({k: v for k, v in paths.items() if k != "lm_fine"}, mean_run=RUN)
    with pytest.raises(ValueError, match="mean_run"):
        load(paths)


def test_steps_of_different_runs_are_refused(tmp_path):
    names = ("kmeans", "codec", "lm_semantic", "lm_coarse", "semantic_tokens")
    paths = {name: store.join(str(tmp_path), name, "f1", "0001", "0001") for name in names}
    store.put_json(store.join(str(tmp_path), "semantic_tokens", "f1", "0001", "done.json"),
                   {"facts": {}, "inputs": {"kmeans": "f0.0001"}})
    with pytest.raises(ValueError, match=r"semantic_tokens .* was made of kmeans f0\.0001, not of f1\.0001"):
        load(paths)


def test_mean_run_is_read_from_the_token_store(paths, tmp_path):
    assert load({**paths, "semantic_tokens": token_store(str(tmp_path), 2.25)}).mean_run == 2.25


def test_prompts_get_the_tokens_of_a_store_in_bfloat16(paths, tmp_path, monkeypatch):
    speech = {f"c{i}": voice(0.7 + 0.35 * i, i) for i in range(12)}
    clips = [Clip(name, "o", "o", name, "train", 16_000, len(wav), (Part(name, name, 0, len(wav), 0, None),), 0, row)
             for row, (name, wav) in enumerate(speech.items())]
    monkeypatch.setattr(encode, "_read_unchanged", lambda clip, roots, rejected: speech[clip.id])
    store.put(f"{tmp_path}/clips.parquet", clips_parquet(clips))
    job = encode.EncodeJob("semantic", paths["kmeans"], {}, str(tmp_path), "m.0001", 1, str(tmp_path), 12.0, "cpu", "bfloat16")
    encode.encode_shard(job, 0)
    stored = read_shard(store.join(str(tmp_path), shard_name(0)), ["q00"])["q00"]
    ours, plain = (load(found, mean_run=RUN).tokenize([*speech.values()])
                   for found in ({**paths, "semantic_tokens": str(tmp_path)}, paths))
    for row, z_T in enumerate(ours):
        np.testing.assert_array_equal(z_T, stored[row])
    assert any((a != b).any() for a, b in zip(ours, plain, strict=True)), "float32 has the same tokens: nothing was tested"


def test_samples_step(paths, tmp_path, recording_out, monkeypatch):
    import soundfile

    from audiolm.generate import samples

    speech = {f"c{i}": voice(s, i) for i, s in enumerate((1.5, 0.9, 1.5))}
    clips = [Clip(name, "o", "o", f"speaker {name}", "test", 16_000, len(wav),
                  (Part(name, f"{name}.wav", 0, len(wav), 0, "hello"),), 0, row)
             for row, (name, wav) in enumerate(speech.items())]
    monkeypatch.setattr(samples, "read_clips", lambda path, split: clips)
    monkeypatch.setattr(samples, "read_clip", lambda clip, roots, start, n: speech[clip.id][start:start + n])
    inputs = {name: Artifact(path, "b", {}, {}) for name, path in paths.items()}
    inputs |= {"manifest": Artifact("m", "b", {}, {}),
               "semantic_tokens": Artifact(token_store(str(tmp_path)), "b", {"mean_run": RUN}, {})}
    corpus = corpus_config.CorpusConfig(name="c", sources=[{"kind": "folder", "name": "o", "root": str(tmp_path)}])
    settings = {"samples": lm_config.SamplesConfig(n=3, prompt_s=0.5, seconds=0.8), "corpus": corpus,
                "lm": lm_config.LMConfig(), "seed": 0, "cluster": run.ClusterConfig(device="cpu")}
    facts = samples.make_samples(settings, inputs, recording_out)
    entries = store.get_json(store.join(recording_out.path, "samples.json"))
    assert facts["wavs"] == len(entries) == 12
    most = {"unconditional": 0.8, "acoustic": 1.92, "continuation": 1.28, "resynthesis": 1.28}
    for entry in entries:
        wav, rate = soundfile.read(io.BytesIO(store.get(store.join(recording_out.path, entry["file"]))))
        assert rate == 16_000 and len(wav) == round(entry["seconds"] * rate)
        assert np.isclose(np.abs(wav).max(), min(entry["peak"], 1.0), atol=1e-3)
        assert entry["seconds"] <= most[entry["mode"]]
        if entry["mode"] in ("unconditional", "continuation"):
            assert entry["short_s"] == pytest.approx(most[entry["mode"]] - entry["seconds"])
            assert entry["ended"] or entry["short_s"] == 0
    assert {e["clip"] for e in entries if e["mode"] == "continuation"} == set(speech)
    ui = store.names(store.join(recording_out.path, "ui"))
    assert len([n for n in ui if n.endswith(".wav")]) == len([n for n in ui if n.endswith(".png")]) == 12
    assert 0 <= facts["short_s/continuation"] <= 0.8 and 0 < facts["semantic_per_s/resynthesis"] <= 25
    assert facts["rtf/continuation"] > 0 and facts["rtf/continuation.fine"] > 0
