"""Codecs of transformers behind the Codec protocol: same codes and sound as the library's, lengths, import, errors."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

from audiolm import rng, store
from audiolm.config.base import ConfigError
from audiolm.config.load import load_config
from audiolm.pipeline import steps
from audiolm.tokenizers.acoustic import load_codec
from audiolm.tokenizers.artifact import ArtifactError
from audiolm.tokenizers.base import padded_samples
from audiolm.tokenizers.hf import imported_codec
from audiolm.tokenizers.hf_codec import import_codec, load_pretrained_codec
from tests.worlds.basics import ROOT

transformers = pytest.importorskip("transformers")
KINDS, LEVELS, VOCAB = ("encodec", "dac", "mimi"), 4, 64
QUICKSTART = str(ROOT / "workflows" / "scratch.yaml")


def noise(*shape: int, index: int = 0) -> torch.Tensor:
    return torch.from_numpy(rng.generator(0, "test-pretrained", index).standard_normal(shape).astype(np.float32)) / 4


@torch.no_grad()
def small(kind: str, sample_rate: int = 16_000) -> torch.nn.Module:
    """A random model of 4 x 64 codes at hop 320."""
    torch.manual_seed(0)
    if kind == "encodec":
        model = transformers.EncodecModel(transformers.EncodecConfig(
            sampling_rate=sample_rate, num_filters=2, hidden_size=16, codebook_size=VOCAB, num_lstm_layers=1,
            target_bandwidths=[0.3, LEVELS * 6 * sample_rate / 320 / 1000]))
        spread([layer.codebook.embed for layer in model.quantizer.layers], model.encoder(noise(1, 1, 320 * 256)))
    elif kind == "dac":
        model = transformers.DacModel(transformers.DacConfig(
            sampling_rate=sample_rate, encoder_hidden_size=2, decoder_hidden_size=16, downsampling_ratios=[2, 4, 5, 8],
            n_codebooks=LEVELS, codebook_size=VOCAB))
    else:
        model = transformers.MimiModel(transformers.MimiConfig(
            sampling_rate=sample_rate, frame_rate=sample_rate / 320, hidden_size=16, num_filters=2, upsample_groups=16,
            upsampling_ratios=[5, 4, 4, 2], codebook_size=VOCAB, codebook_dim=8, vector_quantization_hidden_dimension=8,
            num_quantizers=LEVELS, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
            intermediate_size=32, sliding_window=20))
        latents_BDT = model.encoder(noise(1, 1, 320 * 256)).latents
        for part in (model.quantizer.semantic_residual_vector_quantizer, model.quantizer.acoustic_residual_vector_quantizer):
            spread([layer.codebook.embed_sum for layer in part.layers], part.input_proj(latents_BDT))
    return model.eval()


def spread(books: list[torch.Tensor], latents_1DT: torch.Tensor) -> None:
    """Codebooks drawn from what the levels before leave: new ones are all zeros, and every code would be 0."""
    left_TD = latents_1DT[0].T.contiguous()
    for i, book_VD in enumerate(books):
        book_VD.copy_(left_TD[i::LEVELS])
        left_TD = left_TD - book_VD[torch.cdist(left_TD, book_VD).argmin(1)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        small(kind).save_pretrained(root / kind)
    return {kind: str(root / kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@torch.inference_mode()
def own_codes(model, kind: str, wav_T: torch.Tensor) -> torch.Tensor:
    """codes_TQ by transformers' own encode, of one clip."""
    if kind == "encodec":
        codes = model.encode(wav_T[None, None], bandwidth=model.config.target_bandwidths[-1]).audio_codes[0]
    else:
        codes = model.encode(wav_T[None, None]).audio_codes
    return codes[0].T


@torch.inference_mode()
def own_wav(model, kind: str, codes_TQ: torch.Tensor) -> torch.Tensor:
    codes_BQT = codes_TQ.T[None]
    made = model.decode(codes_BQT[None], [None]) if kind == "encodec" else model.decode(audio_codes=codes_BQT)
    return made.audio_values.flatten()


