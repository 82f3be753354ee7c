"""The paper's Table I by its command, on a tiny item file with a tiny codec, tokenizer, residual levels and vocoder."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from audiolm import store
from audiolm.data.audio import wav_bytes
from audiolm.eval.metrics import abx
from audiolm.eval.metrics.audio_quality import Scorers, mel_distance
from audiolm.eval.suites import tokens
from audiolm.models.vocoder import SemanticVocoder
from audiolm.tokenizers.residual import load_residual
from audiolm.tokenizers.vocoder import KIND
from tests.worlds import tiny_vocoder as tiny
from tests.worlds.basics import HEADER, RecordingOut
from workflows import evaluate as command


@pytest.fixture(scope="module")
def made(tmp_path_factory, built):
    """Builds by option, an item file of two speakers, and the folder with their sound."""
    folder = tmp_path_factory.mktemp("table1")
    corpus = tiny.corpus(folder)
    paths = {"codec": built, "tokenizer": tiny.built_tokenizer(f"{folder}/kmeans", corpus.wavs[:6])}
    out = RecordingOut(folder / "residual")
    tiny.run_residual(corpus, paths["tokenizer"], out, levels=3)
    paths |= {"residual": out.path, "vocoder": vocoder(f"{folder}/vocoder", paths["tokenizer"], out.path, 3)}
    rows, g = [], np.random.default_rng(0)
    (folder / "sound").mkdir()
    for s in range(2):
        wav = []
        for n, phone in enumerate("aabbab"):
            tone = np.sin(2 * np.pi * {"a": 300, "b": 2500}[phone] * (1 + 0.03 * s) * np.arange(4800) / 16_000)
            wav.append(0.3 * tone + 0.01 * g.standard_normal(4800))
            rows.append(f"f{s} {n * 0.3:.2f} {n * 0.3 + 0.28:.2f} {phone} x y s{s}\n")
        (folder / "sound" / f"f{s}.wav").write_bytes(wav_bytes(np.concatenate(wav)))
    (folder / "a.item").write_text(HEADER + "".join(rows))
    return paths, str(folder / "a.item"), str(folder / "sound")


def vocoder(folder: str, kmeans: str, residual: str | None, levels: int) -> str:
    torch.manual_seed(0)
    net = SemanticVocoder(levels, tiny.K, 8, 1, 2, norm=False)
    store.put(f"{folder}/export/model.safetensors", tiny.save(net.state_dict()))
    store.put_json(f"{folder}/export/config.json", {
        "kind": KIND, "levels": levels, "vocab": tiny.K, "dim": 8, "layers": 1, "channels": 2,
        "tokens": load_residual(kmeans, residual).hash_of(levels)})
    return folder


def lines_of(made, *options: str) -> list[str]:
    return ["tokens", "--items", made[1], "--audio", made[2], "--device", "cpu", "--seconds", "1.2", *options]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The mel distance alone: the other metrics are slow, and tests/eval/test_codec_quality.py is theirs."""
    have = Scorers({"mel": mel_distance}, {"visqol": "visqol-python is not installed"}, None)
    monkeypatch.setattr("audiolm.eval.metrics.audio_quality.scorers", lambda: have)


def test_one_command_prints_both_kinds_at_all_their_rates(made, tmp_path, capsys):
    paths, *_ = made
    options = [text for name, path in paths.items() for text in (f"--{name}", path)]
    assert command.main(lines_of(made, *options, "--json", f"{tmp_path}/table.json")) == 0
    text, told = capsys.readouterr()
    head, *rows = text.split("\n\n")[0].splitlines()
    assert head.split()[0] == "tokens" and len({len(line) for line in (head, *rows)}) == 1
    cells = [row.split() for row in rows]
    assert [c[:3] for c in cells] == [["acoustic", "3", "600"], ["semantic", "1", "90"], ["semantic", "3", "269"]]
    assert "No ViSQOL: visqol-python is not installed." in text and "12 triphones" in text and "clips: 2, 2.4 s" in text
    assert "semantic: tokens of file 1 of 2" in told and "ABX" in told
    found = json.loads((tmp_path / "table.json").read_text())
    assert found["builds"] == paths and all(r["mel"] > 0 and r["visqol"] is None and r["scored"] == {"mel": 2}
                                            for r in found["rows"])
    for row in found["rows"]:
        lo, hi = row["interval_across"]
        assert 0 <= lo <= row["across"] <= hi <= 100 and set(row["by_speaker_within"]) == {"s0", "s1"}
    assert found["rows"][1]["mel"] != found["rows"][2]["mel"]


