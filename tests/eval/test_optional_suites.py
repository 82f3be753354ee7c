"""DNSMOS, text and notes, which run where they are asked for: planted sounds and texts come out in order."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from audiolm.config.evaluation import TablesConfig
from audiolm.data.packaged import onnx
from audiolm.data.packaged.dnsmos import scorer
from audiolm.eval.generated import Sample, SampleSpec
from audiolm.eval.models import asr, text_model
from audiolm.eval.suites import dnsmos, notes, run, text
from tests.worlds.basics import ROOT

QUICKSTART = ROOT / "workflows" / "quickstart"
SR = 16_000


def sound(clip: str, mode: str, wav_T: np.ndarray, prompt: int = 0) -> Sample:
    return Sample(SampleSpec(clip, clip, None, mode, 0, prompt), wav_T.astype(np.float32))


def speech(n: int) -> list[np.ndarray]:
    import soundfile

    return [soundfile.read(p, dtype="float32")[0] for p in sorted(QUICKSTART.rglob("*.flac"))[:n]]


def without(monkeypatch, *packages: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in packages else find(name, *a))


def test_they_run_where_they_are_named():
    assert not {"dnsmos", "text", "notes"} & {*TablesConfig().suites, *run.DEFAULT}
    assert run.check_names(["dnsmos", "text", "notes"]) == ["dnsmos", "text", "notes"]





def test_dnsmos_hears_noise_after_the_prompt_alone():
    if why := onnx.missing_dependency("speechmos", ""):
        pytest.skip(why)
    (wav,) = speech(1)
    wav = wav[:3 * SR]
    noisy = dnsmos.in_noise(wav, 1, "a")
    made = [sound("a", "original", wav), sound("a", "continuation", np.concatenate([wav, noisy]), len(wav))]
    rows = {(r.item, r.metric): r for r in dnsmos.dnsmos_results(made)}
    for metric in dnsmos.METRICS:
        clean, continued, floor = (rows[item, metric] for item in ("original", "continuation", dnsmos.FLOOR))
        assert 5 > clean.value > 0.3 + continued.value and continued.value == pytest.approx(floor.value, abs=0.4)
        assert (clean.role, continued.role, floor.role) == ("ceiling", "ours", "floor") and clean.n == 1 and clean.seconds > 0
    assert len(rows) == 9  # of modes without sounds there is nothing to say


def test_dnsmos_gives_the_packages_marks(monkeypatch):
    if why := onnx.missing_dependency("speechmos", ""):
        pytest.skip(why)
    mel = SimpleNamespace(melspectrogram=lambda **_: np.ones((120, 900)))  # of another of its marks
    for name, parts in (("librosa", {"feature": mel, "power_to_db": lambda x, ref: x}), ("requests", {"session": None})):
        module = ModuleType(name)
        module.__dict__.update(parts)
        monkeypatch.setitem(sys.modules, name, module)
    from speechmos import dnsmos as theirs

    wav = np.resize(np.concatenate(speech(2)), round(9.5 * SR))
    found = theirs.run(wav, sr=SR)
    assert scorer()(wav) == pytest.approx([found[k] for k in ("ovrl_mos", "sig_mos", "bak_mos")], abs=1e-4)




LINES = ["the cat sat on the mat", "the dog sat on the rug", "a cat saw a dog", "the dog saw the cat on the mat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A causal model that has learned LINES, as transformers saves one."""
    transformers = pytest.importorskip("transformers")
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<s>", "<unk>", *sorted({w for line in LINES for w in line.split()})]
    words_of = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    words_of.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words_of, bos_token="<s>", unk_token="<unk>")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(words), n_positions=32, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        for line in LINES:
            ids = torch.tensor([[0, *tokenizer(line).input_ids]])
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    path = tmp_path_factory.mktemp("text") / "model"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_likely_text_wins_and_a_repeated_phrase_is_found_out(folder):
    own = [(f"c{i}", line) for i, line in enumerate(LINES)]
    texts = {"original": own, "continuation": [(clip, text.mix(line, 1, clip)) for clip, line in own]}
    rows = {r.item: r for r in text.perplexities(texts, str(folder))}
    assert 1 < rows["original"].value < 3 < rows["continuation"].value and rows[text.SHUFFLED].value > 3
    assert all(r.low <= r.value <= r.high and r.n == 4 for r in rows.values())
    assert [rows[i].role for i in ("original", "continuation", text.SHUFFLED)] == ["ceiling", "ours", "floor"]
    again = {r.item: r for r in text.repetition({"original": own, "continuation": [("c", "mat mat mat mat")]})}
    assert again["original"].value < 50 < again["continuation"].value == again[text.AGAIN].value == 100


def test_every_token_counts(folder, tmp_path):
    import torch
    import transformers

    nats, tokens = text_model.scorer(str(folder))("the cat sat")
    assert tokens == 3 and 0 < nats < 10
    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    with torch.no_grad():
        model.transformer.wte.weight.zero_()  # tied: all words alike
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    (row, *_) = text.perplexities({"original": [("c", LINES[0])]}, str(tmp_path))
    assert row.value == pytest.approx(model.config.vocab_size)
    with pytest.raises(ValueError, match="tables.text_model: .* holds no causal text model"):
        text_model.scorer(str(tmp_path / "none"))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="tables.text_model: .* holds no causal .*model.safetensors"):  # no pickle is read
        text_model.scorer(str(tmp_path))


def test_auto_bleu():
    assert text.auto_bleu("a b c d") == 0 and text.auto_bleu("a a a") == 1
    assert text.auto_bleu("a b c a b") == pytest.approx((4 / 5 * 2 / 4) ** 0.5)
    assert text.auto_bleu("a b a") == 0  # no pair comes again


def test_speech_is_transcribed_and_silence_is_counted(folder):
    if why := asr.missing_dependency():
        pytest.skip(why)
    (wav,) = speech(1)
    made = [sound("a", "original", wav), sound("a", "continuation", wav, SR // 25), sound("b", "continuation", np.zeros(SR))]
    rows = {(r.item, r.metric): r for r in text.text_results(made)}
    original, continued = (rows[mode, text.BLEU] for mode in ("original", "continuation"))
    assert 0 <= original.value < 60 and (original.n, continued.n) == (1, 1) and original.note == ""
    assert continued.note == "1 of 2 said fewer than two words"
    assert rows["original", text.RATE].value > 1.5 * rows["continuation", text.RATE].value > 0
    assert "tables.text_model=" in rows["continuation", text.PERPLEXITY].note
    measured = text.text_results(made[:1], str(folder))
    assert len(measured) == 5 and all(r.value is not None for r in measured)


def test_missing_packages_are_seen(monkeypatch):
    without(monkeypatch, "speechmos", "basic_pitch", "jiwer")
    made = [sound("a", mode, np.zeros(SR)) for mode in ("original", "continuation")]
    for rows, fix in ((dnsmos.dnsmos_results(made), 'pip install "audiolm[eval]"'), (text.text_results(made), "audiolm[eval]"),
                      (notes.note_results(made), "pip install --no-deps basic-pitch")):
        assert rows and all(r.value is None and fix in r.note for r in rows)
