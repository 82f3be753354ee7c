"""Table III with planted voices: two pitches are told apart, shuffled names give chance, nets are kept and found again."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from audiolm import store
from audiolm.config.evaluation import TablesConfig
from audiolm.eval.generated import LABELS, Sample, SampleSpec
from audiolm.eval.models import convnet, speaker
from audiolm.eval.models.convnet import Settings, load_net, trained
from audiolm.eval.suites import speakers as suite
from audiolm.eval.suites.speakers import COSINE, accuracy, similarity
from audiolm.models.mel import filterbank
from tests.worlds.basics import ROOT
from tests.worlds.sounds import PROMPT, SR, chance_band, talk

QUICKSTART = ROOT / "workflows" / "quickstart"
TINY = Settings(crop_s=0.5, channels=(8, 16, 16), mels=40, steps=60, batch=16, lr=5e-3)
PITCHES = {"low": 110.0, "high": 220.0}


def sounds(voice: dict[str, str], mode: str, first: int, n: int = 6) -> list[Sample]:
    """n clips a speaker of that mode: the prompt is the speaker's, what follows has the pitch of voice[speaker]."""
    made = []
    for s, (name, pitch) in enumerate(PITCHES.items()):
        for i in range(first, first + n):
            index = 100 * s + i
            wav = np.concatenate([talk(pitch, 0.5, index), talk(PITCHES[voice[name]], 1.5, 1000 + index)])
            made.append(Sample(SampleSpec(f"{name}{i}", name, None, mode, 0, PROMPT), wav))
    return made


OWN, OTHER = {"low": "low", "high": "high"}, {"low": "high", "high": "low"}


def test_planted_voices_are_told_apart_by_what_follows_the_prompt(tmp_path):
    learn = [m for mode in ("original", "resynthesis") for m in sounds(OWN, mode, 0)]
    made = [*sounds(OWN, "original", 50), *sounds(OWN, "resynthesis", 50), *sounds(OTHER, "continuation", 50)]
    seen = []
    table = {r.item: r for r in accuracy(learn, made, str(tmp_path), TINY, progress=lambda *a: seen.append(a))}
    assert table["original"].value == 100 and table[LABELS["resynthesis"]].value == 100
    assert table["continuation"].value == 0  # in the other one's voice: the true prompt does not count
    assert (table["chance"].value, table["chance"].role) == (50, "floor")
    assert (table["continuation"].paper, table["continuation"].n) == (92.6, 12) and seen[-1][:2] == (60, 60)


def test_shuffled_names_give_chance(tmp_path):
    learn, made = sounds(OWN, "original", 0, 10), sounds(OWN, "original", 50, 10)
    names = [m.spec.speaker for m in made]
    mixed = [replace(m, spec=replace(m.spec, speaker=("low", "high")[i % 2])) for i, m in enumerate(learn)]
    row = accuracy(mixed, made, str(tmp_path), TINY)[0]
    low, high = chance_band(row.n)
    assert low <= row.value <= high, names


def test_a_classifier_is_kept_by_its_sounds_and_settings(tmp_path, monkeypatch):
    learn = sounds(OWN, "original", 0, 2)
    wavs, labels = [m.wav_T for m in learn], [0, 0, 1, 1]
    few = replace(TINY, steps=3)
    net, path = trained(str(tmp_path), wavs, labels, ["low", "high"], few)
    other = [trained(str(tmp_path), *args)[1] for args in (
        (wavs, labels[::-1], ["low", "high"], few), (wavs[::-1], labels, ["low", "high"], few),
        (wavs, labels, ["low", "high"], replace(few, seed=1)))]
    assert len({path, *other}) == 4
    state = torch.random.get_rng_state()
    twin = convnet.fit(wavs, labels, 2, few)  # the same weights again, and nobody else's generator moved
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), twin.state_dict().values(), strict=True))
    monkeypatch.setattr(convnet, "fit", None)
    again, same = trained(str(tmp_path), wavs, labels, ["low", "high"], few)
    assert same == path and store.names(path) == ["config.json", "model.safetensors"]
    np.testing.assert_array_equal(convnet.log_probs(again, wavs[0]), convnet.log_probs(net, wavs[0]))
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_net(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="'mid' has no sound"):
        trained(str(tmp_path), wavs, labels, ["low", "high", "mid"], few)


