"""The factorised quantizer: the face that both quantizers share, learning, dropout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from audiolm import rng
from audiolm.models.factorised import FactorisedVQ
from audiolm.models.rvq import ResidualVQ
from audiolm.models.soundstream import SoundStream, SoundStreamSizes, fold


def noise(*shape: int, index: int = 0) -> torch.Tensor:
    return torch.from_numpy(rng.generator(0, "test-factorised", index).standard_normal(shape).astype(np.float32))


def factorised(**changes) -> FactorisedVQ:
    torch.manual_seed(0)
    return FactorisedVQ(**{"dim": 8, "n_q": 3, "vocab": 16, "code_dim": 4, **changes})


def test_both_quantizers_have_one_face():
    def face(kind):
        return {name for name in vars(kind) if not name.startswith("_")}

    assert face(FactorisedVQ) == face(ResidualVQ)
    out = factorised()(noise(2, 8, 20)), ResidualVQ(8, 3, 16)(noise(2, 8, 20))
    assert {k: v.shape for k, v in out[0].items()} == {k: v.shape for k, v in out[1].items()}


def test_every_level_learns_by_gradient_and_lowers_the_error():
    vq = factorised()
    optimizer, x_BDT = torch.optim.Adam(vq.parameters(), 0.02), noise(16, 8, 50)
    for step in range(150):
        out = vq(x_BDT, (torch.arange(16) + step) % 3 + 1)  # every number of levels takes its turn
        (out["commitment"] + out["codebook"] + (out["quantized_BDT"] - x_BDT).square().mean()).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vq.parameters())
        optimizer.step()
        optimizer.zero_grad()
    codes_BTQ = vq.requires_grad_(False).encode(x_BDT)
    errors = [float((x_BDT - vq.decode(codes_BTQ[..., :q])).square().mean()) for q in (1, 2, 3)]
    assert float(x_BDT.square().mean()) > errors[0] > errors[1] > errors[2]


def test_latents_with_a_common_offset_do_not_share_one_code():
    vq, x_BDT = factorised(), 30.0 + noise(4, 8, 50)
    assert len(vq.encode(x_BDT)[..., 0].unique()) < 4
    vq.initialise(x_BDT.transpose(1, 2).flatten(0, 1), seed=0, reduce=lambda x: x)
    codes_BTQ = vq.encode(x_BDT)
    assert all(len(codes_BTQ[..., q].unique()) > 8 for q in range(3))
    assert float((vq.decode(codes_BTQ).mean() - 30.0).abs()) < 1.0
    assert torch.allclose(vq(x_BDT)["quantized_BDT"], vq.decode(codes_BTQ), atol=1e-4)


def test_dropout_masks_the_output_and_no_level_s_learning():
    vq, x_BDT = factorised(), noise(3, 8, 20)
    out, whole = vq(x_BDT, torch.tensor([1, 2, 3])), vq(x_BDT)
    for row, levels in enumerate((1, 2, 3)):
        assert torch.allclose(out["quantized_BDT"][row], vq.decode(whole["codes_BTQ"][row:row + 1, :, :levels])[0], atol=1e-5)
    assert float(out["commitment"]) == float(whole["commitment"]) and float(out["codebook"]) == float(whole["codebook"])
    assert torch.equal(out["codes_BTQ"], whole["codes_BTQ"])


def test_search_is_fp32_under_autocast_and_shares_follow_use():
    vq, x_BDT = factorised(decay=0.5), noise(2, 8, 200)
    with torch.autocast("cpu", torch.bfloat16):
        inside = vq.encode(x_BDT)
    assert torch.equal(inside, vq.encode(x_BDT))
    replaced_Q = vq.update(x_BDT.transpose(1, 2).flatten(0, 1), inside.flatten(0, 1), seed=0, step=0, reduce=lambda x: x)
    assert replaced_Q.tolist() == [0, 0, 0]
    used_N = torch.bincount(inside[..., 0].flatten(), minlength=16) / 400
    assert torch.allclose(vq.share_QN[0], 0.5 / 16 + 0.5 * used_N)
    assert ((vq.perplexity() > 1) & (vq.perplexity() <= 16)).all()


def test_a_codec_of_factorised_codes_folds_to_the_same_codec():
    torch.manual_seed(0)
    sizes = ((2, 4, 5, 8), 2, 2, 8, 3, 16)
    model = SoundStream(SoundStreamSizes(*sizes, quantizer="factorised", code_dim=4)).eval()
    wav_BT = 0.1 * noise(1, 3200)
    codes_BTQ = model.encode(wav_BT)
    sound_BT = model.decode(codes_BTQ)
    plain = SoundStream(SoundStreamSizes(*sizes, quantizer="factorised", code_dim=4), norm=False).eval()
    plain.load_state_dict(fold(model).state_dict())
    assert torch.equal(plain.encode(wav_BT), codes_BTQ) and torch.allclose(plain.decode(codes_BTQ), sound_BT, atol=1e-5)
    with pytest.raises(ValueError, match="4 levels; this codec decodes 1 to 3"):
        model.decode(torch.zeros(1, 5, 4, dtype=torch.int64))