def test_codes_and_sound_are_those_of_transformers(folders, kind):
    codec, model = load_pretrained_codec(folders[kind]), small(kind)
    assert codec.spec.to_json() == {"name": kind, "sample_rate": 16_000, "hop": 320, "n_q": LEVELS, "vocab": VOCAB}
    lengths = torch.tensor([6400, 1, 5000])
    wav_BT = noise(3, 6400, index=50)  # noise behind a clip's end too, which must change nothing
    for row, n, codes_TQ in zip(wav_BT, lengths, codec.encode(wav_BT, lengths), strict=True):
        wav_T = torch.zeros(padded_samples(int(n)))
        wav_T[:n] = row[:n]
        assert codes_TQ.dtype == torch.int64 and torch.equal(codes_TQ, own_codes(model, kind, wav_T))
        for q in range(1, LEVELS + 1):
            direct_T, made_BT = own_wav(model, kind, codes_TQ[:, :q]), codec.decode(codes_TQ[None, :, :q])
            kept = min(len(direct_T), made_BT.shape[1])
            assert made_BT.shape == (1, len(wav_T)) and kept >= len(wav_T) - 8
            assert torch.equal(made_BT[0, :kept], direct_T[:kept]) and not made_BT[0, kept:].any()
    codes_TQ = codec.encode(wav_BT, lengths)[0]
    assert all(codes_TQ[:, q].unique().numel() > 3 for q in range(LEVELS)), "a codebook that is not used tests nothing"
    assert not torch.equal(codec.decode(codes_TQ[None, :, :1]), codec.decode(codes_TQ[None]))
    both_BTQ = torch.stack([codes_TQ, codes_TQ.flip(0)])
    assert torch.allclose(codec.decode(both_BTQ)[1], codec.decode(both_BTQ[1:])[0], rtol=1e-4, atol=1e-4)


def test_every_length_gives_whole_semantic_frames(folders, kind):
    codec = load_pretrained_codec(folders[kind])
    lengths = sorted({0, 1, 2, 3, 639, 640, 641, 1280, 1281, *range(7, 2000, 173), 15_999, 47_360})
    for n in lengths:
        codes_TQ = codec.encode(noise(1, n, index=n), torch.tensor([n]))[0]
        assert codes_TQ.shape == (padded_samples(n) // 320, LEVELS)
        assert codec.decode(codes_TQ[None]).shape == (1, padded_samples(n))


@pytest.mark.parametrize("kind", ["encodec", "mimi"])
def test_a_model_of_another_rate_is_for_use_outside_the_pipeline(tmp_path, kind):
    small(kind, 24_000).save_pretrained(tmp_path)
    codec = load_pretrained_codec(str(tmp_path))
    assert (codec.spec.sample_rate, codec.spec.rate_hz, codec.lookahead) == (24_000, 75, 50)
    for n, frames in ((1, 1), (320, 1), (321, 2), (6400, 20)):
        assert codec.encode(noise(1, n), torch.tensor([n]))[0].shape == (frames, LEVELS)


def importing(folder: str, n_q: int = LEVELS, vocab: int = VOCAB) -> dict:
    return {"codec": imported_codec(folder, n_q, vocab)}


def test_an_import_is_whole_and_uses_the_levels_asked_for(folders, kind, tmp_path, recording_out):
    folder = str(tmp_path / "given")
    shutil.copytree(folders[kind], folder)
    wav_BT, lengths_B = noise(1, 3200, index=60), torch.tensor([3200])
    whole = load_pretrained_codec(folder)
    facts = import_codec(importing(folder, n_q=2), {}, recording_out)
    shutil.rmtree(folder)  # the build lives on when the source is gone
    codec = load_codec(recording_out.path)
    assert (facts["levels"], facts["n_q"], codec.spec.n_q, codec.spec.name) == (LEVELS, 2, 2, kind) and len(codec.hash) == 16
    codes_TQ = codec.encode(wav_BT, lengths_B)[0]
    assert torch.equal(codes_TQ, whole.encode(wav_BT, lengths_B)[0][:, :2])
    assert torch.equal(codec.decode(codes_TQ[None]), whole.decode(codes_TQ[None]))
    again = load_codec(recording_out.path)
    assert again.spec == codec.spec and again.hash == codec.hash
    with pytest.raises(ValueError, match="1 to 2 levels"):
        codec.decode(torch.zeros(1, 4, 3, dtype=torch.int64))


def test_older_names_and_half_precision_are_read(folders, tmp_path):
    """The published EnCodec files name weight norm weight_g and weight_v."""
    weights = safetensors.torch.load_file(f"{folders['encodec']}/model.safetensors")
    new = "parametrizations.weight.original"
    old = {n.replace(f"{new}0", "weight_g").replace(f"{new}1", "weight_v"): w for n, w in weights.items()
           if not n.endswith("inited")}
    assert old.keys() - weights.keys()
    write(tmp_path / "old", folders["encodec"], old)
    wav_BT, lengths_B = noise(1, 3200, index=61), torch.tensor([3200])
    same, codec = load_pretrained_codec(folders["encodec"]), load_pretrained_codec(str(tmp_path / "old"))
    assert torch.equal(codec.encode(wav_BT, lengths_B)[0], same.encode(wav_BT, lengths_B)[0])
    write(tmp_path / "half", folders["encodec"], {n: w.half() for n, w in weights.items()}, dtype="float16")
    halved = load_pretrained_codec(str(tmp_path / "half"))
    assert halved.decode(codec.encode(wav_BT, lengths_B)[0][None]).dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in halved.model.parameters())


