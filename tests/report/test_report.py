"""The report: one self-contained, escaped page from complete, partial and absent inputs; pictures that can be read."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audiolm.eval.results import Result
from audiolm.metrics_log import MetricsFile
from audiolm.render import plots
from audiolm.report.results_page import build as build_page
from audiolm.report.results_page import sections_of
from audiolm.report.run_report import build_report
from tests.worlds.pages import read

NASTY = "<script>alert('x')</script> & \"q\""


@dataclass
class Artifact:
    path: str
    facts: dict = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return str(Path(self.path).parent)


@dataclass
class Out:
    path: str

    def check(self):
        pass


def tone(path: Path, seconds: float = 2.0, hz: float = 440.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    t = np.arange(int(16_000 * seconds)) / 16_000
    sweep = 0.4 * np.sin(2 * np.pi * (hz + 500 * t) * t) * (0.6 + 0.4 * np.sin(6 * t))
    soundfile.write(path, sweep, 16_000, subtype="PCM_16")


def put(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def build(folder: Path, step: str) -> Path:
    path = folder / step / "abcdef012345" / "0001" / "0001"
    put(path.parent / "done.json", {"seconds": 12.5, "time": 1_750_000_000})
    put(path.parent.parent / "recipe.json", {"step": step, "config": {"train": {"steps": 80, "note": NASTY}}})
    return path


def codec_figures(inputs: dict[str, Artifact]) -> dict:
    levels = [{"n_q": q, "kbps": 0.4 * q, "pesq": 1.1 + 0.1 * q if q in (1, 6) else None, "visqol": None, "stoi": 0.5,
               "si_sdr": None if q == 1 else -5.0 + q, "mel": 1.0 - 0.1 * q, "gain": None if q == 1 else 0.1,
               "wer": {1: 91.25, 6: 33.5}.get(q),
               "scored": {"pesq": 2}} for q in range(1, 7)]
    others = [{"codec": name, "n_q": None, "kbps": kbps, "pesq": pesq, "visqol": None, "stoi": 0.9, "si_sdr": None, "mel": 0.3,
               "wer": 8.125, "scored": {"pesq": 2}} for name, kbps, pesq in (
        ("identity", None, 4.64), ("Opus (opusenc)", 5.87, 2.17))]
    labels = ("original", "1 level, 0.4 kb/s", "6 levels, 2.4 kb/s", "Opus (opusenc), 6 kb/s")
    files = [{"label": label, "file": f"ui/codec/9009-1-{i}.wav"} for i, label in enumerate(labels)]
    for i, f in enumerate(files):
        tone(Path(inputs["codec_figures"].path) / f["file"], 1.0, 200.0 + 100 * i)
    return {"levels": levels, "rows": [*others, *({"codec": "this codec", **r} for r in levels if r["pesq"])],
            "levels_that_do_not_help": [5], "absent": {"visqol": "visqol-python is not installed"}, "visqol": None,
            "wer": {"clips": 4, "words": 57, "reference": "texts", "asr": "Whisper tiny.en"},
            "usage": [{"level": q, "used": 200 - 10 * q, "perplexity": 120.0 - 9 * q} for q in range(1, 7)],
            "mean_spectrum_mel": 1.2, "clips": 2, "seconds": 8.0, "players": [{"clip": "9009-1", "files": files}]}


def example(folder: Path) -> dict[str, Artifact]:
    """A complete run's outputs, made up."""
    inputs = {}
    for step in ("manifest", "masked_model", "codec", "codec_figures", "lm_semantic", "lm_coarse", "lm_fine", "samples",
                 "evaluate"):
        inputs[step] = Artifact(str(build(folder, step)))
    inputs["manifest"].facts = {
        "files": 83, "rejected": {"total": 2, "silent": 1, "too short": 1}, "clips_by_split": {"train": 20, "test": 4},
        "hours": {"quickstart": {"train": 0.09, "test": 0.02}}, "speakers": {"train": 7, "test": 2}}
    for step, start, end in (("masked_model", 4.6, 3.1), ("codec", 80.0, 9.0), ("lm_semantic", 4.2, 2.9),
                             ("lm_coarse", 5.5, 4.4), ("lm_fine", 5.5, 5.0)):
        f = MetricsFile(f"{inputs[step].folder}/metrics-0001.jsonl")
        for s in range(10, 310, 10):
            loss = end + (start - end) * np.exp(-s / 80)
            seen = {"val.loss": loss + 0.1, "val.mel/q00": loss + 0.3, "val.mel/q01": loss + 0.1, "val.pesq": 1.0 + s / 300}
            f.add(s, {"loss": loss + 0.05 * np.sin(s), **(seen if s % 50 == 0 else {})})
        f.close()
    samples = []
    for mode in ("unconditional", "acoustic", "continuation", "resynthesis"):
        for i in (1, 2):
            tone(Path(inputs["samples"].path) / "wav" / f"{mode}-{i}.wav", 3.0, 200.0 * i)
            samples.append({"file": f"wav/{mode}-{i}.wav", "mode": mode, "title": f"{mode} {i}", "seconds": 3.0,
                            "prompt_s": 1.0 if mode == "continuation" else None, "clip": "9009-1",
                            "text": None if mode == "unconditional" else NASTY, "peak": 0.4})
    put(Path(inputs["samples"].path) / "samples.json", samples)
    rungs = []
    for n, (rung, mel) in enumerate((("original", 0.0), ("codec, 6 levels", 0.5), ("codec, 2 levels", 0.7),
                                     ("fine from true coarse", 0.72), ("coarse from true semantic", 1.1),
                                     ("continuation", 1.4))):
        for clip in ("9009-1", "9010-2"):
            tone(Path(inputs["evaluate"].path) / "wav" / f"{n}-{clip}.wav", 1.0, 300.0)
        rungs.append({"rung": rung, "mel": mel,
                      "files": [{"clip": c, "file": f"wav/{n}-{c}.wav"} for c in ("9009-1", "9010-2")]})
    put(Path(inputs["evaluate"].path) / "evaluate.json", {
        "stages": {"lm_semantic": {"loss": 2.6, "unigram": 3.8, "bigram": 2.8, "fivegram": 2.7, "baseline": 2.7,
                                   "tokens": 4000},
                   "lm_coarse": {"loss": 4.4, "unigram": 5.0, "previous": 4.6, "below": None, "baseline": 4.5, "tokens": 9000,
                                 "levels": [{"level": 1, "loss": 4.0, "unigram": 4.9, "previous": 4.2, "baseline": 4.2},
                                            {"level": 2, "loss": 4.8, "unigram": 5.1, "previous": 5.0, "below": 4.75,
                                             "baseline": 4.75}]},
                   "lm_fine": {"loss": 5.3, "unigram": 5.2, "previous": 5.25, "below": 5.2, "baseline": 5.2, "tokens": 12000}},
        "not_under": [{"stage": "lm_coarse", "level": 2, "better": "below", "percent": 1.05},
                      {"stage": "lm_fine", "level": None, "better": "by level", "percent": 1.92}],
        "tokens": {"entropy_bits": 5.2, "perplexity": 36.8, "mean_run": 1.9, "used": 61}, "ladder": rungs,
        "conditioning": {"lm_coarse": {"true": 4.4, "shuffled": 4.6}, "lm_fine": {"true": 5.3, "shuffled": 5.29}}})
    put(Path(inputs["codec_figures"].path) / "codec.json", codec_figures(inputs))
    return inputs


