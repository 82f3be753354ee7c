"""The codec's evaluation: metrics against noise, levels, shipped codecs on the same clips, and what is not installed."""

from __future__ import annotations

import functools
import os
import shutil
import sys

import numpy as np
import pytest
import soundfile
import torch

from audiolm import rng
from audiolm.eval import codec_quality as figures
from audiolm.eval.metrics import audio_quality
from audiolm.eval.models import baseline_codecs as shipped
from audiolm.tokenizers.base import TokenSpec, padded_samples

RATE = 16_000
needs_visqol = pytest.mark.skipif(not audio_quality.scorers().visqol, reason="visqol-python is not installed")
ENCODERS = [
    pytest.param(shipped.opus_by_libsndfile, id="libsndfile", marks=pytest.mark.skipif(
        "OPUS" not in soundfile.available_subtypes("OGG"), reason="this libsndfile has no Opus")),
    pytest.param(shipped.opus_by_tools, id="opusenc", marks=pytest.mark.skipif(
        not (shutil.which("opusenc") and shutil.which("opusdec")), reason="opusenc is not on the PATH"))]


def noise(samples: int, index: int = 0) -> np.ndarray:
    return rng.generator(0, "test-eval-codec", index).standard_normal(samples).astype(np.float32)


@functools.lru_cache
def voice(samples: int = 2 * RATE, index: int = 0) -> np.ndarray:
    """Harmonics of a gliding pitch with breath, in syllables, as loud as speech."""
    draw, t = rng.generator(0, "voice", index), np.arange(samples) / RATE
    phase = 2 * np.pi * np.cumsum(draw.uniform(90, 200) * (1 + 0.3 * np.sin(2 * np.pi * draw.uniform(0.5, 2) * t))) / RATE
    tone = sum(np.sin(k * phase) / k for k in range(1, 20))
    syllables = np.clip(np.sin(2 * np.pi * 3 * t + draw.uniform(0, 6)) + 0.4, 0, 1)
    return (0.12 * syllables * (tone + 0.3 * draw.standard_normal(samples))).astype(np.float32)


class Noisy:
    """A codec whose levels take away noise: `noise_at[q - 1]` is left with q of them (1 is as loud as a voice)."""

    def __init__(self, noise_at: tuple[float, ...], vocab: int = 1024):
        self.spec, self.noise_at, self.wavs = TokenSpec("noisy", RATE, 320, len(noise_at), vocab), noise_at, []

    def encode(self, wav_BT, lengths_B):
        frames = padded_samples(int(lengths_B[0])) // 320
        codes = torch.randint(self.spec.vocab, (frames, self.spec.n_q), generator=torch.Generator().manual_seed(0))
        codes[:, 0] = len(self.wavs)  # which clip it is
        self.wavs.append(np.pad(wav_BT[0].numpy(), (0, frames * 320 - wav_BT.shape[1])))
        return [codes]

    def decode(self, codes_BTQ):
        wav = self.wavs[int(codes_BTQ[0, 0, 0])]
        return torch.from_numpy(wav + 0.1 * self.noise_at[codes_BTQ.shape[2] - 1] * noise(len(wav)))[None]


def lag(wav: np.ndarray, made: np.ndarray) -> int:
    """Samples by which `made` comes later, where the two correlate most."""
    product = np.fft.rfft(wav, 2 * len(wav)).conj() * np.fft.rfft(made, 2 * len(wav))
    at = int(np.fft.irfft(product).argmax())
    return at if at < len(wav) else at - 2 * len(wav)


def test_every_metric_falls_as_noise_grows_and_the_original_is_best():
    wav = voice()
    table = figures.compare(Noisy((0.3, 0.1, 0.01)), [wav], levels=[1, 2, 3])
    assert [r["codec"] for r in table["rows"]] == ["identity", *["this codec"] * 3]
    identity, *ours = table["rows"]
    assert identity["pesq"] > 4.6 and identity["mel"] == 0 and identity["kbps"] is None
    present = [m for m in ("pesq", "stoi", "visqol") if m not in table["absent"]]
    for name in present:
        values = [r[name] for r in (*ours, identity)]
        assert values == sorted(values) and values[0] < values[-1], name
    assert [r["si_sdr"] for r in ours] == sorted(r["si_sdr"] for r in ours)
    assert table["absent"].keys() <= {"stoi", "visqol", "wer"}
    if "stoi" in present:
        assert identity["stoi"] == pytest.approx(1, abs=1e-6)