def write(folder, source: str, weights: dict | None = None, **settings) -> str:
    """A model's folder with other weights or other fields in its config."""
    store.put_json(f"{folder}/config.json", {**store.get_json(f"{source}/config.json"), **settings})
    data = store.get(f"{source}/model.safetensors") if weights is None else safetensors.torch.save(weights)
    store.put(f"{folder}/model.safetensors", data)
    return str(folder)


def test_what_does_not_fit_says_what_and_how(folders, tmp_path, recording_out):
    with pytest.raises(ValueError, match=r"16000 Hz, hop 320, 4 levels and a vocabulary of 64.*12 levels.*1024.*"
                                         r"Fix: codec.vocab=64, codec.n_q=4"):
        import_codec(importing(folders["dac"], 12, 1024), {}, recording_out)
    small("encodec", 24_000).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="24000 Hz, hop 320, .* Fix: give a model of 16000 Hz and hop 320"):
        import_codec(importing(str(tmp_path / "other")), {}, recording_out)
    planned = importing(folders["encodec"])["codec"]
    with pytest.raises(ValueError, match="changed since this run was planned"):
        import_codec({"codec": planned.model_copy(update={"uri": str(tmp_path / "other")})}, {}, recording_out)
    assert not store.names(recording_out.path)
    rate = store.get_json(f"{tmp_path}/other/config.json")
    export = {"kind": "encodec", "n_q": LEVELS, "sample_rate": 24_000, "hop": 320, "vocab": VOCAB, "transformers": rate}
    build = str(tmp_path / "build")
    shutil.copytree(tmp_path / "other", tmp_path / "build" / "export")
    store.put_json(f"{build}/export/config.json", export)
    with pytest.raises(ArtifactError, match="24000 Hz and a hop of 320; this pipeline takes 16000"):
        load_codec(build)
    store.put_json(f"{build}/export/config.json", {**export, "vocab": 32})
    with pytest.raises(ArtifactError, match="says vocab 32, the model's is 64"):
        load_codec(build)


def test_files_that_are_no_such_model_are_refused(folders, kind, tmp_path):
    weights = safetensors.torch.load_file(f"{folders[kind]}/model.safetensors")
    name = sorted(weights)[0]
    for case, changed, message in (
            ("missing", {n: w for n, w in weights.items() if n != name}, "1 missing .*bias"),
            ("unexpected", {**weights, "more": torch.zeros(1)}, r"1 unexpected \(more\)"),
            ("half", {**weights, "encoder.more": torch.zeros(1)}, r"encoder.more|1 more than the model has"),
            ("shape", {**weights, name: torch.zeros(7, 7)}, f"make no {kind} model")):
        with pytest.raises(ArtifactError, match=message):
            load_pretrained_codec(write(tmp_path / case, folders[kind], changed))
    with pytest.raises(ArtifactError, match="codebook_size"):
        load_pretrained_codec(write(tmp_path / "odd", folders[kind], codebook_size=63))
    with pytest.raises(ArtifactError, match="model_type 'hubert'.*encodec, dac, mimi"):
        load_pretrained_codec(write(tmp_path / "type", folders[kind], model_type="hubert"))


