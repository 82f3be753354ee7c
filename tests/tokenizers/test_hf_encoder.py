"""Masked models of transformers behind the Extractor protocol: the library's own features, framing, layers, import, errors."""

from __future__ import annotations

import functools
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch

from audiolm import rng, store
from audiolm.tokenizers.artifact import ArtifactError
from audiolm.tokenizers.base import padded_samples
from audiolm.tokenizers.extractor import Window, windowed
from audiolm.tokenizers.hf import imported_encoder
from audiolm.tokenizers.hf_encoder import CONVENTION, from_export, import_encoder, load_pretrained_encoder
from audiolm.tokenizers.semantic import load_extractor, load_semantic, save_semantic

transformers = pytest.importorskip("transformers")
LAYERS, DIM = 3, 16
SIZES = {"hidden_size": DIM, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 24,
         "initializer_range": 0.3, "layerdrop": 0.5, "mask_time_prob": 0.5}
WAVES = {**SIZES, "conv_dim": (8,) * 7, "num_conv_pos_embeddings": 9, "num_conv_pos_embedding_groups": 2}
STABLE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
KINDS = {
    "hubert": ("HubertModel", WAVES), "hubert-large": ("HubertModel", {**WAVES, **STABLE}),
    "hubert-batchnorm": ("HubertModel", {**WAVES, "conv_pos_batch_norm": True}),
    "wavlm": ("WavLMModel", WAVES), "wavlm-large": ("WavLMModel", {**WAVES, **STABLE}),
    "wav2vec2": ("Wav2Vec2Model", WAVES), "wav2vec2-large": ("Wav2Vec2Model", {**WAVES, **STABLE, "add_adapter": True}),
    "w2vbert": ("Wav2Vec2BertModel", {**SIZES, "conv_depthwise_kernel_size": 5}),
    "w2vbert-relative": ("Wav2Vec2BertModel", {**SIZES, "conv_depthwise_kernel_size": 5,
                                               "position_embeddings_type": "relative"}),
    "w2vbert-rotary": ("Wav2Vec2BertModel", {**SIZES, "conv_depthwise_kernel_size": 5, "position_embeddings_type": "rotary"}),
}
MEL_KINDS = [kind for kind in KINDS if kind.startswith("w2vbert")]
FAMILIES = ("hubert", "wavlm", "wav2vec2", "w2vbert")
PLAIN = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 16_000, "do_normalize": False}