@needs_visqol
def test_visqol_names_its_version_and_mapper(monkeypatch):
    usual = audio_quality.scorers()
    assert usual.visqol.startswith("visqol-python ") and "speech mode" in usual.visqol
    assert "visqol" in usual.by_name and "visqol" not in usual.absent
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    without = audio_quality.scorers()
    assert "exponential mapper" in without.visqol
    wav = voice(RATE + 3200)
    assert without.by_name["visqol"](wav, wav) == pytest.approx(5, abs=0.01)


def test_si_sdr_and_mean_spectrum():
    wav, other = noise(RATE), noise(RATE, 1)
    assert audio_quality.si_sdr_db(wav, wav + 0.1 * other) == pytest.approx(20, abs=0.5)
    louder, same = (audio_quality.si_sdr_db(wav, gain * (wav + 0.1 * other)) for gain in (3, 1))
    assert louder == pytest.approx(same, abs=1e-4)
    assert audio_quality.si_sdr_db(wav, 0 * wav) == -np.inf and audio_quality.si_sdr_db(0 * wav, wav) == -np.inf
    steady = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE).astype(np.float32)
    assert audio_quality.mean_spectrum_distance(voice()) > 2 * audio_quality.mean_spectrum_distance(steady)


def test_a_row_for_every_level_and_speech_metrics_at_the_chosen_ones():
    result = figures.codec_figures(Noisy((0.3, 0.1, 0.1, 0.03), vocab=32), [voice(), voice(2000)], levels=[1, 4])
    rows = result["levels"]
    assert [r["n_q"] for r in rows] == [1, 2, 3, 4]
    assert [r["bits_per_s"] for r in rows] == [250.0, 500.0, 750.0, 1000.0]  # 50 Hz x 5 bits
    assert [r["pesq"] is not None for r in rows] == [True, False, False, True] and rows[3]["pesq"] > rows[0]["pesq"]
    assert rows[0]["gain"] is None and rows[1]["gain"] == pytest.approx(rows[0]["mel"] - rows[1]["mel"])
    assert result["levels_that_do_not_help"] == [3]
    assert rows[0]["scored"]["pesq"] == 1 and "shorter" in rows[0]["failed"]["pesq"]["1"]
    assert [r["level"] for r in result["codebooks"]] == [1, 2, 3, 4]
    assert result["codebooks"][0]["used"] == 2 / 32 and 20 < result["codebooks"][1]["perplexity"] <= 32
    assert result["clips"] == 2 and result["seconds"] == pytest.approx(2.125) and result["mean_spectrum_mel"] > 0.1


def test_default_levels():
    assert figures.default_levels(Noisy((0.1,) * 12)) == [1, 4, 6, 12]  # 4 x 10 bits x 50 Hz = 2 kb/s
    assert figures.default_levels(Noisy((0.1,) * 3, vocab=16_384)) == [1, 3]
    assert figures.default_levels(Noisy((0.1,))) == [1]


def test_what_cannot_be_measured_is_none_and_what_cannot_be_asked_is_refused():
    silent = figures.codec_figures(Noisy((0.1,)), [np.zeros(2 * RATE, np.float32)])["levels"][0]
    assert all(silent[name] is None for name in ("pesq", "visqol", "stoi", "si_sdr_db")) and silent["failed"]["pesq"]["0"]
    broken = figures.codec_figures(Noisy((float("nan"), 0.1)), [voice()])
    assert broken["levels"][0]["mel"] is None and broken["levels"][1]["gain"] is None
    assert broken["levels"][0]["pesq"] is None and broken["levels"][1]["pesq"] > 1
    with pytest.raises(ValueError, match=r"levels \[0, 3\] do not exist: this codec has 1 to 2"):
        figures.codec_figures(Noisy((0.1, 0.1)), [voice()], levels=[0, 1, 3])
    for make in (figures.codec_figures, figures.compare):
        with pytest.raises(ValueError, match="no clips"):
            make(Noisy((0.1,)), [])


