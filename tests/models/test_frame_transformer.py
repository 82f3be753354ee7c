"""Backbone and depth network: drawn codes have the probabilities of the training pass, cached, exported and tied or not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from audiolm.config.lm import DepthConfig, StageConfig
from audiolm.config.training import TrainConfig
from audiolm.lm.loss import inputs_of, prepare
from audiolm.lm.model import build_lm, export_lm, load_lm
from audiolm.lm.pack_rows import pack_rows
from audiolm.lm.stages import Stage
from audiolm.tokenizers.artifact import write_export

K, VOCAB, Q = 6, 9, 3


def shape_of(**changes) -> StageConfig:
    return StageConfig(**{"crop_s": 2.0, "dim": 32, "layers": 2, "heads": 2, "ff": 64, "dropout": 0.0,
                          "depth": DepthConfig(dim=16, layers=2, ff=32),
                          "train": TrainConfig(steps=1, batch=1, lr=1e-3), **changes})


@pytest.mark.parametrize("positions", ["rotary", "t5"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_drawn_codes_have_the_probabilities_of_the_training_pass(tied, aligned, positions, tmp_path):
    torch.manual_seed(0)
    stage, draw = Stage("coarse", K, VOCAB, (0, Q), Q, False, 2.0, aligned=aligned, frames=True), np.random.default_rng(0)
    codes_QVE = torch.randn(Q, VOCAB, 5) if tied else None
    model = build_lm(stage, shape_of(positions=positions), codes_QVE).eval().requires_grad_(False)
    for p in (model.depth.read.weight, model.backbone.embed.weight, model.depth.embed.weight, model.depth.head.weight):
        p.add_(0.5 * torch.randn_like(p))  # free terms count beside tied ones, and all of it matters
    packed = stage.pack(draw.integers(0, K, 5), draw.integers(0, VOCAB, (10, Q)), True)
    tensors = prepare(stage, pack_rows(stage, [[packed]]))
    nats_SN = model(*inputs_of(tensors))[:, :10]
    assert nats_SN.std() > 0.3
    write_export(str(tmp_path), *export_lm(model, stage))
    model, loaded = load_lm(str(tmp_path))
    assert loaded == stage and model.depth.tied is None

    cache, found = model.backbone.cache(1, 40), []
    for t in range(tensors["ids_BT"].shape[1] - 1):
        cond_BtC = tensors["cond_BTC"][:, t:t + 1]
        h_BD = model.backbone.advance(tensors["ids_BT"][:, t:t + 1], cache, cond_BtC)[:, 0]
        if t in tensors["index_SN"][0, :10]:
            codes_Q, own = tensors["label_SN"][:, len(found)], []

            def force(slot, scores_BV, codes_Q=codes_Q, own=own):
                own.append(-scores_BV.log_softmax(1)[0, codes_Q[slot]])
                return codes_Q[slot:slot + 1]

            model.draw_frame(h_BD, force)
            found.append(torch.stack(own))
    torch.testing.assert_close(torch.stack(found, 1), nats_SN, atol=1e-4, rtol=1e-5)


def test_checkpointing_and_compilation_change_nothing():
    torch.manual_seed(0)
    stage, draw = Stage("coarse", K, VOCAB, (0, Q), Q, False, 2.0, aligned=True, frames=True), np.random.default_rng(0)
    model = build_lm(stage, shape_of(checkpointing=True), torch.randn(Q, VOCAB, 5)).train()
    row = [stage.pack(draw.integers(0, K, n), draw.integers(0, VOCAB, (2 * n, Q)), True) for n in (5, 9, 4)]
    inputs = inputs_of(prepare(stage, pack_rows(stage, [row], stage.max_len)))

    def training_pass():
        nats_SN = model(*inputs)
        nats_SN.sum().backward()
        grads = [p.grad for p in model.parameters()]
        model.zero_grad()
        return [nats_SN.detach(), *grads]

    again = training_pass()
    model.backbone.checkpointing = False
    plain = training_pass()
    assert all(map(torch.equal, plain, again))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_training("aot_eager")
    compiled = training_pass()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 and not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(plain, compiled, atol=1e-5, rtol=1e-4)
