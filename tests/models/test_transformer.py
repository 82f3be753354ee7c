"""The Transformer: cached = whole, no look-ahead, packed documents apart, on a CPU the same bits whatever the batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from audiolm.models.lm import attention
from audiolm.models.lm.attention import Documents, documents, flash_refusal, positions_of, takes_flash
from audiolm.models.lm.block import TransformerSizes
from audiolm.models.lm.transformer import Transformer
from audiolm.models.positions import RelativePositionBias, distance_buckets

VOCAB = 50
KINDS = {"rotary": {}, "t5": {"positions": "t5"}, "gated": {"gated": True},
         "llama": {"gated": True, "activation": "silu", "norm": "rms"}}


@pytest.fixture(scope="module", params=KINDS)
def model(request) -> Transformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Transformer(TransformerSizes(VOCAB, 32, 3, 4, 64, 0.1, **KINDS[request.param])).eval().requires_grad_(False)
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
            model.advance(prompts[r], cache.rows(b, b + 1))
        cache.longest = max(prompts[r].shape[1] for r in rows)
        return torch.stack([model.scores(model.advance(tail[rows, t:t + 1], cache)[:, 0], [0] * len(rows))
                            for t in range(70)], 1)

    batch = run([0, 1, 2, 3, 4])
    for r in range(5):
        assert torch.equal(run([r])[0], batch[r])


def test_unpadded_rows_change_rounding_alone(model, monkeypatch):
    rows, tail = [], ids(3, 6)
    hook = model.blocks[0].up.register_forward_hook(lambda m, args, out: rows.append(len(out)))

    def run() -> torch.Tensor:
        cache = model.cache(3, 6)
        return torch.stack([model.scores(model.advance(tail[:, t:t + 1], cache)[:, 0], [0] * 3) for t in range(6)])

    exact = run()
    assert set(rows) == {8}
    rows.clear()
    monkeypatch.setattr(model, "rows", 1)
    torch.testing.assert_close(run(), exact, atol=1e-5, rtol=1e-5)
    assert set(rows) == {3}
    hook.remove()


@torch.no_grad()
def test_scores_of_all_ids_hold_those_of_each_slot():
    model = Transformer(TransformerSizes(VOCAB, 32, 1, 4, 64, 0.0, slots=(11, 10, 10)))
    h_BD = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    model.head.bias = torch.arange(31.0)
    all_BV = model.scores(h_BD, None)
    assert all_BV.shape == (3, 31)
    for slot, part in enumerate(all_BV.split((11, 10, 10), 1)):
        torch.testing.assert_close(model.scores(h_BD, [slot] * 3)[:, :part.shape[1]], part)


def test_packed_documents_equal_documents_alone(model):
    parts = [ids(1, n, seed=n) for n in (7, 1, 20)]
    doc_BT = torch.cat([torch.full((1, p.shape[1]), i) for i, p in enumerate(parts)], 1)
    packed = model(torch.cat(parts, 1), documents(doc_BT))
    torch.testing.assert_close(packed, torch.cat([model(p) for p in parts], 1), atol=1e-5, rtol=1e-5)
    assert positions_of(doc_BT)[0].tolist() == [*range(7), 0, *range(20)]


def test_a_document_changes_no_other_and_nothing_before_it(model):
    doc_BT = torch.tensor([[0] * 9 + [1] * 6 + [2] * 15, [0] * 20 + [1] * 10])
    ids_BT = ids(2, 30)
    before = model(ids_BT, documents(doc_BT))
    other = ids_BT.clone()
    other[0, 11] = (other[0, 11] + 1) % VOCAB
    changed = (model(other, documents(doc_BT)) != before).any(-1)
    assert changed[0, 11:15].all() and not changed[0, :11].any() and not changed[0, 15:].any() and not changed[1].any()


def test_one_document_a_row_equals_plain(model):
    ids_BT = ids(2, 24)
    torch.testing.assert_close(model(ids_BT, documents(torch.zeros_like(ids_BT))), model(ids_BT), atol=1e-5, rtol=1e-5)


def test_starts_near_the_uniform_loss_at_any_depth_and_learns():
    torch.manual_seed(0)
    for layers in (1, 12):
        logits = Transformer(TransformerSizes(VOCAB, 32, layers, 4, 64, 0.0))(ids(4, 60))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids(4, 60)[:, 1:].flatten()).detach()
        assert abs(float(loss) - torch.log(torch.tensor(float(VOCAB)))) < 0.2
    model, row = Transformer(TransformerSizes(VOCAB, 32, 2, 4, 64, 0.1)), ids(2, 30)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = F.cross_entropy(model(row)[:, :-1].flatten(0, 1), row[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5


def test_bfloat16_keeps_positions_apart():
    torch.manual_seed(0)
    model = Transformer(TransformerSizes(VOCAB, 32, 2, 4, 64, 0.0)).eval().requires_grad_(False)
    ids_BT = ids(1, 600)
    exact = model(ids_BT)
    rounded = model.bfloat16()(ids_BT).float()
    assert (rounded[:, -100:] - exact[:, -100:]).abs().max() < 0.05 * exact.abs().max()


def test_clear_errors(model):
    with pytest.raises(ValueError, match="heads"):
        Transformer(TransformerSizes(VOCAB, 30, 1, 4, 64, 0.0))
    cache = model.cache(1, 64)
    model.advance(ids(1, 64), cache)
    with pytest.raises(ValueError, match="full"):
        model.advance(ids(1, 1), cache)


def test_buckets_are_t5s_at_every_distance():
    attention = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention
    distance = torch.arange(3000)
    theirs = attention._relative_position_bucket(-distance, bidirectional=False, num_buckets=32, max_distance=128)
    ours = distance_buckets()
    assert torch.equal(ours[distance.clamp(max=len(ours) - 1)], theirs)
    bias = RelativePositionBias(2)
    torch.nn.init.normal_(bias.table)
    assert torch.equal(bias.at(distance), bias.table[theirs])


def test_the_bias_is_the_tables_value_at_each_distance_and_learns():
    torch.manual_seed(0)
    bias = RelativePositionBias(3).double()  # so that no long sum rounds
    torch.nn.init.normal_(bias.table)
    i, j = torch.arange(200)[:, None], torch.arange(200)
    expected = bias.at(i - j).permute(2, 0, 1).masked_fill(j > i, -torch.inf)
    assert torch.equal(bias(200), expected)
    weight = torch.randn(3, 200, 200, dtype=torch.float64)
    grads = [torch.autograd.grad((b.masked_fill(j > i, 0) * weight).sum(), bias.table)[0] for b in (bias(200), expected)]
    torch.testing.assert_close(*grads)


def test_t5_counts_at_every_distance_a_stage_has():
    torch.manual_seed(0)
    model = Transformer(TransformerSizes(VOCAB, 32, 1, 4, 64, 0.0, positions="t5")).requires_grad_(False)
    before = model(ids(1, 300))[0, -1]
    model.bias.table[-1] += 3.0  # of the most distant tokens alone
    assert (model(ids(1, 300))[0, -1] - before).abs().max() > 1e-5
    with pytest.raises(ValueError, match="dense"):
        model(ids(1, 300), documents(torch.zeros(1, 300, dtype=torch.int64), flash=True))


def training_pass(model: Transformer, seed: int = 0, flash: bool = False) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """nats of a packed batch, dropout included, and all gradients."""
    doc_BT = torch.tensor([[0] * 9 + [1] * 6 + [2] * 15, [0] * 20 + [1] * 10])
    index_SN, label_SN = torch.arange(40).view(1, 40), ids(1, 40)
    torch.manual_seed(seed)
    nats = model(ids(2, 30), documents(doc_BT, flash), index_SN, label_SN)
    nats.sum().backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    return nats.detach(), grads


@pytest.mark.parametrize("kind", ["rotary", "t5"])
def test_checkpointing_and_compilation_change_nothing(kind):
    torch.manual_seed(0)
    model = Transformer(TransformerSizes(VOCAB, 32, 1, 4, 64, 0.1, gated=True, **KINDS[kind])).train()
    plain = training_pass(model)
    model.checkpointing = True
    again = training_pass(model)
    assert torch.equal(plain[0], again[0]) and all(map(torch.equal, plain[1], again[1]))
    for block in model.blocks:
        block.dropout = 0.0
    model.dropout = 0.0
    plain = training_pass(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_training("aot_eager")
    compiled = training_pass(model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 and not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(plain, compiled, atol=1e-6, rtol=1e-5)


def test_the_flash_path_has_shapes_and_gradients():
    """Without a GPU no more can be seen: on the meta device operators compute shapes alone."""
    doc_BT = torch.tensor([[0] * 5 + [1] * 7 + [2] * 4, [0] * 10 + [1] * 6])
    docs = documents(doc_BT, flash=True)
    assert docs.bounds_N.tolist() == [0, 5, 12, 16, 26] + [32] * 4
    model = Transformer(TransformerSizes(VOCAB, 64, 2, 4, 64, 0.0)).to("meta").bfloat16()
    wanted = torch.zeros(1, 8, dtype=torch.int64, device="meta")
    docs = Documents(docs.positions_BT.to("meta"), None, docs.bounds_N.to("meta"))
    model(doc_BT.to("meta"), docs, wanted, wanted).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_documents_one_by_one_equal_dense_attention():
    """The CPU's way with bounds: the same losses and gradients up to rounding."""
    torch.manual_seed(0)
    model = Transformer(TransformerSizes(VOCAB, 32, 2, 4, 64, 0.1)).train()
    torch.testing.assert_close(training_pass(model, flash=True), training_pass(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("each, rows, room", [(1, 1, 4), (4, 1, 4), (5, 1, 8), (1, 6, 24), (4, 6, 24), (5, 6, 48), (64, 1, 64)])
def test_bounds_have_one_of_few_lengths(each, rows, room):
    doc_BT = (torch.arange(64) * each // 64).expand(rows, -1)
    bounds_N = documents(doc_BT, flash=True).bounds_N
    assert len(bounds_N) == room + 1 and bounds_N.dtype == torch.int32 and bounds_N.is_contiguous()
    assert bounds_N.diff().count_nonzero() == each * rows and bounds_N[0] == 0 and bounds_N[-1] == 64 * rows


@pytest.mark.parametrize("dtype, width, changed, why", [
    (torch.float32, 64, {}, "train.dtype"), (torch.bfloat16, 60, {}, "multiple of 8"), (torch.bfloat16, 264, {}, "at most 256"),
    (torch.bfloat16, 64, {"FLASH": "_no_such_operator"}, "_no_such_operator"),
    (torch.bfloat16, 64, {"ARGUMENTS": ["query", "value", "key"]}, "query, value, key"),
    (torch.bfloat16, 64, {"ARGUMENTS": ["query", "key", "value"]}, "query, key, value")])  # cum_seq_q has no default
def test_dense_attention_where_flash_does_not_fit(dtype, width, changed, why, monkeypatch, caplog):
    device = torch.device("meta")  # as on a GPU, but for the kernels
    assert takes_flash(device, torch.bfloat16, 64) and takes_flash(torch.device("cpu"), torch.float32, 60)
    for name, value in changed.items():
        monkeypatch.setattr(attention, name, value)
    attention._warn.cache_clear()
    assert not takes_flash(device, dtype, width) and not takes_flash(device, dtype, width)
    (said,) = caplog.messages
    assert why in said


def test_dense_attention_where_a_device_has_no_kernel(monkeypatch):
    assert flash_refusal(torch.device("meta"), torch.bfloat16, 64) is None
    # a build that has the operator and no kernel: torch's own for the CPU
    assert "_flash_attention_forward" in attention._trial(torch.device("cpu"), torch.bfloat16, 64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention needs a GPU")
def test_flash_equals_dense_attention():
    torch.manual_seed(0)
    model = Transformer(TransformerSizes(VOCAB, 128, 2, 2, 256, 0.0)).cuda().requires_grad_(False)
    doc_BT = torch.tensor([[0] * 300 + [1] * 100 + [2] * 112, [0] * 512])
    ids_BT = ids(2, 512).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        one, two = (model(ids_BT, Documents(*(x if x is None else x.cuda() for x in documents(doc_BT, flash))))
                    for flash in (False, True))
    torch.testing.assert_close(one, two, atol=0.02, rtol=0.02)


def test_flops_of_the_papers_model():
    with torch.device("meta"):
        model = Transformer(TransformerSizes(1027, 1024, 12, 16, 4096, 0.1, slots=[1025]))
    assert model.flops_per_token(768) == pytest.approx(6 * (12 * 12 * 1024**2 + 1025 * 1024) + 6 * 12 * 1024 * 768)
