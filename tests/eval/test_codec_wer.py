"""Word error rate of a codec: references, sums, one transcript a version, and what cannot be measured."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from audiolm import store
from audiolm.config.codec import CodecMetricsConfig
from audiolm.config.corpus import ClipFilter
from audiolm.data.clips import Clip, Part, clips_parquet
from audiolm.eval import codec_quality, codec_wer
from audiolm.eval.codec_wer import Spoken
from audiolm.eval.models import asr
from audiolm.eval.models.baseline_codecs import Baseline
from audiolm.eval.steps.codec import flat_facts, spoken_clips
from tests.eval.test_codec_quality import RATE, Noisy, noise, voice

SAID = "it was the best of times it was the worst".split()  # ten words


@pytest.fixture
def recogniser(monkeypatch):
    """Stands in for Whisper: the louder the noise, the fewer words; keeps how many wavs it was given."""
    for name in ("jiwer", "transformers"):
        pytest.importorskip(name)
    calls = SimpleNamespace(n=0, words=len(SAID))

    def recognise(wav_T: np.ndarray) -> str:
        calls.n += 1
        share = 1 - 10 * float(np.sqrt(np.mean(np.square(wav_T[-1600:]))))  # the voices end in silence
        return " ".join(SAID[:round(calls.words * max(share, 0.0))])

    monkeypatch.setattr(asr, "missing_dependency", lambda path=None: None)
    monkeypatch.setattr(asr, "recogniser", lambda path=None, device="cpu": recognise)
    return calls


def spoken_voice(index: int) -> np.ndarray:
    return np.concatenate([voice(RATE, index), np.zeros(1600, np.float32)])


def test_the_column_of_original_baselines_and_levels_and_what_it_is_against(recogniser):
    wavs, baseline = [spoken_voice(i) for i in range(3)], Baseline("halved", 3.0, lambda wav: (
        wav + 0.03 * noise(len(wav)), 1500 * len(wav) // RATE))
    codec = Noisy((0.8, 0.5, 0.2, 0.0))
    texts = [" ".join(SAID), " ".join([*SAID, *SAID]), " ".join(SAID)]
    table = codec_quality.compare(codec, wavs, [baseline], levels=[1, 3, 4], with_visqol=False,
                                  spoken=Spoken(wavs, texts))
    assert recogniser.n == 3 * (1 + 1 + 3)  # each version of a clip once, and not the level that is not measured
    identity, *others = table["rows"]
    assert identity["wer"] == pytest.approx(100 * 10 / 40)  # errors over words of all clips
    low, high = identity["wer_interval"]
    assert low == 0 and high == pytest.approx(50)
    assert [r["wer"] for r in table["levels"]][1] is None
    ours = [r["wer"] for r in table["rows"] if r["codec"] == "this codec"]
    assert ours == sorted(ours, reverse=True) and ours[0] > 75 and ours[-1] == identity["wer"]
    assert next(r["wer"] for r in others if r["codec"] == "halved") > identity["wer"]
    text = codec_quality.format_table(table)
    assert "WER %" in text.splitlines()[0]
    assert "WER: 3 utterances, 40 words, by Whisper tiny.en, against their texts." in text
    assert flat_facts(table)["wer"] == 25.0


def test_without_texts_the_transcript_of_the_original_is_the_reference(recogniser):
    wavs = [spoken_voice(0), spoken_voice(1), np.ones(RATE, np.float32)]  # nothing is heard in the last one
    table = codec_quality.compare(Noisy((0.5, 0.0)), wavs, levels=[1, 2], with_visqol=False, spoken=Spoken(wavs))
    assert recogniser.n == 3 + 2 * 2
    assert [r["wer"] for r in table["rows"]] == [0.0, pytest.approx(50, abs=10), 0.0]
    assert table["wer"] == {"clips": 2, "words": 20, "reference": "transcripts", "asr": "Whisper tiny.en"}
    assert "WER is 0 for that reason" in codec_quality.format_table(table)


def test_without_words_or_packages_the_column_is_absent(recogniser, monkeypatch):
    wav = spoken_voice(0)
    recogniser.words = 0
    table = codec_quality.compare(Noisy((0.1,)), [wav], with_visqol=False, spoken=Spoken([wav]))
    assert table["absent"]["wer"] == codec_wer.NO_WORDS and table["wer"] is None and "wer" not in flat_facts(table)
    assert all(r["wer"] is None for r in (*table["rows"], *table["levels"]))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "jiwer", None)
    monkeypatch.setattr(asr.importlib.util, "find_spec", lambda name: None)
    table = codec_quality.compare(None, [wav], with_visqol=False, spoken=Spoken([wav]))
    assert "jiwer" in table["absent"]["wer"] and asr.INSTALL in table["absent"]["wer"]
    assert "No WER %: " in codec_quality.format_table(table)


def test_the_step_takes_whole_utterances_with_a_text_else_the_clips_at_hand(tmp_path):
    soundfile.write(tmp_path / "long.wav", voice(9 * RATE), RATE)
    want = CodecMetricsConfig(where=ClipFilter(), clips=2, clip_s=1.0, coarse_levels=2, visqol=False, with_lyra=False,
                              wer=1, lyra=None)
    wavs = [voice(RATE), voice(RATE, 1)]

    def spoken(*texts: str | None) -> Spoken:
        """Of a clip of two utterances of 4.5 s with these texts."""
        parts = tuple(Part(f"p{i}", "long.wav", i * 72_000, 72_000, i * 72_000, text) for i, text in enumerate(texts))
        clip = Clip("a/long", "a", "a", "ann", "test", RATE, 2 * 72_000, parts, 0, 0)
        store.put(str(tmp_path / "clips.parquet"), clips_parquet([clip]))
        return spoken_clips(want, {"a": str(tmp_path)}, str(tmp_path), wavs, "cpu")

    found = spoken(None, "these words alone")
    assert found.texts == ["these words alone"] and len(found.wavs[0]) == 72_000 // 640 * 640
    found = spoken(None, None)
    assert found.texts is None and len(found.wavs) == 1 and found.wavs[0] is wavs[0]