def test_every_row_of_the_suite_has_the_papers_figures_beside_it(made):
    paths, items, sound = made
    config = SimpleNamespace(semantic=SimpleNamespace(abx=SimpleNamespace(items=items, audio=[sound], speakers=None)),
                             tables=SimpleNamespace(sounds=1), evaluate=SimpleNamespace(clip_s=1.2),
                             run=SimpleNamespace(seed=0))
    steps = {step: paths[option] for option, step in tokens.BUILDS.items()}
    rows = tokens.tokens_suite(SimpleNamespace(config=config, steps=steps, device="cpu"))
    found = {(row.item.split(" b/s")[0], row.metric.split()[1]): (row.paper, row.note) for row in rows}
    assert found == {
        ("semantic, 1 levels, 90", "within"): (6.7, "the paper's tokens have 250 b/s"),
        ("semantic, 1 levels, 90", "across"): (7.6, "the paper's tokens have 250 b/s"),
        ("semantic, 3 levels, 269", "within"): (5.6, "the paper's tokens have 6000 b/s"),
        ("semantic, 3 levels, 269", "across"): (6.2, "the paper's tokens have 6000 b/s"),
        ("acoustic, 3 levels, 600", "within"): (22.4, "the paper's tokens have 2000 b/s"),
        ("acoustic, 3 levels, 600", "across"): (28.7, "the paper's tokens have 2000 b/s")}


def test_the_features_are_the_sums_of_the_vectors_of_the_levels(made, codec):
    paths, items, sound = made
    items, tokenizer = abx.read_items(items), load_residual(made[0]["tokenizer"], made[0]["residual"])
    wavs = {f"f{s}": command_read(f"{sound}/f{s}.wav") for s in range(2)}
    sides = [tokens.acoustic_side(codec), tokens.semantic_side(tokenizer, None)]
    rows = tokens.table1(sides, items, wavs.get, list(wavs.values()), Scorers({}, {}, None))["rows"]
    books_LKD, book_QND = tokenizer.books_LKD, codec.model.quantizer.codebook_QND

    def sums(tokenizer, books, levels):
        def features(name):
            wav = torch.from_numpy(wavs[name])[None]
            codes_TQ, = tokenizer.encode(wav, torch.tensor([wav.shape[1]]))
            return sum(books[q][codes_TQ[:, q]] for q in range(levels)).numpy()
        return features

    for row, (tok, books, rate) in zip(rows, [(codec, book_QND, 50.0)] + 2 * [(tokenizer, books_LKD, 25.0)], strict=True):
        expected = abx.abx(sums(tok, books, row["levels"]), items, rate)
        assert (row["within"], row["across"]) == pytest.approx((expected["within"], expected["across"]))
    assert rows[1]["mel"] is None and rows[0]["scored"] == {}


def command_read(path: str) -> np.ndarray:
    from audiolm.data.audio import decode

    return decode(path)[0]


def test_a_run_names_its_builds_and_what_is_missing_is_a_dash(made, tmp_path, capsys):
    paths, *_ = made
    index = f"{tmp_path}/runs/r.json"
    steps = {step: {"path": paths[option]} for option, step in tokens.BUILDS.items()}
    store.put_json(index, {"run": "r", "steps": {k: v for k, v in steps.items() if k in ("kmeans",)}})
    assert command.main(lines_of(made, "--run", index)) == 0
    text = capsys.readouterr().out
    row, = (line for line in text.splitlines() if line.startswith("semantic"))
    assert row.split()[1:3] == ["1", "90"] and row.split()[-4:] == ["-"] * 4 and "no decoder was given" in text
    one = vocoder(f"{tmp_path}/one", paths["tokenizer"], None, 1)
    store.put_json(index, {"run": "r", "steps": steps})
    assert command.main(lines_of(made, "--run", index, "--vocoder", one)) == 0  # an option goes before the run
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines()[1:4]] == ["acoustic", "semantic", "semantic"]
    assert "No sound of 3 levels of semantic tokens: the decoder has 1." in text
    assert command.main(lines_of(made, "--codec", paths["codec"], "--clips", f"{made[2]}/f0.wav")) == 0
    text = capsys.readouterr().out
    assert "clips: 1, 1.2 s" in text and "\nsemantic" not in text


def test_wrong_usage_is_one_line_with_the_fix(made, tmp_path, capsys):
    paths, items, _ = made
    other = vocoder(f"{tmp_path}/other", paths["tokenizer"], paths["residual"], 3)
    store.put_json(f"{tmp_path}/empty.json", {"steps": {}})
    cases = (((), "nothing to measure"), (("--run", f"{tmp_path}/no.json"), "no run index"),
             (("--run", f"{tmp_path}/empty.json"), "names no finished step"), (("--codec", f"{tmp_path}/x"), "holds no codec"),
             (("--codec", paths["codec"], "--vocoder", other), "give --tokenizer"),
             (("--tokenizer", paths["tokenizer"], "--vocoder", other), "give the residual build too"),
             (("--tokenizer", paths["codec"]), "format is None"), (("--codec", paths["codec"], "--speakers", "s9"), "s9"),
             (("--codec", paths["codec"], "--number", "0"), "above 0"))
    for options, text in cases:
        assert command.main(lines_of(made, *options)) == 2, options
        err = capsys.readouterr().err
        assert err.startswith("error: ") and text in err and err.count("\n") == 1
    bare = ["tokens", "--items", items, "--audio", f"{tmp_path}/none", "--codec", paths["codec"]]
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "z.wav").write_bytes(wav_bytes(np.zeros(1600, np.float32)))
    assert command.main(bare) == 2 and "--audio" in capsys.readouterr().err
