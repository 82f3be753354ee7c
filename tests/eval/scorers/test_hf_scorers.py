"""Scorers in transformers' format: planted heads give known marks and cosines, and what cannot be used is one row."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from audiolm.config.base import identity
from audiolm.config.evaluation import TablesConfig
from audiolm.eval.generated import LABELS, Sample, SampleSpec
from audiolm.eval.models import hf_scorers
from audiolm.eval.models.hf_scorers import mos_predictor, voice_embedder
from audiolm.eval.suites import mos
from audiolm.eval.suites.speakers import COSINE, similarity
from tests.worlds.sounds import PROMPT, SR, talk

transformers = pytest.importorskip("transformers")
ENCODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
           "conv_dim": (16,) * 3, "conv_kernel": (10, 8, 4), "conv_stride": (5, 8, 8), "num_conv_pos_embeddings": 8,
           "num_conv_pos_embedding_groups": 2}
# One frame each 20 ms, of two numbers that layer normalisation makes 1 and -1, or -1 and 1.
XVECTOR = {**ENCODER, "conv_dim": (2,), "conv_kernel": (400,), "conv_stride": (320,), "feat_extract_norm": "layer",
           "tdnn_dim": (16, 16, 16, 16, 32), "xvector_output_dim": 8, "num_labels": 2}
OFFSETS = {"low": -0.2, "high": 0.2}


def said(voice: str, seconds: float, index: int) -> np.ndarray:
    return talk(150, seconds, index) + np.float32(OFFSETS[voice])


def saved(model, folder, sampling_rate: int = SR, do_normalize: bool = True) -> str:
    model.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=sampling_rate, do_normalize=do_normalize).save_pretrained(folder)
    return str(folder)


def marker(kind: str, mark: float | None, labels: int = 1):
    """A model whose head says `mark` of every sound; None leaves it random."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**ENCODER, classifier_proj_size=8, num_labels=labels)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    if mark is not None:
        torch.nn.init.zeros_(model.classifier.weight)
        torch.nn.init.constant_(model.classifier.bias, mark)
    return model


def samples(own: bool) -> list[Sample]:
    """Originals and continuations of two voices, the continuations in the voice of their prompt or in the other one."""
    made = []
    for s, (name, other) in enumerate((("low", "high"), ("high", "low"))):
        for i in range(2):
            for mode, voice in (("original", name), ("continuation", name if own else other)):
                index = 100 * s + 10 * i + (mode == "continuation")
                wav_T = np.concatenate([said(name, PROMPT / SR, index), said(voice, 1.0, 1000 + index)])
                made.append(Sample(SampleSpec(f"{name}{i}", name, None, mode, 0, PROMPT), wav_T))
    return made


@pytest.fixture(scope="module")
def voices(tmp_path_factory) -> str:
    """A WavLM x-vector model that knows a voice by the sign of its offset: both voices' vectors point away from each other."""
    torch.manual_seed(0)
    model = transformers.WavLMForXVector(transformers.WavLMConfig(**XVECTOR)).eval()
    with torch.no_grad():
        conv = model.wavlm.feature_extractor.conv_layers[0].conv
        conv.weight[0], conv.weight[1] = 1 / 400, -1 / 400  # means of frames
        low_D, high_D = (model(torch.from_numpy(said(voice, 1.0, 0))[None]).embeddings[0] for voice in OFFSETS)
        model.feature_extractor.bias -= (low_D + high_D) / 2
    return saved(model, tmp_path_factory.mktemp("voices"), do_normalize=False)


@pytest.mark.parametrize("kind", ["Wav2Vec2", "WavLM", "Hubert"])
def test_a_mark_is_the_models_own_output(tmp_path, kind):
    predict = mos_predictor(saved(marker(kind, 3.25), tmp_path / "flat"))
    assert predict(talk(110, 1.0, 0)) == predict(np.zeros(40, np.float32)) == 3.25
    model, wav_T = marker(kind, None), talk(110, 1.5, 1)
    inputs = torch.from_numpy((wav_T - wav_T.mean()) / np.sqrt(wav_T.var() + 1e-7))[None]
    with torch.inference_mode():
        oracle = float(model.eval()(inputs).logits)
    predict = mos_predictor(saved(model, tmp_path / "random"))
    assert predict(wav_T) == pytest.approx(oracle, abs=1e-5) and predict(talk(220, 1.5, 2)) != predict(wav_T)