def noise(rows: int, samples: int, index: int = 0) -> torch.Tensor:
    """wav_BT whose loudness and colour change every 50 ms, beside a constant."""
    g = rng.generator(0, "test-encoder", index)
    pieces = -(-samples // 800)
    tones = np.sin(np.cumsum(np.repeat(g.uniform(0.02, 2, (rows, pieces)), 800, axis=1)[:, :samples], axis=1))
    gains = np.repeat(g.uniform(0, 1, (rows, pieces)) ** 3, 800, axis=1)[:, :samples]
    return torch.from_numpy((gains * (tones + g.standard_normal((rows, samples)) / 4) / 2 + 0.05).astype(np.float32))


@torch.no_grad()
def small(kind: str, head: str = "Model") -> torch.nn.Module:
    name, sizes = KINDS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, name.replace("Model", head))(getattr(transformers, name.replace("Model", "Config"))(**sizes))
    for n, p in model.named_parameters():  # norms and biases start as ones and zeros, which would hide one that is left out
        if "norm" in n or n.endswith("bias"):
            p.add_(torch.randn_like(p) * 0.3)
    for n, b in model.named_buffers():
        if "running" in n:
            b.add_(torch.rand_like(b))
    return model.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict:
    """kind -> (folder in transformers' format, transformers' model, the extractor); audio goes in as it is."""
    made = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        model = small(kind)
        model.save_pretrained(folder)
        if kind.startswith("w2vbert"):
            transformers.SeamlessM4TFeatureExtractor().save_pretrained(folder)
        else:
            transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)
        made[kind] = (str(folder), model, load_pretrained_encoder(str(folder)))
    return made


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@torch.no_grad()
def own(model, wav_T: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """hidden_states (T, D) and the encoder's own end by transformers' forward, of one clip padded as the contract says."""
    wav_T = torch.cat([wav_T, torch.zeros(padded_samples(len(wav_T)) - len(wav_T))])
    if isinstance(model, transformers.Wav2Vec2BertModel):
        edge = torch.zeros(120)
        inputs = transformers.SeamlessM4TFeatureExtractor()(torch.cat([edge, wav_T, edge]).numpy(), sampling_rate=16_000,
                                                            return_tensors="pt")
    else:
        inputs = {"input_values": torch.cat([torch.zeros(40), wav_T, torch.zeros(40)])[None]}
    ends = []
    hook = model.encoder.register_forward_hook(lambda module, args, output: ends.append(output.last_hidden_state[0]))
    hidden = model(**inputs, output_hidden_states=True).hidden_states
    hook.remove()
    return [x[0] for x in hidden], ends[0]


def test_features_are_those_of_transformers_at_every_layer(models, kind):
    _, model, extractor = models[kind]
    assert (extractor.family, extractor.layers, extractor.dim) == (model.config.model_type, LAYERS, DIM)
    wav_BT, layers = noise(1, 9000), [2, 1, 3]
    found, frames_B = extractor.raw(wav_BT, torch.tensor([9000]), layers)
    hidden, last_TD = own(model, wav_BT[0])
    assert frames_B.tolist() == [padded_samples(9000) // 320]
    stable = getattr(model.config, "do_stable_layer_norm", False)
    for n, x_BTD in zip(layers, found, strict=True):
        if n < LAYERS or not stable:
            same = torch.equal if kind not in MEL_KINDS else functools.partial(torch.allclose, atol=1e-4)  # mels are our own
            assert same(x_BTD[0], hidden[n])
        else:  # versions of transformers differ in whether the last of these is before the closing norm; ours is, always
            assert not torch.allclose(x_BTD[0], last_TD, atol=0.1)
            assert torch.allclose(model.encoder.layer_norm(x_BTD[0]), last_TD, atol=1e-6)
    assert (found[0] - found[1]).abs().mean() > 0.1 and found[2].std(1).mean() > 0.05, "layers that agree test nothing"
    (mean_BTD,), frames_B = extractor.features(wav_BT, torch.tensor([9000]), [2])
    assert frames_B.tolist() == [padded_samples(9000) // 640]
    assert torch.allclose(mean_BTD[0], (hidden[2][0::2] + hidden[2][1::2]) / 2, atol=1e-4 if kind in MEL_KINDS else 1e-6)


def passes(extractor, wav_BT, lengths: list[int], layers: list[int]) -> tuple[list, torch.Tensor, list[int]]:
    """The features of `raw`, and the rows of each forward pass."""
    rows = []
    hook = extractor.model.encoder.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    found, frames_B = extractor.raw(wav_BT, torch.tensor(lengths), layers)
    hook.remove()
    return found, frames_B, rows


@pytest.mark.parametrize("normalize", [False, True])
def test_rows_do_not_hear_one_another_nor_what_lies_past_their_end(models, kind, normalize):
    folder, _, extractor = models[kind]
    if normalize and kind not in MEL_KINDS:
        settings = {**extractor.to_json(), "preprocessor": {"sampling_rate": 16_000, "do_normalize": True}}
        extractor = from_export(json.loads(json.dumps(settings)), extractor.state())
    lengths = [9000, 1, 5000, 8961, 641, 0, 26_000]  # two end in one frame; WavLM's positions are exact below 25 600
    wav_BT = noise(len(lengths), 27_000, index=1)
    found, frames_B, rows = passes(extractor, wav_BT, lengths, [1, 2, 3])
    assert frames_B.tolist() == [padded_samples(n) // 320 for n in lengths]
    assert sorted(rows) == ([1, 1, 1, 2, 2] if kind == "hubert-batchnorm" else [7])
    for row, n in enumerate(lengths):
        alone, frames, _ = passes(extractor, wav_BT[row:row + 1, :n], [n], [1, 2, 3])
        for x_BTD, y_BTD in zip(found, alone, strict=True):
            assert torch.allclose(x_BTD[row, :int(frames)], y_BTD[0], atol=1e-4, rtol=0)
            assert y_BTD.isfinite().all() and not x_BTD[row, int(frames):].any()


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_length_gives_whole_semantic_frames(models, kind):
    extractor = models[kind][2]
    lengths = list(range(1, 2001))
    (x_BTD,), frames_B = extractor.features(noise(2000, 2000), torch.tensor(lengths), [1])
    assert x_BTD.shape == (2000, 4, DIM) and x_BTD.isfinite().all()
    assert frames_B.tolist() == [padded_samples(n) // 640 for n in lengths] == (x_BTD != 0).any(2).sum(1).tolist()


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_click_lands_in_its_frame(models, kind):
    quiet_BT = noise(1, 64_000, index=2) / 1000
    for at in (20_000, 40_300):
        click_BT = quiet_BT.clone()
        click_BT[0, at:at + 20] += 1.0
        (x_BTD,), _ = models[kind][2].features(torch.cat([quiet_BT, click_BT]), torch.tensor([64_000] * 2), [1])
        assert abs(int((x_BTD[0] - x_BTD[1]).norm(dim=1).argmax()) - at // 640) <= 1


def test_a_model_cut_at_a_layer_gives_the_same_features_there(models, kind):
    extractor = models[kind][2]
    wav_BT, lengths_B = noise(2, 7000, index=3), torch.tensor([7000, 3000])
    whole, _ = extractor.raw(wav_BT, lengths_B, [1, 2, 3])
    for layer in (1, 2, 3):
        cut = extractor.truncated(layer)
        assert cut.layers == layer and not any(f"encoder.layers.{layer}." in name for name in cut.state())
        again = from_export(json.loads(json.dumps(cut.to_json())), cut.state())
        for some in (cut, again):
            assert torch.equal(some.raw(wav_BT, lengths_B, [layer])[0][0], whole[layer - 1])
        with pytest.raises(ValueError, match=f"layer {layer + 1}.*has {layer} blocks"):
            cut.raw(wav_BT, lengths_B, [layer + 1])
    for layer in (0, 4):
        with pytest.raises(ValueError, match=f"layer {layer}.*has 3 blocks"):
            extractor.truncated(layer)


@pytest.mark.parametrize("given", [{"do_normalize": True}, {}, None])
def test_the_loudness_is_taken_out_as_transformers_does(models, tmp_path, given):
    folder, model, _ = models["hubert"]
    shutil.copytree(folder, tmp_path / "m")
    store.remove(str(tmp_path / "m" / "preprocessor_config.json"))
    if given is not None:
        store.put_json(str(tmp_path / "m" / "preprocessor_config.json"), given)
    extractor = load_pretrained_encoder(str(tmp_path / "m"))
    assert extractor.to_json()["preprocessor"] == {"sampling_rate": 16_000, "do_normalize": True}
    wav_BT = noise(3, 6400, index=4)
    lengths = [6400, 6101, 900]
    (x_BTD,), frames_B = extractor.raw(wav_BT, torch.tensor(lengths), [2])
    normal = transformers.Wav2Vec2FeatureExtractor()
    for row, n in enumerate(lengths):
        wav_T = normal(wav_BT[row, :n].numpy(), sampling_rate=16_000, return_tensors="pt").input_values[0]
        assert torch.allclose(x_BTD[row, :frames_B[row]], own(model, wav_T)[0][2], atol=1e-4)


def test_a_processor_s_file_counts_as_well(models, tmp_path):
    shutil.copytree(models["wavlm"][0], tmp_path / "m")
    (tmp_path / "m" / "preprocessor_config.json").rename(tmp_path / "m" / "processor_config.json")
    store.put_json(str(tmp_path / "m" / "processor_config.json"), {"feature_extractor": PLAIN, "tokenizer": {}})
    assert load_pretrained_encoder(str(tmp_path / "m")).preprocessor["do_normalize"] is False


def importing(folder: str) -> dict:
    return {"encoder": imported_encoder(folder)}


@pytest.mark.parametrize("kind", ["hubert-batchnorm", "wavlm-large", "wav2vec2-large", "w2vbert"])
def test_from_import_to_tokens(models, kind, tmp_path, recording_out):
    folder = str(tmp_path / "given")
    shutil.copytree(models[kind][0], folder)
    whole, wav_BT, lengths_B = models[kind][2], noise(2, 40_000, index=5), torch.tensor([40_000, 900])
    config = importing(folder)
    facts = import_encoder(config, {}, recording_out)
    shutil.rmtree(folder)  # the build lives on when the source is gone
    assert (facts["family"], facts["layers"], facts["dim"]) == (whole.family, LAYERS, DIM) and facts["parameters"] > 1000
    assert facts["digest"] == config["encoder"].digest and len(facts["digest"]) == 16
    extractor = load_extractor(recording_out.path)
    mine, _ = whole.features(wav_BT, lengths_B, [1, 2, 3])
    for a, b in zip(mine, extractor.features(wav_BT, lengths_B, [1, 2, 3])[0], strict=True):
        assert torch.equal(a, b)
    about = store.get_json(store.join(recording_out.path, "export", "config.json"))
    assert about["format"] == "audiolm-masked-1" and about["layer_convention"] == CONVENTION and about["sample_rate"] == 16_000
    kmeans, window = str(tmp_path / "kmeans"), Window(50, 10)
    centroids_KD = mine[1][0, ::8]
    save_semantic(kmeans, extractor, 2, torch.zeros(DIM), torch.ones(DIM), centroids_KD, window, {})
    tokenizer = load_semantic(kmeans)
    assert tokenizer.extractor.layers == 2 and tokenizer.spec.vocab == len(centroids_KD)
    x_BTD, _ = windowed(whole, wav_BT, lengths_B, [2], window)
    codes = tokenizer.encode(wav_BT, lengths_B)
    assert [len(c) for c in codes] == [63, 2] and len(codes[0].unique()) > 3
    assert torch.equal(codes[0][:, 0], torch.cdist(x_BTD[0][0], centroids_KD).argmin(1))
    half = load_semantic(kmeans, dtype="bfloat16").encode(wav_BT, lengths_B)
    assert (half[0] == codes[0]).float().mean() > 0.7


def test_bfloat16_stays_near_and_goes_back(models, kind, tmp_path):
    extractor = load_pretrained_encoder(models[kind][0])
    wav_BT, lengths_B = noise(1, 16_000, index=6), torch.tensor([16_000])
    (x_BTD,), _ = extractor.features(wav_BT, lengths_B, [2])
    (y_BTD,), _ = extractor.to("cpu", torch.bfloat16).features(wav_BT, lengths_B, [2])
    assert y_BTD.dtype == torch.float32 and not torch.equal(x_BTD, y_BTD)
    assert torch.nn.functional.cosine_similarity(x_BTD, y_BTD, dim=2).min() > 0.97
    assert extractor.to("cpu").features(wav_BT, lengths_B, [2])[0][0].dtype == torch.float32


def test_identity_is_the_bytes_of_every_file_that_counts(models, tmp_path, recording_out):
    folder = str(tmp_path / "m")
    shutil.copytree(models["hubert"][0], folder)
    config, digests = importing(folder), set()
    assert imported_encoder(models["hubert"][0]).digest == config["encoder"].digest
    for name in ("config.json", "preprocessor_config.json"):
        store.put(f"{folder}/{name}", store.get(f"{folder}/{name}") + b"\n")
        digests.add(imported_encoder(folder).digest)
    assert len(digests | {config["encoder"].digest}) == 3
    with pytest.raises(ArtifactError, match="semantic.pretrained.uri.*changed since this run was planned"):
        import_encoder(config, {}, recording_out)
    assert not store.exists(f"{recording_out.path}/export")


@pytest.mark.parametrize(("kind", "head"), [("hubert", "ForCTC"), ("wav2vec2-large", "ForPreTraining"),
                                            ("wavlm", "ForSequenceClassification"), ("wavlm-large", "ForXVector"),
                                            ("w2vbert", "ForCTC")])
def test_a_checkpoint_with_a_head_gives_its_encoder(kind, head, tmp_path):
    sizes = {**KINDS[kind][1], "vocab_size": 8}
    KINDS["head"] = (KINDS[kind][0], sizes)
    model = small("head", head)
    del KINDS["head"]
    model.half().save_pretrained(tmp_path)  # many are saved so
    model.float()
    if kind != "w2vbert":
        store.put_json(str(tmp_path / "preprocessor_config.json"), PLAIN)
    names = safetensors.torch.load(store.get(str(tmp_path / "model.safetensors")))
    assert any(n.startswith(f"{model.base_model_prefix}.") for n in names)
    wav_BT = noise(1, 3000, index=7)
    found, _ = load_pretrained_encoder(str(tmp_path)).raw(wav_BT, torch.tensor([3000]), [2])
    assert torch.allclose(found[0][0], own(model.base_model, wav_BT[0])[0][2], atol=1e-5)


def change(folder: str, name: str, **fields) -> None:
    store.put_json(f"{folder}/{name}", {**(store.get_json(f"{folder}/{name}") or {}), **fields})


@pytest.mark.parametrize(("kind", "name", "fields", "text"), [
    ("hubert", "config.json", {"model_type": "whisper"}, "model_type 'whisper'.*hubert, wavlm, wav2vec2, wav2vec2-bert"),
    ("hubert", "config.json", {"num_hidden_layers": 4}, "missing.*encoder.layers.3.*save_pretrained"),
    ("hubert", "config.json", {"num_hidden_layers": 2}, "unexpected.*encoder.layers.2"),
    ("hubert", "config.json", {"intermediate_size": 32}, "hubert model|another shape"),
    ("hubert", "config.json", {"conv_stride": [5, 2, 2, 2, 2, 2, 1]}, "a frame each 320 samples"),
    ("hubert", "preprocessor_config.json", {"sampling_rate": 8000}, "sampling_rate 8000.*16000"),
    ("hubert", "preprocessor_config.json", {"feature_extractor_type": "WhisperFeatureExtractor"}, "needs Wav2Vec2Feature"),
    ("w2vbert", "preprocessor_config.json", {"stride": 1}, "stride 1.*stride to 2"),
])
def test_what_does_not_fit_is_refused_by_name(models, kind, name, fields, text, tmp_path):
    folder = str(tmp_path / "m")
    shutil.copytree(models[kind][0], folder)
    change(folder, name, **fields)
    with pytest.raises(ArtifactError, match=f"semantic.pretrained.uri: .*(?:{text})"):
        load_pretrained_encoder(folder)


def test_missing_tensors_pickles_and_broken_files_are_refused(models, tmp_path):
    folder = str(tmp_path / "m")
    shutil.copytree(models["wavlm"][0], folder)
    weights = safetensors.torch.load(store.get(f"{folder}/model.safetensors"))
    del weights["encoder.layers.1.attention.gru_rel_pos_const"]
    store.put(f"{folder}/model.safetensors", safetensors.torch.save(weights))
    with pytest.raises(ArtifactError, match="1 missing.*layers.1.attention.gru_rel_pos_const"):
        load_pretrained_encoder(folder)
    store.put(f"{folder}/model.safetensors", b"nothing")
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_pretrained_encoder(folder)
    store.remove(f"{folder}/model.safetensors")
    torch.save(weights, f"{folder}/pytorch_model.bin")
    for ask in (imported_encoder, load_pretrained_encoder):
        with pytest.raises(ArtifactError, match="semantic.pretrained.uri.*no model.safetensors.*pytorch_model.bin is a pickle"):
            ask(folder)
    with pytest.raises(ArtifactError, match="holds no config.json"):
        imported_encoder(str(tmp_path / "nowhere"))


def test_an_export_of_another_convention_is_refused(models):
    extractor = models["hubert"][2]
    for wrong in ({"layer_convention": "after every norm"}, {"family": "wavlm"}):
        with pytest.raises(ArtifactError, match=next(iter(wrong))):
            from_export({**extractor.to_json(), **wrong}, extractor.state())
