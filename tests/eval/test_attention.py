"""Stage 2's attention: the model's own, a planted alignment is seen, an untrained stage has none; the temperature sweep."""

from __future__ import annotations

import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from audiolm import store
from audiolm.config.lm import LMConfig, StageConfig
from audiolm.config.training import TrainConfig
from audiolm.data.clips import Clip, Part
from audiolm.eval.suites import attention, temperatures
from audiolm.generate.load import load
from audiolm.lm.layouts import build_stages
from audiolm.models.lm.attention_maps import attention_maps
from audiolm.models.lm.block import TransformerSizes
from audiolm.models.lm.transformer import Transformer
from audiolm.render import plots
from tests.worlds.layouts import PAPER
from tests.worlds.tiny_system import COARSE, RUN, build, voice

K = 40


@pytest.mark.parametrize("shape", [{}, {"positions": "t5"},
                                   {"gated": True, "norm": "rms", "activation": "silu"}])
def test_what_is_listened_to_gives_what_the_model_gives(shape):
    torch.manual_seed(0)
    model = Transformer(TransformerSizes(20, 16, 3, 4, 32, 0.1, **shape)).eval()
    ids_T, cond_TC = torch.randint(20, (30,)), torch.randint(20, (30, 2))
    found = list(attention_maps(model, ids_T, cond_TC))
    assert len(found) == 3 and all(torch.allclose(share_TT.sum(1), torch.ones(30)) for share_TT, _ in found)
    assert all((share_TT.triu(1) == 0).all() for share_TT, _ in found)
    with torch.no_grad():
        expected_TD = model.hidden(ids_T[None], cond_BTC=cond_TC[None])[0]
        torch.testing.assert_close(model.norm(found[-1][1]), expected_TD, atol=1e-5, rtol=1e-5)


def aligned(dedupe: bool):
    """A coarse stage of one layer and one level that looks at the token whose number its last code has."""
    shape = StageConfig(crop_s=10.0, train=TrainConfig(steps=1, batch=1, lr=1e-3))
    lm = LMConfig(**PAPER, dedupe=dedupe, coarse_levels=1, semantic=shape, coarse=shape, fine=shape)
    stage = build_stages(lm, 1, K, K)["lm_coarse"]
    model = Transformer(TransformerSizes(stage.vocab_size, 2 * K, 1, 1, 8, 0.0, slots=[K + 1], positions="t5")).eval()
    with torch.no_grad():
        model.bias.table.zero_()
        model.embed.weight.zero_()
        model.embed.weight[:K, :K] = model.embed.weight[K:2 * K, :K] = 3 * torch.eye(K)  # a token and its code are alike
        model.blocks[0].qkv.weight.zero_()
        model.blocks[0].qkv.weight[:4 * K] = 3 * torch.eye(2 * K).repeat(2, 1)
    return model, stage


@pytest.mark.parametrize(("dedupe", "kind"), [(True, "flat"), (False, "flat"), (False, "frame")])
def test_a_planted_alignment_is_seen(dedupe, kind):
    model, stage = aligned(dedupe)
    if kind == "frame":  # of one level: the same places
        model, stage = SimpleNamespace(backbone=model), replace(stage, frames=True)
    z_T = np.repeat(np.arange(K), 3)  # each token 0.12 s
    share_LNS = attention.prefix_attention(model, stage, z_T, np.repeat(z_T, 2)[:, None])
    near_NS = attention.near_prefix(stage, z_T, 6 * K)
    assert share_LNS.shape == (1, 6 * K, K if dedupe else 3 * K) and near_NS.shape == share_LNS.shape[1:]
    near = (share_LNS * near_NS).sum() / share_LNS.sum()
    assert near > 0.9 and near_NS.mean() < 0.15
    other = np.random.default_rng(0).permutation(K)[z_T]  # codes of another sentence: it looks elsewhere
    share_LNS = attention.prefix_attention(model, stage, z_T, np.repeat(other, 2)[:, None])
    assert (share_LNS * near_NS).sum() / share_LNS.sum() < 0.3