def test_a_complete_report(tmp_path):
    inputs = example(tmp_path)
    put(Path(inputs["codec_figures"].path) / "gates.json", {
        "wer": {"ok": False, "forced": False, "text": "the codec is not understood", "figures": {}}})
    put(Path(inputs["lm_fine"].path) / "gates.json", {
        "unigram": {"ok": True, "forced": False, "text": "not this", "figures": {}},
        "conditioning": {"ok": False, "forced": True, "text": "the prefix is not used", "figures": {}}})
    facts = build_report({"title": f"corpus {NASTY}"}, inputs, Out(str(tmp_path / "out")))
    found = read(tmp_path / "out")
    assert facts["players"] == found.tags.count("audio") == 8 + 12 + 4
    assert "script" not in found.tags and NASTY in found.text
    assert all(a.startswith(("data:", "#")) for a in found.addresses), "the page must need nothing beside it"
    for text in ("✓ 7.1 % under", "✓ 3.7 % under", "✗ 1.1 % over", "✗ Not under the better baseline: coarse stage, level 2 "
                 "(1.1 % over); fine stage (1.9 % over).", "✗ not used", "✓ 0.200 lost without it", "9010-2",
                 "abcdef012345", "rejected 2 (silent 1, too short 1)", "train.steps", "mean run", "36.80",
                 "Held-out clip 9009-1", "Opus (opusenc), 6 kb/s", "5.87", "4.64", "No ViSQOL: visqol-python is not installed.",
                 "WER %", "91.2", "33.5", "WER: 4 utterances, 57 words, by Whisper tiny.en, against their texts.",
                 "✗ a gate failed: the codec is not understood (told only)", "✗ no gain from 5",
                 "Levels that do not lower the mel distance: 5.",
                 "✗ fine stage, a gate failed: the prefix is not used (forced)"):
        assert text in found.text, text
    sounds = [a for a in found.addresses if a.startswith("data:audio/flac;base64,")]
    wav, rate = soundfile.read(io.BytesIO(base64.b64decode(sounds[0].split(",", 1)[1])))
    assert rate == 16_000 and len(wav) == 48_000 and np.abs(wav).max() > 0.3
    plots_there = {p.name for p in (tmp_path / "out" / "ui" / "plots").iterdir()}
    assert plots_there == {"ladder.png", "codebook-use.png", "codec-rate.png", "codec-pesq.png", *(f"loss-{s}.png" for s in (
        "masked_model", "codec-training", "codec-validation", "lm_semantic", "lm_coarse", "lm_fine"))}