def test_refusals(tmp_path):
    learn, made = sounds(OWN, "original", 0, 2), sounds(OWN, "original", 50, 2)
    with pytest.raises(ValueError, match="high0 is both learned and judged"):
        accuracy(learn, learn, str(tmp_path), TINY)
    with pytest.raises(ValueError, match="speakers high are judged, not learned"):
        accuracy(learn[:2], made, str(tmp_path), TINY)


def test_embeddings_without_their_package_are_seen(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    rows = similarity(sounds(OWN, "original", 50, 1))
    assert [(r.value, r.metric) for r in rows] == [(None, COSINE)] and "--no-deps resemblyzer" in rows[0].note


def test_mel_powers_are_librosas():
    audio = pytest.importorskip("transformers.audio_utils")  # their filters are tested against librosa's
    oracle = audio.mel_filter_bank(201, 40, 0.0, 8000.0, SR, norm="slaney", mel_scale="slaney")
    np.testing.assert_allclose(filterbank(SR, 400, 40, "slaney").numpy(), oracle, atol=1e-7)
    wav = talk(150, 1.0, 0)
    window = audio.window_function(400, "hann")
    spec = audio.spectrogram(wav.astype(np.float64), window, 400, 160, 400, power=2.0, pad_mode="constant", mel_filters=oracle)
    np.testing.assert_allclose(speaker.mel_power(torch.from_numpy(wav)).numpy(), spec.T, rtol=1e-3, atol=1e-6)


def test_embeddings_know_a_voice_again():
    if why := speaker.missing_dependency():
        pytest.skip(why)
    import soundfile

    files = [sorted(folder.rglob("*.flac"))[:2] for folder in sorted((QUICKSTART / "flac" / "train").iterdir())[:4]]
    wavs = [[soundfile.read(f, dtype="float32")[0][:5 * SR] for f in own] for own in files]
    made = []
    for s, own in enumerate(wavs):
        for i, wav in enumerate(own):
            other = np.concatenate([wav[:2 * SR], wavs[s - 1][i][2 * SR:]])  # goes on in another's voice
            made += [Sample(SampleSpec(f"{s}-{i}", f"p{s}", None, mode, 0, 2 * SR), w)
                     for mode, w in (("original", wav), ("resynthesis", 0.5 * wav), ("continuation", other))]
    table = {r.item: r for r in similarity(made)}
    same, soft = table["original"], table[LABELS["resynthesis"]]
    assert same.value > 0.75 and same.low > max(table[i].high for i in ("continuation", "another speaker"))
    assert soft.value == pytest.approx(same.value, abs=0.05) and table["continuation"].role == "ours"


def test_one_speaker_is_enough_for_cosines_alone(monkeypatch):
    made = [m for mode in ("original", "resynthesis", "continuation") for m in sounds(OWN, mode, 50, 2)
            if m.spec.speaker == "low"]
    monkeypatch.setattr(suite, "samples_for", lambda context, name, plan, choose: [m for m in made if m.spec.mode in plan])
    monkeypatch.setattr(suite, "save_players", lambda *_: None)
    monkeypatch.setattr(speaker, "embedder", lambda model, device: lambda wav_T: np.array([1.0, wav_T[-1]]))
    rows = suite.voice_suite(SimpleNamespace(device="cpu", seed=0, config=SimpleNamespace(tables=TablesConfig())))
    assert [(r.item, r.n) for r in rows if r.n] == [("original", 2), (LABELS["resynthesis"], 2), ("continuation", 2)]
    assert not [r for r in rows if r.role == "floor"] and rows[0].low < rows[0].value < rows[0].high  # over clips
