"""Tables tied to code vectors: scores are log-densities around a predicted vector, folding changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from audiolm.config import lm, training
from audiolm.lm.loss import batch_sums
from audiolm.lm.model import build_lm, export_lm, load_lm
from audiolm.lm.pack_rows import pack_rows
from audiolm.lm.stages import Stage
from audiolm.models.lm.tied import SCALE_GAIN, TiedCodes
from audiolm.tokenizers.artifact import write_export
from audiolm.tokenizers.base import TokenSpec, code_vectors

K, VOCAB = 6, 9
STAGES = {"coarse": Stage("coarse", K, VOCAB, (0, 3), 3, True, 2.0), "fine": Stage("fine", 0, VOCAB, (1, 3), 1, True, 2.0)}
SHAPE = lm.StageConfig(crop_s=2.0, dim=32, layers=2, heads=2, ff=64, dropout=0.0,
                       train=training.TrainConfig(steps=1, batch=1, lr=1e-3))


def codes() -> torch.Tensor:
    return torch.randn(3, VOCAB, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 1.0, 0.3])[:, None, None]


def test_a_head_is_a_density_around_a_predicted_vector():
    torch.manual_seed(0)
    tied = TiedCodes(3, VOCAB, 5, 2, 16)
    tied.set_codes(codes())
    h_D = torch.randn(16)
    scales, mus = (SCALE_GAIN * tied.scale_S).exp(), tied.mu_SED.transpose(1, 2)
    for (weight, bias), own, mu_ED, scale in zip(tied.heads(), codes()[1:], mus, scales, strict=True):
        expected = (-scale / 2 * (own - h_D @ mu_ED).square().sum(1)).log_softmax(0)
        torch.testing.assert_close((weight @ h_D + bias).log_softmax(0), expected)
    with pytest.raises(ValueError, match=r"code vectors of shape \(2, 9, 5\), the stage reads \(3, 9, 5\)"):
        tied.set_codes(codes()[:2])


@pytest.mark.parametrize("name", list(STAGES))
def test_a_loaded_stage_has_plain_tables_and_the_same_losses(name, tmp_path):
    torch.manual_seed(0)
    stage, draw = STAGES[name], np.random.default_rng(0)
    model = build_lm(stage, SHAPE, codes()).eval()
    rows = [[stage.pack(draw.integers(0, K, n), draw.integers(0, VOCAB, (2 * n, 3)), True)] for n in (4, 7)]
    batch = pack_rows(stage, rows, max(len(row[0].ids) for row in rows))
    with torch.no_grad():  # free terms count too
        model.embed.weight.add_(0.1 * torch.randn_like(model.embed.weight))
        model.head.weight.add_(0.1 * torch.randn_like(model.head.weight))
    write_export(str(tmp_path), *export_lm(model, stage))
    loaded, _ = load_lm(str(tmp_path))
    assert loaded.tied is None and model.tied is not None
    with torch.no_grad():
        ours, theirs = (batch_sums(m, stage, batch, "cpu") for m in (model, loaded))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)
    assert loaded.bfloat16().head.bias.dtype == torch.float32


def test_a_code_vector_is_what_the_code_adds():
    books, spec = codes(), TokenSpec("x", 16_000, 320, 3, VOCAB)

    def latents(codes_BTQ: torch.Tensor) -> torch.Tensor:
        return sum(books[q][codes_BTQ[..., q]] for q in range(codes_BTQ.shape[2])).transpose(1, 2)

    torch.testing.assert_close(code_vectors(latents, spec), books)