def test_a_report_of_nothing_says_what_is_missing(tmp_path):
    build_report({"title": "empty"}, {}, Out(str(tmp_path)))
    found = read(tmp_path)
    assert found.text.count("is not among this report's inputs") == 4 and found.text.count("Not measured.") == 2
    assert "No training step" in found.text and found.tags.count("audio") == 0


def test_a_report_survives_what_is_half_there(tmp_path):
    inputs = example(tmp_path)
    evaluate = Path(inputs["evaluate"].path) / "evaluate.json"
    gone = [{"clip": "9009-1", "files": [{"label": "original", "file": "ui/codec/gone.wav"}]}]
    put(Path(inputs["codec_figures"].path) / "codec.json", {"levels": [{"n_q": 1, "pesq": None}], "players": gone})
    put(evaluate, {"stages": {"lm_semantic": {"loss": 2.0}},
                   "conditioning": {"lm_coarse": {"true": 1.0}}, "ladder": [{"rung": "original"}]})
    (Path(inputs["samples"].path) / "wav" / "acoustic-1.wav").unlink()
    (Path(inputs["samples"].path) / "wav" / "acoustic-2.wav").write_bytes(b"not a wav")
    Path(inputs["codec"].folder, "metrics-0001.jsonl").unlink()
    del inputs["lm_fine"]
    build_report({"title": "half"}, inputs, Out(str(tmp_path / "out")))
    found = read(tmp_path / "out")
    assert "ui/codec/gone.wav is gone." in found.text
    assert "wav/acoustic-1.wav is gone." in found.text and "No metrics file in the build of codec" in found.text
    assert found.tags.count("audio") == 6