def test_marks_of_all_modes_have_a_floor(tmp_path):
    made = samples(own=True)
    rows = {r.item: r for r in mos.mos_results(made, mos_predictor(saved(marker("WavLM", 3.25), tmp_path)), "by F")}
    assert {r.item: (r.value, r.role) for r in rows.values()} == {
        "original": (3.25, "ceiling"), "continuation": (3.25, "ours"), "original in white noise, 0 dB": (3.25, "floor")}
    assert all((r.table, r.metric, r.n, r.note) == ("MOS", "predicted mark", 4, "by F") for r in rows.values())
    lengths = {r.item: r.value for r in mos.mos_results(made, lambda wav_T: len(wav_T) / SR)}
    assert lengths == dict.fromkeys(lengths, 1.0)  # after the prompt alone


def test_a_voice_is_known_again(voices):
    kept, lost = ({r.item: r.value for r in similarity(samples(own), voices)} for own in (True, False))
    assert kept["original"] > 0.8 and kept["continuation"] > 0.8 and kept["another speaker"] < -0.8
    assert lost["continuation"] < -0.8
    assert {r.note for r in similarity(samples(True), voices)} == {f"by {voices}"}


def test_equal_embeddings_are_at_chance(tmp_path):
    torch.manual_seed(0)
    model = transformers.Wav2Vec2ForXVector(transformers.Wav2Vec2Config(**XVECTOR))
    torch.nn.init.zeros_(model.feature_extractor.weight)
    torch.nn.init.ones_(model.feature_extractor.bias)
    values = {r.item: r.value for r in similarity(samples(False), saved(model, tmp_path))}
    assert len(values) == 3 and list(values.values()) == pytest.approx([1.0] * 3)  # no voice differs from another


def test_what_is_no_such_model_is_refused_with_the_fix(tmp_path, voices):
    mark = saved(marker("WavLM", 1.0), tmp_path / "mark")
    for use, uri, said in ((mos_predictor, str(tmp_path / "none"), "tables.mos_model: .*none holds no ...ForSeq.*config.json"),
                           (mos_predictor, saved(marker("WavLM", None, 3), tmp_path / "three"), "has 3 labels.*num_labels=1"),
                           (mos_predictor, voices, "no WavLMForSequenceClassification; tensors .*unexpected"),
                           (mos_predictor, saved(marker("WavLM", 1.0), tmp_path / "slow", 8000), "at 8000 Hz.*for 16000 Hz"),
                           (voice_embedder, mark, "tables.speaker_model: .* is no WavLMForXVector; tensors .* missing"),
                           (voice_embedder, saved(marker("Hubert", 1.0), tmp_path / "hubert"), "no ...ForXVector model.*")):
        with pytest.raises(ValueError, match=said):
            use(uri)
    with pytest.raises(ValueError, match="tables.mos_model: a sound without samples.*longer than their prompt"):
        mos_predictor(mark)(np.zeros(0, np.float32))
    torch.save({}, tmp_path / "mark" / "pytorch_model.bin")
    (tmp_path / "mark" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors"):  # no pickle is read
        mos_predictor(mark)


def test_one_row_names_the_fix(monkeypatch):
    def row(tables: TablesConfig):
        (row,) = mos.mos_suite(SimpleNamespace(config=SimpleNamespace(tables=tables), device="cpu"))
        assert (row.table, row.item, row.value) == ("MOS", LABELS["continuation"], None)
        return row.note

    assert "tables.mos_model=FOLDER" in row(TablesConfig())
    assert "/none holds no ...ForSequenceClassification" in row(TablesConfig(mos_model="/none"))
    (voice,) = similarity(samples(True), "/none")
    assert (voice.metric, voice.value) == (COSINE, None) and "/none holds no ...ForXVector" in voice.note
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "transformers" else find(name, *a))
    assert hf_scorers.PRETRAINED in row(TablesConfig(mos_model="/none"))
    assert hf_scorers.PRETRAINED in similarity(samples(True), "/none")[0].note


def test_the_models_are_part_of_what_is_measured():
    plain = identity(TablesConfig())
    assert not {"mos_model", "speaker_model"} & plain.keys()
    for field in ("mos_model", "speaker_model"):
        assert identity(TablesConfig(**{field: "/a"})) == plain | {field: "/a"}
