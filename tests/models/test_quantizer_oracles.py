"""Our quantizers against others' implementations of the same: vector-quantize-pytorch (EMA) and transformers' DAC."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from audiolm import rng
from audiolm.models.factorised import FactorisedVQ
from audiolm.models.rvq import ResidualVQ

Q, N, D = 3, 16, 8


def noise(*shape: int, index: int = 0) -> torch.Tensor:
    return torch.from_numpy(rng.generator(0, "test-oracle", index).standard_normal(shape).astype(np.float32))


def test_moving_average_codes_agree_with_vector_quantize_pytorch():
    library = pytest.importorskip("vector_quantize_pytorch", reason="the oracle vector-quantize-pytorch is not installed")
    decay, frames = 0.9, 2 * 50
    ours = ResidualVQ(D, Q, N, decay, dead_share=0.0)
    theirs = library.ResidualVQ(dim=D, num_quantizers=Q, codebook_size=N, decay=decay, rotation_trick=False, eps=1e-9)
    ours.initialise(noise(32 * N, D, index=1), seed=0, reduce=lambda x: x)
    for layer, codes_ND, share_N in zip(theirs.layers, ours.codebook_QND, ours.share_QN, strict=True):
        book = layer._codebook  # its state is kept in counts and sums
        book.embed.copy_(codes_ND[None])
        book.cluster_size.copy_(share_N[None] * frames)
        book.embed_avg.copy_((codes_ND * share_N[:, None] * frames)[None])
    theirs.train()
    for step in range(5):
        x_BTD = noise(2, 50, D, index=2 + step).requires_grad_()
        out = ours(x_BTD.transpose(1, 2))
        their_quantized_BTD, their_codes_BTQ, their_commitment_Q = theirs(x_BTD)
        assert torch.equal(out["codes_BTQ"], their_codes_BTQ)
        assert torch.allclose(out["quantized_BDT"].transpose(1, 2), their_quantized_BTD, atol=1e-5)
        assert out["commitment"].item() == pytest.approx(their_commitment_Q.sum().item(), rel=1e-5)
        gradient_BTD, = torch.autograd.grad(out["commitment"], x_BTD)
        # the library's residual passes no gradient to the next level, ours does: the first level's part is the same
        first, = torch.autograd.grad(their_commitment_Q[0], x_BTD)
        codes_BTD = torch.nn.functional.embedding(out["codes_BTQ"][..., 0], ours.codebook_QND[0])
        assert torch.allclose(first, 2 * (x_BTD - codes_BTD) / x_BTD.numel(), atol=1e-7)
        assert gradient_BTD.abs().sum() > first.abs().sum() / 2
        ours.update(x_BTD.detach().flatten(0, 1), out["codes_BTQ"].flatten(0, 1), seed=0, step=step, reduce=lambda x: x)
        for layer, codes_ND in zip(theirs.layers, ours.codebook_QND, strict=True):
            assert torch.allclose(layer._codebook.embed[0], codes_ND, atol=1e-4)


def test_factorised_codes_agree_with_the_dac_of_transformers():
    dac = pytest.importorskip("transformers.models.dac.modeling_dac", reason="the oracle transformers is not installed")
    from transformers import DacConfig

    torch.manual_seed(0)
    ours = FactorisedVQ(D, Q, N, code_dim=4, norm=False)
    theirs = dac.DacResidualVectorQuantizer(DacConfig(n_codebooks=Q, codebook_size=N, codebook_dim=4, hidden_size=D,
                                                     quantizer_dropout=0.0)).eval()
    with torch.no_grad():
        for level, layer in enumerate(theirs.quantizers):
            layer.codebook.weight.copy_(ours.codes_QNK[level])
            for mine, conv in ((ours.down[level], layer.in_proj), (ours.up[level], layer.out_proj)):
                conv.weight.copy_(mine.weight[..., None])
                conv.bias.copy_(mine.bias)
    x_BDT = noise(2, D, 40).requires_grad_()
    out = ours(x_BDT)
    made_BDT, codes_BQT, _, commitment_B, codebook_B = theirs(x_BDT)
    commitment, codebook = commitment_B.mean(), codebook_B.mean()  # the same number for each row
    assert torch.equal(out["codes_BTQ"], codes_BQT.transpose(1, 2))
    assert torch.allclose(out["quantized_BDT"], made_BDT, atol=1e-5)
    assert out["commitment"].item() == pytest.approx(commitment.item(), rel=1e-5)
    assert out["codebook"].item() == pytest.approx(codebook.item(), rel=1e-5)
    weight_BDT = noise(2, D, 40, index=9)
    mine, = torch.autograd.grad((out["quantized_BDT"] * weight_BDT).sum() + out["commitment"], x_BDT)
    other, = torch.autograd.grad((made_BDT * weight_BDT).sum() + commitment, x_BDT)
    assert torch.allclose(mine, other, atol=1e-5)
    assert torch.allclose(ours.decode(out["codes_BTQ"]), theirs.from_codes(codes_BQT)[0], atol=1e-5)