def test_rows_that_were_not_measured_share_a_line_for_each_reason():
    why = "no transcripts; set tables.text_model=FOLDER"
    rows = [Result("II", "ours", "WER %", 6.5, paper=6.0), Result("II", "codec", "WER %", None, paper=3.0, note=why),
            *(Result("II", item, metric, None, note=why) for item in ("shuffled", "ours") for metric in ("BLEU", "CER %")),
            Result("II", "original", "WER %", None, role="ceiling", note=NASTY)]
    (section,) = sections_of([("ours", rows, [])])
    assert [row[:3] for row in section.data["table"]["rows"]] == [["ours", "WER %", "6.500"]]
    assert section.data["unmeasured"] == [("codec (WER %, paper 3.0); shuffled, ours (BLEU; CER %)", why),
                                          ("original (ceiling) (WER %)", NASTY)]
    page = build_page("t", [("ours", rows, [])])
    assert f"not measured: codec (WER %, paper 3.0); shuffled, ours (BLEU; CER %): {why}" in page and "<script>" not in page
    (both,) = sections_of([("A", rows, []), ("B", [Result("II", "codec", "WER %", 3.1)], [])])
    assert len(both.data["table"]["rows"]) == 2, "what one system measured keeps its row"


@pytest.fixture
def figures(monkeypatch):
    """Every plot returns its figure, after it was drawn as PNG."""
    png = plots._png

    def keep(figure):
        assert png(figure).startswith(b"\x89PNG")
        return figure

    monkeypatch.setattr(plots, "_png", keep)


