"""The bfloat16 residual stream of a GPU, on the CPU: its types, and how far losses and gradients are from float32's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from audiolm.models import stream
from audiolm.models.conformer import EncoderSizes, MaskedModel
from audiolm.models.lm.attention import documents
from audiolm.models.lm.block import TransformerSizes
from audiolm.models.lm.depth import DepthSizes
from audiolm.models.lm.frame_transformer import FrameSizes, FrameTransformer
from audiolm.models.lm.parallel_decoder import ParallelDecoder, ParallelSizes
from audiolm.models.lm.transformer import Transformer

VOCAB, CODES, D, T = 50, 16, 64, 40
DOC_BT = (torch.arange(T) * 3 // T).expand(2, T)


def targets(slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(2 * T - 2).repeat(slots, 1), torch.randint(0, CODES, (slots, 2 * T - 2))


def flat(norm: str = "layer"):
    model = Transformer(TransformerSizes(VOCAB, D, 4, 4, 4 * D, 0.0, norm=norm, run=CODES))
    ids_BT, length_BT = torch.randint(0, VOCAB, (2, T)), torch.randint(0, CODES, (2, T))
    return model, (ids_BT, documents(DOC_BT), *targets(2), None, length_BT)


def frame():
    backbone, depth = TransformerSizes(VOCAB, D, 4, 4, 4 * D, 0.0, slots=[]), DepthSizes(D, 3, CODES, D // 2, 2, D, 0.0)
    ids_BT, cond_BTC = torch.randint(0, VOCAB, (2, T)), torch.randint(0, VOCAB, (2, T, 3))
    return FrameTransformer(FrameSizes(backbone, depth)), (ids_BT, documents(DOC_BT), *targets(3), cond_BTC)


def parallel():
    return ParallelDecoder(ParallelSizes(6, CODES, 4, D, 4, 4, 2 * D, 3, 0.0)), (
        torch.randint(0, 70, (2, T, 5)), DOC_BT, *targets(4))


def conformer():
    model = MaskedModel(EncoderSizes(D, 4, 4, 2 * D, n_mels=20), CODES, 0)
    return model, (torch.randn(2, 4 * T, 20), torch.tensor([T, T - 9]), torch.rand(2, T) < 0.4)


MODELS = {"flat": flat, "rms": lambda: flat("rms"), "frame": frame, "parallel": parallel, "conformer": conformer}


def trained_on(model: nn.Module, inputs: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and all gradients."""
    out = model(*inputs)
    loss = F.cross_entropy(out.float().flatten(0, 1), torch.arange(2 * T) % CODES) if out.ndim == 3 else out.mean()
    loss.backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return loss.detach(), grads


@pytest.fixture(params=MODELS)
def case(request):
    torch.manual_seed(0)
    return MODELS[request.param]()


def test_losses_and_gradients_stay_near_those_of_float32(case, monkeypatch):
    """Of the gradients autocast alone is 0.4 to 1.0 % off here, with the stream 0.8 to 1.4 %."""
    model, inputs = case
    exact, exact_grads = trained_on(model, inputs)
    monkeypatch.setattr(stream, "DEVICES", {"cpu"})
    with torch.autocast("cpu", torch.bfloat16):
        loss, grads = trained_on(model, inputs)
    assert loss.dtype == grads.dtype == torch.float32
    assert abs(loss / exact - 1) < 5e-4
    assert (grads - exact_grads).norm() < 0.02 * exact_grads.norm()
    assert abs(grads.norm() / exact_grads.norm() - 1) < 5e-3


def test_all_norms_take_and_give_the_streams_type(case, monkeypatch):
    model, inputs = case
    monkeypatch.setattr(stream, "DEVICES", {"cpu"})
    norms, types = [part for part in model.modules() if isinstance(part, nn.LayerNorm | nn.RMSNorm)], []
    for part in norms:
        assert isinstance(part, stream.LayerNorm | stream.RMSNorm)  # a GPU's autocast makes torch's own float32
        part.register_forward_hook(lambda _, args, out: types.append((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        trained_on(model, inputs)
    assert len(types) >= len(norms) > 5 and {*types} == {(torch.bfloat16, torch.bfloat16)}
    types.clear()
    trained_on(model, inputs)  # without autocast there is no such stream
    assert {*types} == {(torch.float32, torch.float32)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own, theirs", [(stream.LayerNorm, nn.LayerNorm), (stream.RMSNorm, nn.RMSNorm)])
def test_on_other_devices_norms_are_torchs(own, theirs, dtype):
    torch.manual_seed(0)
    own, theirs, x = own(64), theirs(64), torch.randn(8, 64, dtype=dtype)
    nn.init.normal_(own.weight)
    theirs.load_state_dict(own.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        a, b = own(x), theirs(x)
        assert torch.equal(a, b) and a.dtype == b.dtype and stream.to_stream(x) is x


def test_the_stream_compiles_into_one_graph(monkeypatch):
    torch.manual_seed(0)
    model, inputs = flat()
    monkeypatch.setattr(stream, "DEVICES", {"cpu"})
    with torch.autocast("cpu", torch.bfloat16):
        plain = trained_on(model, inputs)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model.compile_training("aot_eager")
        compiled = trained_on(model, inputs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 and not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(compiled[0], plain[0], atol=1e-4, rtol=1e-4)
    assert (compiled[1] - plain[1]).norm() < 0.01 * plain[1].norm()