def test_nearness_by_hand():
    _, stage = aligned(True)
    z_T = np.array([3, 3, 3, 7, 7, 1] + [2] * 10)  # begin at 0, 0.12, 0.2, 0.24 s
    np.testing.assert_allclose(attention.spans_of(stage, z_T), [[0, 0.12], [0.12, 0.2], [0.2, 0.24], [0.24, 0.64]])
    near_NS = attention.near_prefix(stage, z_T, 32)  # frames of 20 ms, their middles at 0.01, 0.03, ...
    assert near_NS[0].tolist() == [True, True, True, False] and near_NS[1].tolist() == [True, True, True, False]
    assert near_NS[2].tolist() == [True] * 4 and near_NS[16].tolist() == [False, True, True, True]
    assert near_NS[31].tolist() == [False, False, False, True]


@pytest.fixture(scope="module", params=["flat", "frame"])
def lm(tmp_path_factory, request):
    kind = request.param
    return load(build(str(tmp_path_factory.mktemp("system")), dedupe=kind == "flat", kind=kind), mean_run=RUN)


@pytest.fixture(scope="module")
def clips():
    wavs = [voice(1.2), voice(1.6, 1)]
    return [(Clip(f"s/{i}", "o", "o", "p", "test", 16_000, len(w), (Part("p", "p", 0, len(w), 0, None),), 0, i),
             w[:len(w) // 640 * 640]) for i, w in enumerate(wavs)]


def test_rows_and_pictures_of_a_system(lm, clips, tmp_path):
    seen = []
    rows, files = attention.attention_results(lm, clips, str(tmp_path), progress=lambda *at: seen.append(at))
    near, even, used, *layers = rows
    assert (near.item, even.item, even.role) == ("all layers", "even attention", "floor") and seen[-1] == (2, 2, "clips")
    assert near.low <= near.value <= near.high and near.n == 2 and 0 < used.value < 100
    assert abs(near.value - even.value) < 15 and near.value == pytest.approx(np.mean([r.value for r in layers]))  # untrained
    assert [r.item for r in layers] == ["layer 1", "layer 2"]
    assert files == ["attention/1-s-0.png", "attention/2-s-1.png"]
    assert all(store.get(store.join(str(tmp_path), f)).startswith(b"\x89PNG") for f in files)


def test_a_stage_without_semantic_tokens_is_told():
    stage = replace(aligned(True)[1], dropped=1.0)
    with pytest.raises(ValueError, match="lm.ablation took stage 2's prefix away"):
        attention.attention_results(SimpleNamespace(models={"coarse": (None, stage)}), [], "")


def test_pictures_of_many_layers():
    share = np.random.default_rng(0).random((6, 50, 12))
    assert plots.attention(share, np.stack([np.arange(12), np.arange(1, 13)], 1) / 12, "x").startswith(b"\x89PNG")


def test_cold_repeats_itself_and_hot_does_not(lm, clips, tmp_path):
    import soundfile

    rows, rungs = temperatures.sweep(lm, clips, 0.4, str(tmp_path), temperatures=(0.0, 3.0))
    found = {(r.item, r.metric): r for r in rows}
    for mode in ("acoustic generation", "continuation"):
        cold, hot = (found[f"{mode}, T {t}", "distinct codes, %"] for t in (0, 3))
        assert cold.value < hot.value and cold.n == 2 and hot.low <= hot.value <= hot.high
    assert found["originals through the codec", "mel distance, nats"].role == "ceiling"
    assert [r["rung"] for r in rungs] == ["originals through the codec", "acoustic generation, T 0", "acoustic generation, T 3",
                                          "continuation, T 0", "continuation, T 3"]
    for rung in rungs:
        assert rung["mel"] == pytest.approx(found[rung["rung"], "mel distance, nats"].value)
        for file, (clip, wav) in zip(rung["files"], clips, strict=True):
            made, _ = soundfile.read(io.BytesIO(store.get(store.join(str(tmp_path), file["file"]))))
            assert file["clip"] == clip.id and len(made) == len(wav)
    again, _ = temperatures.sweep(lm, clips, 0.4, str(tmp_path), temperatures=(3.0,))
    assert {r.item: r.value for r in again}["continuation, T 3"] == found["continuation, T 3", "distinct codes, %"].value


def test_distinct_codes_by_hand():
    codes_TQ = np.array([[1, 5], [1, 6], [2, 7], [1, 8]])
    assert temperatures.distinct(codes_TQ) == (2 / 4 + 4 / 4) / 2 and COARSE == 2
