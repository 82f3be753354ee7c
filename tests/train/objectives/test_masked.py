"""The masked model: frame counts, padding, gradients, masks, targets, learning, two ranks' arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from audiolm import rng
from audiolm.config.semantic import AugmentConfig, MaskedModelConfig
from audiolm.config.training import TrainConfig
from audiolm.models.conformer import Encoder, EncoderSizes, MaskedModel
from audiolm.models.mel import log_mel, warp_matrix
from audiolm.models.semitones import KEYS
from audiolm.tokenizers.base import padded_samples
from audiolm.tokenizers.extractor import extractor_mel
from audiolm.tokenizers.semantic import extractor_from_export
from audiolm.train.engine import make_engine
from audiolm.train.objectives import masked as om
from audiolm.train.objectives import masked_inputs
from audiolm.train.objectives.base import Context
from audiolm.train.objectives.masked_inputs import MaskedInputs
from audiolm.train.objectives.mfcc_targets import target_features
from tests.worlds.syllables import CTX, RATE, Crops, syllables, tones

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = EncoderSizes(dim=32, layers=2, heads=2, ff=48)


@pytest.fixture(scope="module")
def model() -> MaskedModel:
    torch.manual_seed(0)
    return MaskedModel(SIZES, targets_k=12).eval()


def objective(k: int = 12, ctx: Context = CTX, dropout: float = 0.0,
              augment: AugmentConfig | None = None) -> om.MaskedObjective:
    torch.manual_seed(0)
    model = MaskedModel(EncoderSizes(32, 2, 2, 48, 5, dropout), k)
    points = []
    for i in range(6):
        mel_BTF, frames_B = extractor_mel(syllables(i, 3.0)[None], torch.tensor([3 * RATE]))
        points.append(target_features(mel_BTF, frames_B)[0])
    model.targets.codebook.copy_(om.kmeans.fit(points, k, 0).centroids)
    model.encoder.statistics.mean.fill_(-6.0)
    model.encoder.statistics.std.fill_(3.0)
    train = TrainConfig(steps=80, batch=4, lr=3e-3, engine="torch", warmup_steps=5)
    still = AugmentConfig(pitch=0, noise=0, reverb=0)
    sizes = MaskedModelConfig(objective="hubert", dim=32, layers=2, heads=2, ff=48, targets_k=k, mask_share=0.55,
                              augment=augment or still, train=train)
    held = {i: syllables(9000 + i, 2.0) for i in range(3)}
    return om.MaskedObjective(model, MaskedInputs(sizes, Crops(), held, ctx.seed), ctx)


def test_every_length_gives_whole_frames():
    for n in range(1, 2001):
        assert log_mel(torch.zeros(1, padded_samples(n))).shape[1] == 4 * math.ceil(n / 640)
    encoder = Encoder(EncoderSizes(8, 1, 1, 8))
    for frames in range(1, 40):
        assert encoder(torch.zeros(1, 4 * frames, 80), torch.tensor([frames])).shape == (1, frames, 8)


def test_a_row_is_the_same_alone_and_padded_in_a_batch(model):
    wavs = [syllables(i, s) for i, s in enumerate((0.03, 0.5, 1.234, 2.0))]
    wav_BT = torch.full((4, 40_000), 0.7)  # what lies beyond a row's length must not matter
    for row, wav in zip(wav_BT, wavs, strict=True):
        row[:len(wav)] = wav
    lengths_B = torch.tensor([len(w) for w in wavs])
    together_BTD = model.features(*extractor_mel(wav_BT, lengths_B), 2)
    for i, wav in enumerate(wavs):
        alone_BTD = model.features(*extractor_mel(wav[None], lengths_B[i:i + 1]), 2)
        assert alone_BTD.shape[1] == math.ceil(len(wav) / 640)
        assert (together_BTD[i, :alone_BTD.shape[1]] - alone_BTD[0]).abs().max() < 1e-5


def test_a_click_moves_the_frame_it_lies_in(model):
    quiet = torch.zeros(1, 25 * 640)
    encoder = Encoder(EncoderSizes(32, 1, 2, 48, conv_kernel=1))
    for frame in (3, 11, 20):
        click = quiet.clone()
        click[0, frame * 640 + 320] = 1.0
        change = (log_mel(click) - log_mel(quiet)).abs()
        with_click, without = (encoder.subsample(log_mel(w), torch.tensor([25])) for w in (click, quiet))
        assert change.sum(-1)[0].argmax() // 4 == frame
        assert abs(int((with_click - without).norm(dim=-1)[0].argmax()) - frame) <= 1


def test_layers_are_counted_from_one_and_bad_ones_refused(model):
    mel_BTF, frames_B = extractor_mel(syllables(1, 1.0)[None], torch.tensor([RATE]))
    assert torch.equal(model.head(model.features(mel_BTF, frames_B, 2)), model(mel_BTF, frames_B))
    assert not torch.equal(model.features(mel_BTF, frames_B, 1), model.features(mel_BTF, frames_B, 2))
    for layer in (0, 3):
        with pytest.raises(ValueError, match="counted from 1"):
            model.features(mel_BTF, frames_B, layer)
    with pytest.raises(ValueError, match="multiple of 4"):
        model(mel_BTF[:, :-1], frames_B)
    with pytest.raises(ValueError, match=r"heads \(3\)"):
        Encoder(EncoderSizes(32, 1, 3, 8))


def test_casting_keeps_statistics_in_float32(model):
    cast = MaskedModel(SIZES, 12)
    cast.encoder.statistics.mean.fill_(-6.123456)
    cast.bfloat16()
    assert cast.encoder.statistics.mean[0] == torch.tensor(-6.123456) and cast.targets.codebook.dtype == torch.float32
    assert cast(torch.zeros(1, 8, 80), torch.tensor([2])).dtype == torch.bfloat16


def test_masked_frames_are_hidden_from_the_model(model):
    """With the convolutions' reach inside the mask, what lies under it cannot change the prediction there."""
    mask_BT = torch.zeros(1, 25, dtype=torch.bool)
    mask_BT[0, 5:20] = True
    mel_BTF, frames_B = extractor_mel(syllables(1, 1.0)[None], torch.tensor([RATE]))
    changed = mel_BTF.clone()
    changed[:, 4 * 7:4 * 18] += 2.0
    assert torch.equal(model(mel_BTF, frames_B, mask_BT), model(changed, frames_B, mask_BT))
    assert not torch.allclose(model(mel_BTF, frames_B), model(changed, frames_B))