def test_pickles_and_models_that_tokens_cannot_carry_are_refused(folders, tmp_path):
    store.put_json(f"{tmp_path}/pickle/config.json", {"model_type": "encodec"})
    store.put(f"{tmp_path}/pickle/pytorch_model.bin", b"")
    for read in (importing, load_pretrained_codec):
        with pytest.raises(ValueError, match="pytorch_model.bin is a pickle.*save it again with save_pretrained"):
            read(f"{tmp_path}/pickle")
        with pytest.raises(ValueError, match="holds no model.safetensors. A pretrained codec is"):
            read(f"{tmp_path}/nothing")
    for kind, settings, message in (
            ("encodec", {"normalize": True, "chunk_length_s": 1.0}, "normalize is True and chunk_length_s 1.0"),
            ("encodec", {"audio_channels": 2}, "audio_channels is 2, only mono"),
            ("mimi", {"encoder_config": None}, "one half only")):
        with pytest.raises(ArtifactError, match=message):
            load_pretrained_codec(write(tmp_path / message[:9], folders[kind], **settings))


def test_bad_audio_and_codes_are_refused(folders):
    codec = load_pretrained_codec(folders["dac"])
    for wav_BT, lengths in ((noise(640), [640]), (noise(1, 640), [641]), (noise(1, 2, 640), [640])):
        with pytest.raises(ValueError, match="encode takes mono wav_BT"):
            codec.encode(wav_BT, torch.tensor(lengths))
    with pytest.raises(ValueError, match="NaN or infinite"):
        codec.encode(torch.full((1, 640), float("nan")), torch.tensor([640]))
    assert codec.encode(torch.full((1, 640), float("nan")), torch.tensor([0]))[0].shape == (2, LEVELS)
    with pytest.raises(ValueError, match="codes run from 0 to 64"):
        codec.decode(torch.tensor([[[0, VOCAB]]]))
    assert codec.decode(torch.zeros(2, 0, 3, dtype=torch.int64)).shape == (2, 0)


def test_without_the_library_it_is_named(folders, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    with pytest.raises(ConfigError, match="pip install 'transformers>=5,<6'"):
        load_pretrained_codec(folders["dac"])


def plan(*values: str) -> dict:
    sys.path.insert(0, str(ROOT / "workflows"))
    try:
        import full_pipeline
    finally:
        sys.path.pop(0)
    return {s.name: s for s in full_pipeline.graph(load_config(QUICKSTART, list(values)))}


def test_a_pretrained_codec_is_its_bytes_and_not_its_place(folders, tmp_path):
    given = ("codec.n_q=4", f"codec.vocab={VOCAB}")
    here = plan(f"codec.pretrained={folders['dac']}", *given)
    moved = shutil.copytree(folders["dac"], tmp_path / "moved")
    same = plan(f"codec.pretrained={moved}", *given, "codec.train.lr=0.5", "codec.dim=8")
    assert here["codec"].fn is steps.FUNCTIONS["import_codec"] and not here["codec"].inputs and not here["codec"].trains
    assert here["codec"].fingerprint == same["codec"].fingerprint
    assert plan(f"codec.pretrained={moved}", *given)["acoustic_tokens"].fingerprint == here["acoustic_tokens"].fingerprint
    fewer = plan(f"codec.pretrained={moved}", "codec.n_q=3", given[1])
    data = bytearray(store.get(f"{moved}/model.safetensors"))
    data[-1] ^= 1
    store.put(f"{moved}/model.safetensors", bytes(data))
    other = plan(f"codec.pretrained={moved}", *given)
    assert len({p["codec"].fingerprint for p in (here, fewer, other, plan(*given))}) == 4
    assert plan(*given)["codec"].fn is steps.FUNCTIONS["train_codec"]


def test_a_plan_with_a_pretrained_codec_needs_neither_torch_nor_transformers(folders, tmp_path):
    code = ("import sys, runpy; sys.argv[0] = 'full_pipeline.py'; "
            "runpy.run_path('workflows/full_pipeline.py', run_name='__main__'); "
            "print([m for m in ('torch', 'transformers') if m in sys.modules])")
    values = ["workflows/scratch.yaml", f"codec.pretrained={folders['mimi']}", "codec.n_q=4", f"codec.vocab={VOCAB}",
              f"store={tmp_path}"]
    done = subprocess.run([sys.executable, "-c", code, "--dry-run", *values], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    assert done.stdout.strip().endswith("[]") and "codec" in done.stdout
    gone = subprocess.run([sys.executable, "workflows/full_pipeline.py", "workflows/scratch.yaml", "--dry-run",
                           f"codec.pretrained={tmp_path}/gone"],
                          cwd=ROOT, capture_output=True, text=True)
    assert gone.returncode == 2 and "holds no model.safetensors" in gone.stderr
