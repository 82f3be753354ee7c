"""Stage 1 from a text model: the body computes what transformers' does, what does not fit is named, bytes are identity."""

from __future__ import annotations

import json

import pytest
import torch

from audiolm.config import lm, training
from audiolm.config.base import identity
from audiolm.lm.model import build_lm
from audiolm.lm.stages import Stage
from audiolm.lm.warm_start import start_from
from audiolm.models.lm.transformer import Transformer
from audiolm.tokenizers.hf import text_model

STAGE = Stage("semantic", 20, 0, (0, 0), 4, True, 4.0)


def shape(**changed) -> lm.StageConfig:
    sizes = {"dim": 32, "layers": 2, "heads": 4, "ff": 48, "dropout": 0.0, "gated": True, "activation": "silu", "norm": "rms"}
    return lm.StageConfig(crop_s=4.0, train=training.TrainConfig(steps=1, batch=1, lr=1e-3), **{**sizes, **changed})


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(folder, model) of a small random Llama whose pairs of heads share keys and values."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = transformers.LlamaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                     num_key_value_heads=2, intermediate_size=48, rms_norm_eps=1e-5)
    model = transformers.LlamaForCausalLM(sizes).eval().requires_grad_(False)
    for p in model.parameters():  # gains that are not one, and weights that are sure of themselves
        p.mul_(3.0) if p.ndim == 2 else p.uniform_(0.5, 2.0)
    folder = str(tmp_path_factory.mktemp("llama"))
    model.save_pretrained(folder)
    return folder, model


def fresh(of: lm.StageConfig) -> Transformer:
    torch.manual_seed(1)
    return build_lm(STAGE, of).eval().requires_grad_(False)


def test_the_body_computes_what_transformers_does(llama):
    folder, theirs = llama
    ours, untouched = fresh(shape()), fresh(shape())
    start_from(ours, shape(), text_model(folder))
    ids_BT = torch.randint(0, STAGE.vocab_size, (2, 50))
    expected = theirs.model(inputs_embeds=ours.embed(ids_BT)).last_hidden_state
    torch.testing.assert_close(ours.hidden(ids_BT), expected, atol=2e-5, rtol=1e-4)
    for name in ("embed.weight", "head.weight"):
        assert torch.equal(ours.state_dict()[name], untouched.state_dict()[name])


def test_what_differs_is_named_with_what_to_set(llama, tmp_path):
    folder, _ = llama
    with pytest.raises(ValueError, match=r"lm\.semantic\.warm_start\.uri.*layers is 3: set it to 2; .*norm is 'layer': set"):
        start_from(fresh(shape(layers=3, norm="layer")), shape(layers=3, norm="layer"), text_model(folder))
    about = json.loads(open(f"{folder}/config.json").read())
    weights = open(f"{folder}/model.safetensors", "rb").read()
    (tmp_path / "model.safetensors").write_bytes(weights)
    rope = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3"}}
    for changed, text in (({"model_type": "gpt2"}, "model_type is 'gpt2'"), ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06"),
                          (rope, "rope_theta is 500000.0.*rope_type")):
        (tmp_path / "config.json").write_text(json.dumps({**about, **changed}))
        with pytest.raises(ValueError, match=text):
            start_from(fresh(shape()), shape(), text_model(str(tmp_path)))
    with pytest.raises(ValueError, match="holds no config.json"):
        text_model(str(tmp_path / "nothing"))
    want = text_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="changed since this run was planned"):
        start_from(fresh(shape()), shape(), want)


def test_the_bytes_are_the_identity_and_it_is_stage_1s_alone(llama, tmp_path):
    one = text_model(llama[0])
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(open(f"{llama[0]}/{name}", "rb").read())
    assert identity(one) == identity(text_model(str(tmp_path))) == {"digest": one.digest}
    assert "warm_start" not in identity(shape())  # off: older recipes keep their fingerprints
    warm = shape(warm_start={"uri": llama[0]})
    assert identity(warm)["warm_start"] == {}
    with pytest.raises(ValueError, match=r"lm\.coarse\.warm_start"):
        lm.LMConfig(coarse=warm)
