"""Pairs made of recordings: the wrong sound changes halfway and the right one does not; the next pair changes it back."""

from __future__ import annotations

import os

import numpy as np
import pytest

from audiolm import store
from audiolm.data.audio import decode
from audiolm.eval.salmon_pairs import FRAME, LEVEL, gender_table, levelled, make_set, pause

TASKS = ["speaker_consistency", "gender_consistency", "bg_all_consistency", "rir_consistency"]
GENDERS = {"low": "M", "high": "F", "higher": "F"}


@pytest.fixture(scope="module")
def made(speech, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("made"))
    assert make_set(speech, out, 6, 1, genders=GENDERS) == dict.fromkeys(TASKS, 6)
    return out


def pair(folder: str, task: str, number: int) -> list[np.ndarray]:
    return [decode(f"{folder}/{task}/sample_{number}_{side}.wav")[0] for side in (0, 1)]


def is_high(wav_T: np.ndarray) -> bool:
    """True where the strongest autocorrelation between 70 and 350 Hz is above 150 Hz."""
    lag_T = np.fft.irfft(np.abs(np.fft.rfft(wav_T, 2 * len(wav_T))) ** 2)[:230]
    return 16_000 / (45 + lag_T[45:].argmax()) > 150


@pytest.mark.parametrize("task", TASKS)
def test_the_wrong_sound_is_half_this_pairs_and_half_the_next_ones(made, task):
    for number, about in zip((0, 2, 4), store.get_json(f"{made}/{task}/metadata.json"), strict=True):
        (one, one_other), (other, other_one) = (pair(made, task, number + i) for i in (0, 1))
        assert about["indices"] == [number, number + 1] and len(one) == len(one_other) and len(other) == len(other_one)
        half = int(np.argmax(one != one_other))  # the first sample that differs
        rest = len(one) - half
        assert 0.2 * len(one) < half < 0.8 * len(one)
        np.testing.assert_array_equal(one_other[half:], other[-rest:])  # goes on as the next pair's right sound does
        np.testing.assert_array_equal(other_one[-rest:], one[half:])
        np.testing.assert_array_equal(other_one[:-rest], other[:-rest])
        cubes = [np.sum(np.abs(wav_T, dtype=np.float64) ** 3) for wav_T in (one, one_other, other, other_one)]
        assert (cubes[0] > cubes[1]) + (cubes[2] > cubes[3]) == 1  # what scores each half by itself gets 50 %
        assert np.corrcoef(one[half:], one_other[half:])[0, 1] < 0.98


def test_another_gender_is_another_pitch(made):
    for number in range(6):
        right, wrong = pair(made, "gender_consistency", number)
        high = [is_high(wav_T[part]) for wav_T in (right, wrong) for part in (slice(16_000), slice(-16_000, None))]
        assert high[0] == high[1] == high[2] != high[3]


def test_noise_and_room_leave_the_words_and_the_level(made):
    for number, about in zip((0, 2, 4), store.get_json(f"{made}/bg_all_consistency/metadata.json"), strict=True):
        one, other = (pair(made, "bg_all_consistency", number + i)[0] for i in (0, 1))
        gone = 10 ** (-about["snr_db"] / 20) * LEVEL
        assert np.sqrt(np.mean((one - other) ** 2) / 2) == pytest.approx(gone, rel=0.3)  # two noises without the speech
        assert len(set(about["noises"])) == 2
    for number in range(6):
        for wav_T in pair(made, "rir_consistency", number):
            assert np.sqrt(np.mean(wav_T**2)) == pytest.approx(LEVEL, rel=0.3)


def test_a_seed_makes_the_same_set_and_more_pairs_begin_with_it(speech, made, tmp_path):
    def files(folder, of):
        return {name: store.get(f"{folder}/{name}") for name in store.files(made) if name.split("_")[-2:-1] == [of]}

    make_set(speech, str(tmp_path / "few"), 2, 1, genders=GENDERS)
    assert all(len(files(made, of)) == 8 and files(tmp_path / "few", of) == files(made, of) for of in "01")
    before = store.listing(made)
    make_set(speech, made, 6, 1, genders=GENDERS)  # begun again: the same bytes
    assert {name: size for name, (size, _) in before.items()} == store.files(made)
    with pytest.raises(ValueError, match="holds a set of other settings"):
        make_set(speech, made, 6, 2, genders=GENDERS)


def test_refuses_what_makes_no_pairs(speech, tmp_path):
    out = str(tmp_path / "out")
    for pairs, speakers in ((3, None), (0, None), (2, ["low"])):
        with pytest.raises(ValueError, match="an even number and two speakers are needed"):
            make_set(speech, out, pairs, speakers=speakers)
    with pytest.raises(ValueError, match="no recordings of nobody; there are high, higher, low, the folders"):
        make_set(speech, out, 2, speakers=["low", "nobody"])
    with pytest.raises(ValueError, match="lacks the speakers high, higher"):
        make_set(speech, out, 2, genders={"low": "M"})
    with pytest.raises(ValueError, match="have one gender"):
        make_set(speech, out, 2, speakers=["high", "higher"], genders=GENDERS)
    store.put(f"{tmp_path}/short/b/0.wav", store.get(f"{speech}/low/book/0.wav"))
    store.put(f"{tmp_path}/short/a/0.wav", store.get(f"{speech}/low/book/0.wav"))
    with pytest.raises(ValueError, match="a speaker has 1 recordings of 3 to 10 s, ./0.wav and others, and 2 are needed"):
        make_set(f"{tmp_path}/short", out, 2)
    store.put(f"{tmp_path}/SPEAKERS.TXT", b"; ID | SEX\n14   | F | train |\nx1|M\n")
    assert gender_table(f"{tmp_path}/SPEAKERS.TXT") == {"14": "F", "x1": "M"}


@pytest.mark.skipif("AUDIOLM_SPEECH" not in os.environ, reason="AUDIOLM_SPEECH names no folder of recordings by reader")
def test_real_speech_is_cut_in_a_pause(tmp_path):
    out = str(tmp_path / "real")
    assert make_set(os.environ["AUDIOLM_SPEECH"], out, 4)["speaker_consistency"] == 4
    for number in range(4):
        right, wrong = pair(out, "speaker_consistency", number)
        cut = int(np.argmax(right != wrong))
        around = np.sqrt(np.mean(wrong[cut - FRAME // 2:cut + FRAME // 2] ** 2))
        assert around < 0.2 * LEVEL and pause(levelled(right)) > 0