@pytest.mark.parametrize(("frames", "share"), [(1, 0.5), (7, 0.5), (25, 0.55), (375, 0.65), (375, 0.95)])
def test_span_masks_have_the_asked_share_in_spans(frames, share):
    masks = [masked_inputs.span_mask(frames, 10, share, rng.generator(1, "mask", 0, row)) for row in range(20)]
    assert {int(m.sum()) for m in masks} == {max(1, round(share * frames))}
    assert all(np.array_equal(m, masked_inputs.span_mask(frames, 10, share, rng.generator(1, "mask", 0, r)))
               for r, m in enumerate(masks))
    if frames == 375:
        runs = [len(r) for m in masks for r in "".join("x" if b else " " for b in m).split()]
        assert np.mean(runs) >= 10 * 0.8
        assert len({m.tobytes() for m in masks}) == 20


def test_targets_do_not_see_padding_or_level():
    a, b = syllables(1, 1.5), syllables(2, 0.8)
    wav_BT = torch.zeros(2, 24_000)
    wav_BT[0], wav_BT[1, :len(b)] = a, b
    mel_BTF, frames_B = extractor_mel(wav_BT, torch.tensor([len(a), len(b)]))
    together = target_features(mel_BTF, frames_B)
    alone = target_features(*extractor_mel(b[None], torch.tensor([len(b)])))
    assert together.shape == (2, 38, 39)
    assert (together[1, :20] - alone[0]).abs().max() < 1e-4
    assert abs(float(alone.mean())) < 1e-3 and 0.3 < float(alone.std()) < 1.1


def test_targets_by_warp_are_shared_by_voices_of_other_formants():
    """The same syllables with all frequencies scaled: `targets_cents` gives the targets of the voice that was fitted."""
    points = [extractor_mel(syllables(i, 3.0)[None], torch.tensor([3 * RATE])) for i in range(6)]

    def agreement(cents: float) -> float:
        o = objective()
        o.inputs.sizes = sizes = o.inputs.sizes.model_copy(update={"targets_cents": cents})
        om.fit_targets(o.model, om.target_points(sizes, points), 0)
        same = [o._first_targets(None, mel_BTF, frames_B) == o._first_targets(None, mel_BTF @ warp_matrix(2 ** 0.375), frames_B)
                for mel_BTF, frames_B in points]
        return float(torch.cat(same).float().mean())

    shares = agreement(600.0), agreement(0.0)
    assert shares[0] > 0.7 > 0.5 > shares[1], shares