@pytest.mark.parametrize(("module", "metric", "title"), [("pesq", "pesq", "PESQ"), ("pystoi", "stoi", "STOI"),
                                                         ("visqol", "visqol", "ViSQOL")])
def test_a_missing_library_costs_its_column_only(monkeypatch, module, metric, title):
    monkeypatch.setitem(sys.modules, module, None)
    table = figures.compare(Noisy((0.1, 0.05)), [voice(RATE // 2)], shipped.lyra_v2(None))
    assert "is not installed" in table["absent"][metric] and all(r[metric] is None for r in table["rows"])
    assert all(r["mel"] is not None for r in table["rows"])
    assert " ".join(figures.notes(table)).count(f"No {title}: ") == 1


def test_rates_count_bits_and_notes_say_what_has_no_value():
    baseline = shipped.Baseline("halved", 3.0, lambda wav: (wav / 2 + 0.01 * noise(len(wav)), 1500 * len(wav) // RATE))
    table = figures.compare(Noisy((0.1, 0.1), vocab=4), [voice(RATE // 2), voice(1600)], [baseline], with_visqol=False)
    assert [row["codec"] for row in table["rows"]] == ["identity", "halved", "this codec", "this codec"]
    assert table["rows"][1]["kbps"] == pytest.approx(1.5, abs=0.01)
    text = " ".join(figures.notes(table))
    assert "PESQ has a value on as few as 1 of 2 clips" in text and "No ViSQOL" in text
    assert "Levels that do not lower the mel distance: 2." in text


@pytest.mark.parametrize("encode", ENCODERS)
def test_opus_is_aligned_and_spends_about_what_it_is_asked_for(encode):
    wav = voice(4 * RATE + 123)
    scores, rates = [], []
    for kbps in shipped.OPUS_KBPS:
        made, bits = encode(wav, kbps)
        assert made.shape == wav.shape and made.dtype == np.float32 and abs(lag(wav, made)) <= 2
        rates.append(bits / len(wav) * RATE / 1000)
        assert 0.7 * kbps < rates[-1] < 1.25 * kbps
        scores.append(audio_quality.pesq_wb(wav, made))
    assert rates == sorted(rates) and scores[0] < min(scores[1:]) and scores[0] < 4


def test_bits_of_ogg_packets_are_counted_without_pages_and_headers():
    def page(*segments: int) -> bytes:
        return b"OggS" + bytes(22) + bytes([len(segments), *segments]) + bytes(sum(segments))

    # a packet of 255 + 45 within a page, one of 255 + 10 across two, one of exactly 255
    ogg = page(19) + page(255, 255, 60) + page(255, 45, 7, 255) + page(10, 255, 0)
    assert shipped.opus_bits(ogg) == 8 * (300 + 7 + 265 + 255)
    with pytest.raises(ValueError, match="no Ogg page at byte 27 of 32"):
        shipped.opus_bits(page() + b"fLaC" + b"\0")
    with pytest.raises(ValueError, match="no Ogg page at byte 0"):
        shipped.opus_bits(b"RIFF")


def test_lyra_says_why_it_is_not_there(monkeypatch, tmp_path):
    assert "no folder" in shipped.lyra_v2(None)[0].absent
    pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed")
    result = figures.compare(None, [voice(RATE // 2)], shipped.lyra_v2(str(tmp_path)))
    assert [r["codec"] for r in result["rows"]] == ["identity"] and "soundstream_encoder.tflite" in result["absent"]["Lyra v2"]
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    assert "ai-edge-litert is not installed" in shipped.lyra_v2(str(tmp_path))[0].absent


@pytest.mark.skipif("AUDIOLM_LYRA" not in os.environ, reason="AUDIOLM_LYRA names no folder with Lyra's models")
def test_lyra_is_aligned_and_begins_anew_with_each_clip():
    result = shipped.lyra_v2(os.environ["AUDIOLM_LYRA"])
    assert [b.absent for b in result] == [""] * 3
    wav = voice(4 * RATE + 7)
    for baseline in result:
        made, bits = baseline.round_trip(wav)
        assert made.shape == wav.shape and abs(lag(wav, made)) <= 16
        assert bits / 1000 == pytest.approx(baseline.kbps * 4, rel=0.01)
        assert np.array_equal(made, baseline.round_trip(wav)[0])