def labels(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("samples", [1, 100, 16_000, 320_000])
def test_spectrograms_of_any_length(figures, samples):
    figure = plots.spectrogram(np.zeros(samples, np.float32), "$silence_$", prompt_s=0.5)
    (axes,) = figure.axes
    wide, high = figure.canvas.get_width_height()
    assert wide > high > 100 and axes.get_title("left") == "$silence_$"
    (image,) = axes.images
    assert list(image.get_extent()) == [0, samples / 16_000, 0, 8] and image.get_array().shape[0] == 257
    assert [line.get_xdata()[0] for line in axes.lines] == [0.5], "the prompt's end"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("seconds", "kHz")


def test_a_spectrogram_shows_the_sound_at_its_pitch(figures):
    t = np.arange(32_000) / 16_000
    for hz in (1000.0, 7000.0):
        (image,) = plots.spectrogram(np.sin(2 * np.pi * hz * t), "").axes[0].images
        power_FT = image.get_array()
        loudest = power_FT.mean(axis=1).argmax() * image.get_extent()[3] * 1000 / (len(power_FT) - 1)
        assert loudest == pytest.approx(hz, abs=40) and image.norm.vmax - image.norm.vmin == pytest.approx(80)


def test_curves_with_gaps_and_without_values(figures):
    values = {"a": [3.0, None, 1.0], "b": [None, None, None]}
    (axes,) = plots.curves([1, 2, 3], values, "t", baselines={"unigram": 2.0}).axes
    curve, baseline = axes.lines
    assert list(curve.get_xdata()) == [1, 3] and list(curve.get_ydata()) == [3.0, 1.0] and curve.get_marker() == "o"
    assert list(baseline.get_ydata()) == [2.0, 2.0] and labels(axes) == ["a", "unigram, 2.000"]
    assert axes.get_yscale() == "linear" and (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss")
    (axes,) = plots.curves(range(100), {"a": np.geomspace(1000, 1, 100)}, "t").axes
    assert axes.get_yscale() == "log" and axes.lines[0].get_marker() == "None"
    (axes,) = plots.curves([], {}, "t").axes
    assert not axes.lines and axes.get_legend() is None


def test_bars_stand_from_top_to_bottom_with_their_values(figures):
    (axes,) = plots.bars(["x", "y"], [2.0, 4.0], "t", "nats").axes
    assert [bar.get_width() for bar in axes.patches] == [2.0, 4.0] and axes.get_xlim() == (0, pytest.approx(4.48))
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["x", "y"] and axes.get_ylim()[0] > axes.get_ylim()[1]
    assert [text.get_text() for text in axes.texts] == [" 2", " 4"] and axes.get_xlabel() == "nats"
    (axes,) = plots.bars([], [], "t", "x").axes
    assert not axes.patches


def test_codebook_use_and_quality_over_rate(figures):
    (axes,) = plots.codebook_use([1, 2], [2.0, 4.0], [3, 5], vocab=256).axes
    assert [bar.get_height() for bar in axes.patches] == [3, 5, 2.0, 4.0] and labels(axes) == ["codes used", "perplexity"]
    assert list(axes.lines[0].get_ydata()) == [256, 256] and [text.get_text() for text in axes.texts] == ["all 256"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2"]
    (axes,) = plots.rate_quality({"ours": [(6.0, 3.0), (1.5, 2.0)], "opus": [(6.0, 2.5)]}, "t", "PESQ").axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[1.5, 6.0], [6.0]] and axes.get_xlim()[0] == 0
    assert list(axes.lines[0].get_ydata()) == [2.0, 3.0] and labels(axes) == ["ours", "opus"] and axes.get_ylabel() == "PESQ"


def test_pictures_of_the_tokens(figures):
    row = {"within": 7.0, "across": 9.0, "interval_within": [6.0, 8.0], "interval_across": [8.0, 10.0]}
    rows = [{"layer": None, "k": None, **row}, *({"layer": n, "k": None, **row} for n in (3, 1)), {"layer": 3, "k": 64, **row}]
    (axes,) = plots.layers(rows).axes
    assert sorted(labels(axes)) == sorted(f"{what}, {mode}" for mode in ("within", "across")
                                          for what in ("features", "centroids K = 64", "MFCC"))
    assert [list(c.lines[0].get_xdata()) for c in axes.containers] == [[1, 3], [1, 3]]
    (axes,) = plots.ranked({"held_out": np.array([0.1, 0.0, 0.9])}, "t").axes
    assert list(axes.lines[0].get_ydata()) == [0.9, 0.1] and axes.lines[1].get_ydata()[0] == pytest.approx(1 / 3)
    assert axes.get_yscale() == "log" and labels(axes) == ["held out"]
    (axes,) = plots.lengths({"a": np.array([0.7, 0.3]), "b": np.array([0.5, 0.5])}, "t", "frames").axes
    assert [bar.get_height() for bar in axes.patches] == [0.7, 0.3, 0.5, 0.5] and axes.get_xlabel() == "frames"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2+"]
    axes, colours = plots.shares(np.eye(2), ["a", "b"], "t", "token").axes
    assert (axes.images[0].get_clim(), colours.get_ylim()) == ((0, 1), (0, 1))
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "b"]


def test_attention_has_a_picture_for_each_layer_and_the_time_of_each_token(figures):
    share_LFS = np.random.default_rng(0).dirichlet(np.ones(3), (5, 50))
    figure = plots.attention(share_LFS, np.array([[0.0, 0.4], [0.4, 0.6], [0.6, 1.0]]), "t")
    assert [axes.get_title("left") for axes in figure.axes] == [f"layer {n}" for n in range(1, 6)]
    for axes, share_FS in zip(figure.axes, share_LFS, strict=True):
        assert list(axes.images[0].get_extent()) == [0, 1.0, 0, 3]
        np.testing.assert_allclose(axes.images[0].get_array().T, share_FS / share_FS.max(1, keepdims=True))
        assert list(axes.lines[0].get_xdata()) == [0.0, 0.4, 0.6, 1.0] and list(axes.lines[0].get_ydata()) == [0, 1, 2, 3]
