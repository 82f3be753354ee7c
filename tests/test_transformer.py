"""The Transformer: cached = whole, no look-ahead, packed documents apart, on a CPU the same bits whatever the batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from audiolm.models.attention import documents, positions_of
from audiolm.models.positions import BUCKETS, buckets
from audiolm.models.transformer import Transformer

VOCAB = 50
KINDS = {"rotary": {}, "t5": {"positions": "t5", "longest": 100}, "gated": {"gated": True},
         "llama": {"gated": True, "activation": "silu", "norm": "rms"}}


@pytest.fixture(scope="module", params=KINDS)
def model(request) -> Transformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Transformer(VOCAB, 32, 3, 4, 64, 0.1, **KINDS[request.param]).eval().requires_grad_(False)
        for p in model.parameters():  # as sure of itself as a trained one, so that differences would show
            if p.ndim == 2:
                p.mul_(3.0)
        if model.bias:
            model.bias.table.normal_()
    return model


def step(model: Transformer, ids_Bt: torch.Tensor, cache) -> torch.Tensor:
    return F.linear(model.advance(ids_Bt, cache), model.head.weight)


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_no_position_looks_ahead(model):
    ids_BT = ids(2, 40)
    other = ids_BT.clone()
    other[:, 25:] = (other[:, 25:] + 1) % VOCAB
    one, two = model(ids_BT), model(other)
    torch.testing.assert_close(one[:, :25], two[:, :25], atol=0, rtol=0)
    assert (one[:, 25:] - two[:, 25:]).abs().amax(-1).min() > 1e-3


def test_every_earlier_position_is_seen_and_order_counts(model):
    ids_BT = ids(1, 30)
    last = model(ids_BT)[:, -1]
    for t in range(29):
        other = ids_BT.clone()
        other[:, t] = (other[:, t] + 1) % VOCAB
        assert (model(other)[:, -1] - last).abs().max() > 1e-5, t
    swapped = ids_BT.clone()
    swapped[:, [3, 11]] = swapped[:, [11, 3]]
    assert (model(swapped)[:, -1] - last).abs().max() > 1e-5


@pytest.mark.parametrize("pieces", [[90], [1] * 90, [37, 1, 1, 20, 1, 30], [64, 26], [1, 89]])
def test_cached_steps_equal_the_whole(model, pieces):
    ids_BT = ids(3, 90)
    cache, out, at = model.cache(3, 90), [], 0
    for t in pieces:
        out.append(step(model, ids_BT[:, at:at + t], cache))
        at += t
    torch.testing.assert_close(torch.cat(out, 1), model(ids_BT), atol=5e-5, rtol=1e-5)


def test_rows_of_different_lengths_share_a_cache(model):
    lengths = [5, 17, 70]
    rows = [ids(1, n + 10, seed=n) for n in lengths]
    padded = torch.zeros(3, max(lengths), dtype=torch.int64)
    for b, n in enumerate(lengths):
        padded[b, :n] = rows[b][0, :n]
    cache = model.cache(3, max(lengths) + 10)
    model.advance(padded, cache)
    cache.truncate(torch.tensor(lengths), max(lengths))
    tails = torch.stack([r[0, n:] for r, n in zip(rows, lengths, strict=True)])
    stepped = torch.cat([step(model, tails[:, t:t + 1], cache) for t in range(10)], 1)
    for b, n in enumerate(lengths):
        torch.testing.assert_close(stepped[b], model(rows[b])[0, n:], atol=1e-5, rtol=1e-5)


def test_a_row_has_the_same_bits_in_any_batch(model):
    prompts, tail = [ids(1, n, seed=n) for n in (3, 66, 21, 40, 9)], ids(5, 70, seed=1)

    def run(rows: list[int]) -> torch.Tensor:
        cache = model.cache(len(rows), 140)
        for b, r in enumerate(rows):
            model.advance(prompts[r], cache.row(b))
        cache.longest = max(prompts[r].shape[1] for r in rows)
        return torch.stack([model.scores(model.advance(tail[rows, t:t + 1], cache)[:, 0], [0] * len(rows))
                            for t in range(70)], 1)

    batch = run([0, 1, 2, 3, 4])
    for r in range(5):
        assert torch.equal(run([r])[0], batch[r])


def test_packed_documents_equal_documents_alone(model):
    parts = [ids(1, n, seed=n) for n in (7, 1, 20)]
    doc_BT = torch.cat([torch.full((1, p.shape[1]), i) for i, p in enumerate(parts)], 1)
    packed = model(torch.cat(parts, 1), documents(doc_BT))
    torch.testing.assert_close(packed, torch.cat([model(p) for p in parts], 1), atol=1e-5, rtol=1e-5)
    assert positions_of(doc_BT)[0].tolist() == [*range(7), 0, *range(20)]


def test_one_document_a_row_equals_plain(model):
    ids_BT = ids(2, 24)
    torch.testing.assert_close(model(ids_BT, documents(torch.zeros_like(ids_BT))), model(ids_BT), atol=1e-5, rtol=1e-5)


def test_starts_near_the_uniform_loss_at_any_depth_and_learns():
    torch.manual_seed(0)
    for layers in (1, 12):
        logits = Transformer(VOCAB, 32, layers, 4, 64, 0.0)(ids(4, 60))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids(4, 60)[:, 1:].flatten()).detach()
        assert abs(float(loss) - torch.log(torch.tensor(float(VOCAB)))) < 0.2
    model, row = Transformer(VOCAB, 32, 2, 4, 64, 0.1), ids(2, 30)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = F.cross_entropy(model(row)[:, :-1].flatten(0, 1), row[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5


def test_bfloat16_keeps_positions_apart():
    torch.manual_seed(0)
    model = Transformer(VOCAB, 32, 2, 4, 64, 0.0).eval().requires_grad_(False)
    ids_BT = ids(1, 600)
    exact = model(ids_BT)
    rounded = model.bfloat16()(ids_BT).float()
    assert (rounded[:, -100:] - exact[:, -100:]).abs().max() < 0.05 * exact.abs().max()


def test_clear_errors(model):
    with pytest.raises(ValueError, match="heads"):
        Transformer(VOCAB, 30, 1, 4, 64, 0.0)
    cache = model.cache(1, 64)
    model.advance(ids(1, 64), cache)
    with pytest.raises(ValueError, match="full"):
        model.advance(ids(1, 1), cache)
    with pytest.raises(ValueError, match="longest"):
        Transformer(VOCAB, 32, 1, 4, 64, 0.0, positions="t5")