def test_a_masked_model_of_semitones_learns_and_its_export_hears_them():
    o = objective()
    o.inputs.sizes = sizes = o.inputs.sizes.model_copy(update={"spectrum": "semitones"})
    encoder = masked_inputs.encoder_sizes(sizes)
    o.modules["model"] = model = MaskedModel(encoder, 12, KEYS)
    sample = [extractor_mel(tones([60 + i]), torch.tensor([RATE]), encoder.spectrum) for i in range(12)]
    masked_inputs.measure_inputs(model.encoder, sample)
    assert om.fit_targets(o.model, om.target_points(sizes, sample), 0) > 1.5  # nats of 12 keys: 2.48
    assert o._loss(model, o.load(0, [0, 1]))[0].isfinite()
    weights, about = o.export()
    again = extractor_from_export(about, {name.removeprefix("encoder."): value for name, value in weights.items()})
    wav_1T = tones([60, 67])
    expected = model.eval().features(*extractor_mel(wav_1T, torch.tensor([RATE]), "semitones"), 2)
    assert torch.equal(again.features(wav_1T, torch.tensor([RATE]), [2])[0][0], expected)


def test_every_parameter_gets_a_gradient():
    o = objective()
    loss, _ = o._loss(o.model, o.load(0, [0, 1]))
    loss.backward()
    dead = [n for n, p in o.model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


def test_masked_loss_falls_and_accuracy_beats_chance():
    o = objective(dropout=0.1)
    engines = {"model": make_engine(o.model, o.inputs.sizes.train, CTX)}
    before = o.evaluate()
    again = o.evaluate()  # no randomness, and a constant loss rings
    assert again == before | {"alarm/constant_loss": 1.0} and before["alarm/no_better_than_guessing"] == 1.0
    for step in range(80):
        result = o.train_step(engines, [o.load(step, range(4))], step)
    after = o.evaluate()
    assert after["loss"] < after["target_entropy"] < before["loss"]  # better than any guess that ignores the context
    assert after["accuracy"] > 4 / 12 and not any(v for name, v in after.items() if name.startswith("alarm/"))
    assert {"loss", "accuracy", "target_entropy", "prediction_perplexity", "units", "grad_norm"} <= set(result)
    assert 1.0 < float(result["prediction_perplexity"]) <= 12.0
    assert float(result["units"]) == pytest.approx(float(o.load(79, range(4)).lengths_B.sum()) / RATE)


@pytest.mark.parametrize("unmasked", [0.0, 0.5])
def test_micro_batches_do_not_change_the_step(unmasked):
    """Rows of unequal length: every masked frame weighs the same however the rows are dealt out, and every other one too."""
    whole, cut = objective(), objective()
    for o in (whole, cut):
        o.inputs.sizes = o.inputs.sizes.model_copy(update={"unmasked": unmasked})
    norms = []
    for o, batches in ((whole, [whole.load(3, range(4))]), (cut, [cut.load(3, [0]), cut.load(3, [1, 2, 3])])):
        norms.append(o.train_step({"model": make_engine(o.model, o.inputs.sizes.train, CTX)}, batches, 3))
    assert float(norms[0]["loss"]) == pytest.approx(float(norms[1]["loss"]), rel=1e-6)
    assert float(norms[0]["grad_norm"]) == pytest.approx(float(norms[1]["grad_norm"]), rel=1e-4)


def test_two_ranks_average_to_one_ranks_gradient(monkeypatch):
    whole, split = objective(), objective(ctx=Context(0, 2, torch.device("cpu"), seed=5))
    loss, _ = whole._loss(whole.model, whole.load(3, range(4)))
    (loss / whole.load(3, range(4)).mask_BT.sum()).backward()
    total = float(whole.load(3, range(4)).mask_BT.sum())

    class Averaging:  # what an engine over two ranks does, one rank after the other
        def __init__(self, module):
            self.module = module

        def __call__(self, *args):
            return self.module(*args)

        def backward(self, loss):
            (loss / 2).backward()

        def step(self):
            return 0.0

    everything = torch.tensor([total, 4 * 50.0])
    monkeypatch.setattr(om, "all_sum", lambda x: everything if x.shape == (2,) else x)
    for rows in ([0, 1], [2, 3]):
        split.train_step({"model": Averaging(split.model)}, [split.load(3, rows)], 3)
    for (name, a), (_, b) in zip(whole.model.named_parameters(), split.model.named_parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name


def test_empty_or_constant_targets_are_refused():
    with pytest.raises(ValueError, match="empty"):
        om.check_targets(torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="all but constant.*1 of 5 in use.*lower semantic.model.targets_k"):
        om.check_targets(torch.tensor([90, 0, 0, 0, 0]))
    assert om.check_targets(torch.tensor([9, 9, 9, 9, 9])) == pytest.approx(math.log(5))


def test_frames_that_are_seen_count_only_where_asked():
    """Without a weight on them, what is predicted where nothing is hidden earns nothing: no gradient comes from there."""
    o = objective()
    batch = o.load(0, range(4))
    shown = batch.mask_BT.clone()

    def gradient_on_seen_frames(unmasked: float) -> float:
        o.inputs.sizes = o.inputs.sizes.model_copy(update={"unmasked": unmasked})
        kept = {}

        def model(*args):
            kept["logits"] = o.model(*args)
            kept["logits"].retain_grad()
            return kept["logits"]

        o._loss(model, batch, unmasked)[0].backward()
        return float(kept["logits"].grad[~shown].abs().sum())

    assert gradient_on_seen_frames(0.0) == 0.0 < gradient_on_seen_frames(0.5)


def test_a_collapsed_model_and_constant_targets_ring():
    o = objective()
    with torch.no_grad():
        o.model.head.weight.zero_()
        o.model.head.bias.copy_(torch.tensor([20.0] + [0.0] * 11))
    rings = o.evaluate()
    assert rings["alarm/constant_predictions"] == rings["alarm/no_better_than_guessing"] == 1.0
    assert rings["alarm/constant_targets"] == 0.0
    o.targets = lambda batch, mel_BTF, frames_B: torch.zeros(batch.mask_BT.shape, dtype=torch.int64)
    assert o.evaluate()["alarm/constant_targets"] == 1.0


def test_targets_come_from_clean_audio_and_the_input_is_augmented():
    o, seen = objective(augment=AugmentConfig(pitch=1, noise=1, reverb=1)), []
    batch = o.load(0, range(4))
    targets = o.targets
    o.targets = lambda batch, mel_BTF, frames_B: seen.append(mel_BTF) or targets(batch, mel_BTF, frames_B)
    o._loss(lambda mel_BTF, *rest: seen.append(mel_BTF) or o.model(mel_BTF, *rest), batch)
    clean_BTF, frames_B = extractor_mel(batch.wav_BT, batch.lengths_B)
    assert torch.equal(seen[0], clean_BTF) and (seen[1] - clean_BTF).abs().mean() > 0.1
    again = objective(augment=AugmentConfig(pitch=1, noise=1, reverb=1)).load(0, [2, 3])
    assert again.draws == batch.draws[2:]  # a row's own draw, whoever loads it


def test_full_rows_are_attended_to_without_a_mask(monkeypatch):
    o, masks = objective(), []
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *qkv, attn_mask: masks.append(attn_mask) or attention(*qkv, attn_mask=attn_mask))
    full, padded = o.load(0, [0, 3]), o.load(0, [0, 1])
    assert full.full and not padded.full
    loss, _ = o._loss(o.model, full)
    assert masks == [None] * 2
    o._loss(o.model, padded)
    assert all(mask is not None for mask in masks[2:]) and len(masks) == 4
    monkeypatch.setattr(type(full), "full", False)  # with a mask of nothing but true frames
    assert torch.equal(o._loss(o.model, full)[0], loss)


def test_the_compiled_step_is_the_step():
    plain, compiled = objective(), objective()
    compiled.model.encoder.compile_training("aot_eager")
    for rows in ([0, 3], [0, 1]):
        batch, losses = plain.load(0, rows), []
        for o in (plain, compiled):
            losses.append(o._loss(o.model, batch)[0])
            losses[-1].backward()
        assert torch.allclose(*losses, rtol=1e-5)
    for (name, p), q in zip(plain.model.named_parameters(), compiled.model.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-4), name
    assert list(plain.model.state_dict()) == list(compiled.model.state_dict())
    assert compiled.evaluate() == pytest.approx(plain.evaluate())  # lengths vary there: nothing is compiled
