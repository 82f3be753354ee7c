"""Table II: the normaliser, error rates, the packaged recogniser, and models by path."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

from audiolm.eval.generated import LABELS, Sample, SampleSpec
from audiolm.eval.models import asr
from audiolm.eval.suites import wer
from audiolm.eval.suites.wer import Said, rows, table2
from tests.worlds.basics import ROOT

QUICKSTART = ROOT / "workflows" / "quickstart"


def wanted(i: int, mode: str, text: str = "the cat sat on the mat") -> SampleSpec:
    return SampleSpec(f"c{i}", f"s{i % 3}", text, mode, 0, 0)


@pytest.mark.parametrize(("text", "normal"), [
    ("MISTER SMITH'S WELL-KNOWN CAFÉ", "mister smith is well known cafe"),
    ("Mr. Smith’s well known cafe,", "mister smith is well known cafe"),
    ("In eighteen forty five he paid $1,200 for the 3rd; 20% of 2.5!", "in 1845 he paid $1200 for the 3rd 20% of 2.5"),
    ("in 1845 he paid one thousand two hundred dollars for the third: twenty percent of two point five",
     "in 1845 he paid $1200 for the 3rd 20% of 2.5"),
    ("'Quoted' [music] (coughs) the U.S. & you", "quoted the u s you"), ("It wasn't there.", "it was not there"), ("...", "")])
def test_one_normaliser(text, normal):
    pytest.importorskip("transformers")
    assert asr.normalise(text) == normal == asr.normalise(normal)


def test_rates_are_summed_and_a_shuffled_text_is_mostly_wrong():
    pytest.importorskip("jiwer")
    text = "the quick brown fox jumps over one lazy dog that never stops dreaming about old bones"
    mixed = " ".join(text.split()[i] for i in np.random.default_rng(0).permutation(len(text.split())))
    transcripts = [Said(wanted(i, "original", text), text, text, 0.0) for i in range(6)]
    transcripts += [Said(wanted(i, "acoustic", text), text, text.replace("fox", "box") if i else text, 0.0) for i in range(6)]
    transcripts += [Said(wanted(i, "shuffled", text), text, mixed, 0.0) for i in range(6)]
    table = {(r.item, r.metric): r for r in rows(transcripts)}
    clean, near, floor = (table[LABELS[m], "WER %"] for m in ("original", "acoustic", "shuffled"))
    assert clean.value == clean.high == 0 and (clean.role, clean.paper, clean.n) == ("ceiling", 2.5, 6)
    assert near.value == pytest.approx(100 * 5 / (6 * 16)) and near.low <= near.value <= near.high
    assert floor.value > 80 and floor.role == "floor" and table[LABELS["shuffled"], "CER %"].value > 50
    assert 0 < table[LABELS["acoustic"], "CER %"].value < near.value
    assert asr.errors("a b c d", "") == (4, 4, 7, 7)


def test_whisper_hears_speech_and_not_noise():
    """The embedded corpus through the packaged model: most words are recognised, in noise none."""
    if why := asr.missing_dependency():
        pytest.skip(why)
    import soundfile

    lines = (line for path in sorted(QUICKSTART.rglob("*.trans.txt")) for line in path.read_text().splitlines())
    texts = dict(line.split(" ", 1) for line in lines)
    made = []
    for i, (name, text) in enumerate(list(texts.items())[:3]):
        wav, rate = soundfile.read(next(QUICKSTART.rglob(f"{name}.*")), dtype="float32")
        assert rate == 16_000
        noise = 0.1 * np.random.default_rng(i).standard_normal(len(wav)).astype(np.float32)
        made += [Sample(wanted(i, "original", text), wav), Sample(wanted(i, "shuffled", text), noise)]
    seen = []
    table = {r.item: r.value for r in table2(made, progress=lambda *a: seen.append(a)) if r.metric == "WER %"}
    assert table["original"] < 50 < table[LABELS["shuffled"]] and seen[-1] == (6, 6, "transcripts")


def test_transformers_models_by_path(tmp_path):
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGH"]
    (tmp_path / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(letters)}))
    config = transformers.Wav2Vec2Config(vocab_size=len(letters), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                         intermediate_size=16, conv_dim=(8,) * 7, num_conv_pos_embeddings=8,
                                         num_conv_pos_embedding_groups=2)
    model = transformers.Wav2Vec2ForCTC(config).eval()
    with torch.no_grad():
        model.lm_head.bias[5] = 50.0  # recognises A in any sound
    model.save_pretrained(tmp_path)
    transformers.Wav2Vec2Processor(transformers.Wav2Vec2FeatureExtractor(),
                                   transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))).save_pretrained(tmp_path)
    recognise = asr.recogniser(str(tmp_path))
    assert asr.normalise(recognise(np.random.default_rng(0).standard_normal(16_000).astype(np.float32))) == "a"
    with pytest.raises(ValueError, match="holds no speech recogniser of transformers"):
        asr.recogniser(str(tmp_path / "none"))


def test_a_sequence_to_sequence_model_by_path(tmp_path):
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    words = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>", "a", "b"]
    (tmp_path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(
        vocab_size=16, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, decoder_start_token_id=1, eos_token_id=0, pad_token_id=0, bos_token_id=0,
        suppress_tokens=None, begin_suppress_tokens=None))
    with torch.no_grad():  # says a, without an end
        model.proj_out.weight.zero_()[5] = 1.0
        model.model.decoder.layer_norm.bias.fill_(1.0)
    model.save_pretrained(tmp_path)
    tokenizer = transformers.WhisperTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    transformers.WhisperProcessor(transformers.WhisperFeatureExtractor(), tokenizer).save_pretrained(tmp_path)
    assert set(asr.recogniser(str(tmp_path))(np.zeros(16_000, np.float32))) == {"a"}
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="asr: .* holds no speech recogniser .*model.safetensors"):  # no pickle is read
        asr.recogniser(str(tmp_path))


def test_what_cannot_be_measured_is_seen(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jiwer" else find(name))
    table = table2([Sample(wanted(0, "original"), np.zeros(16_000, np.float32))])
    assert len(table) == 12 and all(r.value is None and "jiwer" in r.note and "audiolm[eval]" in r.note for r in table)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    if find("jiwer"):
        assert asr.missing_dependency("/models/x") == 'transformers not installed: pip install "audiolm[pretrained]"'
    assert {r.paper for r in table} == {0.8, 2.5, 0.9, 2.6, 3.4, 6.0, None}
    monkeypatch.undo()
    if asr.missing_dependency() is None:
        with pytest.raises(ValueError, match="none of the clips has a text"):
            wer.transcribed([Sample(wanted(0, "original", ""), np.zeros(16_000, np.float32))])
