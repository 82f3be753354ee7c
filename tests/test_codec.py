"""The codec: lengths, causality, chunks, levels, training on synthetic sound, export and figures."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import safetensors.torch
import torch

from audiolm import config, rng, store
from audiolm.eval import codec as figures
from audiolm.models import losses
from audiolm.models.discriminators import Discriminators
from audiolm.models.soundstream import SoundStream, fold
from audiolm.tokenizers.acoustic import AcousticTokenizer, load_codec
from audiolm.tokenizers.base import padded_samples
from audiolm.tokenizers.semantic import ArtefactError
from audiolm.train.engine import TorchEngine, learning_rate
from audiolm.train.objective import Context
from audiolm.train.objective_codec import CodecObjective, codec_objective

STRIDES = (2, 4, 5, 8)


def noise(*shape: int, index: int = 0) -> torch.Tensor:
    return torch.from_numpy(rng.generator(0, "test-codec", index).standard_normal(shape).astype(np.float32))


@functools.lru_cache(maxsize=32)
def voice(samples: int, index: int) -> torch.Tensor:
    """Harmonics of a gliding pitch under a syllable-like envelope, as loud as speech."""
    draw, t = rng.generator(0, "voice", index), torch.arange(samples) / 16_000
    pitch = draw.uniform(90, 220) * (1 + 0.2 * torch.sin(2 * math.pi * draw.uniform(0.5, 2) * t))
    phase = 2 * math.pi * torch.cumsum(pitch, 0) / 16_000
    tone = sum(torch.sin(k * phase) / k for k in range(1, 12))
    return (0.15 * tone * (0.55 + 0.45 * torch.sin(2 * math.pi * 4 * t + draw.uniform(0, 6)))).float()


@pytest.fixture(scope="module")
def model() -> SoundStream:
    torch.manual_seed(0)
    model = SoundStream(STRIDES, 4, 4, 16, 4, 32).eval().requires_grad_(False)
    x_BDT = model.latents(noise(8, 32_000) / 10)
    model.quantizer.initialise(x_BDT.transpose(1, 2).flatten(0, 1), seed=0, reduce=lambda x: x)
    return model


@pytest.fixture(scope="module")
def codec(model) -> AcousticTokenizer:
    return AcousticTokenizer(model, "0" * 16)


def test_the_paper_s_width_has_8_to_10_million_parameters():
    model = SoundStream(STRIDES, 32, 32, 128, 1, 2)
    assert 8e6 < sum(p.numel() for p in model.parameters()) < 10e6


def test_every_length_gives_whole_frames(codec):
    lengths = sorted({1, 2, 3, 160, 2000, *range(7, 2000, 97), *(640 * k + d for k in range(1, 4) for d in (-2, -1, 0, 1, 2)
                                                                 if 640 * k + d <= 2000), 319, 320, 321})
    wav_BT = noise(len(lengths), 2000) / 10
    found = codec.encode(wav_BT, torch.tensor(lengths))
    for n, codes_TQ in zip(lengths, found, strict=True):
        assert codes_TQ.shape == (padded_samples(n) // 320, 4) and codes_TQ.dtype == torch.int64, n
        assert codec.decode(codes_TQ[None]).shape == (1, padded_samples(n)), n
    with pytest.raises(ValueError, match="multiple of 320 samples, got 321"):
        codec.model.encode(wav_BT[:, :321])


def test_padding_and_neighbours_do_not_leak(codec):
    lengths = (700, 5000, 9600)
    wav_BT = noise(3, 9600, index=1)  # noise behind the ends too
    together = codec.encode(wav_BT, torch.tensor(lengths))
    for row, n, codes_TQ in zip(wav_BT, lengths, together, strict=True):
        assert torch.equal(codec.encode(row[None, :n], torch.tensor([n]))[0], codes_TQ)


def test_no_look_ahead(model):
    wav_BT = noise(1, 6400, index=2) / 10
    changed = wav_BT.clone()
    changed[:, 3200:] += 1.0
    a, b = model.latents(wav_BT), model.latents(changed)
    assert torch.equal(a[..., :10], b[..., :10]) and not torch.allclose(a[..., 10], b[..., 10])
    x_BDT = noise(1, 16, 20, index=3)
    other = x_BDT.clone()
    other[..., 10:] += 1.0
    a, b = model.synthesize(x_BDT), model.synthesize(other)
    assert torch.equal(a[:, :3200], b[:, :3200]) and not torch.allclose(a[:, 3200:3520], b[:, 3200:3520])


def test_context_covers_what_an_output_sees(model):
    """Gradients find exactly how far back the encoder and the decoder reach."""
    wav_BT = (noise(1, 320 * 30, index=4) / 10).requires_grad_()
    model.latents(wav_BT)[..., -1].sum().backward()
    oldest = int(wav_BT.grad[0].nonzero()[0]) // 320
    assert 28 - oldest < model.encoder_context <= 28 - oldest + 2
    x_BDT = noise(1, 16, 40, index=5).requires_grad_()
    model.synthesize(x_BDT)[:, -320:].sum().backward()
    oldest = int(x_BDT.grad[0].abs().sum(0).nonzero()[0])
    assert 39 - oldest <= model.decoder_context <= 39 - oldest + 1


def test_chunks_equal_the_whole(model, codec):
    wav_BT = voice(320 * 200 + 77, 0)[None]
    lengths_B = torch.tensor([wav_BT.shape[1]])
    small = AcousticTokenizer(model, "0" * 16, chunk_frames=33)
    whole = codec.encode(wav_BT, lengths_B)[0]
    assert len(whole) == 202 and torch.equal(small.encode(wav_BT, lengths_B)[0], whole)
    assert torch.allclose(small.decode(whole[None]), codec.decode(whole[None]), atol=1e-4)


def test_any_prefix_of_the_levels_decodes(codec):
    codes_TQ = codec.encode(voice(6400, 1)[None], torch.tensor([6400]))[0]
    made = [codec.decode(codes_TQ[None, :, :q]) for q in range(1, 5)]
    assert all(m.shape == (1, 6400) for m in made)
    assert all(not torch.equal(a, b) for a, b in zip(made, made[1:], strict=False))
    assert codec.decode(torch.zeros(2, 0, 4, dtype=torch.int64)).shape == (2, 0)


@pytest.mark.parametrize(("codes", "message"), [
    (torch.full((1, 3, 4), 32), "codes run from 32 to 32; this codec has codes 0 to 31"),
    (torch.full((1, 3, 4), -1), "codes run from -1"),
    (torch.zeros(1, 3, 5, dtype=torch.int64), r"1 to 4 levels, got shape \(1, 3, 5\)")])
def test_bad_codes_are_refused(codec, codes, message):
    with pytest.raises(ValueError, match=message):
        codec.decode(codes)


def test_bad_audio_is_refused(codec):
    with pytest.raises(ValueError, match="NaN or infinite"):
        codec.encode(torch.tensor([[0.0, math.nan]]), torch.tensor([2]))
    with pytest.raises(ValueError, match="mix channels down"):
        codec.encode(torch.zeros(1, 2, 640), torch.tensor([640]))
    with pytest.raises(ValueError, match="mono"):
        codec.encode(torch.zeros(1, 640), torch.tensor([641]))


def test_every_parameter_learns_and_folding_changes_nothing():
    torch.manual_seed(0)
    model, judge = SoundStream(STRIDES, 4, 4, 16, 4, 32), Discriminators((2, 3), (256,), 2)
    wav_BT = voice(3200, 2).repeat(2, 1)
    model.quantizer.codebook_QND.copy_(noise(4, 32, 16, index=6))  # silent codes would starve the decoder
    out = model(wav_BT, torch.tensor([4, 1]))
    fake = judge(out["wav_BT"])
    real = judge(wav_BT)
    assert len(fake) == 3 and all(logits.shape[0] == 2 and len(features) == 5 for logits, features in fake)
    (losses.multi_scale_mel(out["wav_BT"], wav_BT) + out["commitment"] + losses.adversarial_loss(fake)
     + losses.feature_loss(real, fake)).backward()
    idle = [n for m in (model, judge) for n, p in m.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []
    with torch.no_grad():
        before = model.synthesize(model.latents(wav_BT))
        folded = fold(model)
        assert torch.allclose(folded.synthesize(folded.latents(wav_BT)), before, atol=1e-6)
        plain = SoundStream(STRIDES, 4, 4, 16, 4, 32, norm=False)
        plain.load_state_dict(folded.state_dict())


def test_losses_are_zero_where_they_should_be():
    wav_BT = voice(6400, 3)[None]
    assert float(losses.multi_scale_mel(wav_BT, wav_BT)) == 0
    near, far = losses.multi_scale_mel(wav_BT * 0.9, wav_BT), losses.multi_scale_mel(wav_BT * 0.1, wav_BT)
    assert 0 < float(near) < float(far)
    yes, no = [(torch.ones(1, 1, 4), [torch.ones(3)])], [(-torch.ones(1, 1, 4), [torch.full((3,), 3.0)])]
    zero = [(torch.zeros(1, 1, 4), [torch.ones(3)])]
    for kind, real, fake in (("lsgan", yes, zero), ("hinge", yes, no)):
        assert float(losses.discriminator_loss(real, fake, kind)) == 0 < float(losses.discriminator_loss(fake, real, kind))
        assert float(losses.adversarial_loss(real, kind)) == 0 < float(losses.adversarial_loss(fake, kind))
    assert float(losses.feature_loss(yes, yes)) == 0 and float(losses.feature_loss(yes, no)) == 2.0


class Voices:
    """Stands in for the corpus: row r of step s is a piece of one of a few voices."""

    crop = 3200

    def batch(self, step, rows):
        wavs = []
        for row in rows:
            draw = rng.generator(1, "piece", step, row)
            start = int(draw.integers(16_000))
            wavs.append(voice(32_000, int(draw.integers(6)))[start:start + self.crop])
        return torch.stack(wavs), torch.full((len(rows),), self.crop)


def tiny(start_step: int = 1000, steps: int = 40) -> config.Codec:
    return config.Codec(
        enc_channels=4, dec_channels=4, dim=16, n_q=3, vocab=16, code_decay=0.9, crop_s=0.2,
        disc=config.Discriminators(periods=(2,), windows=(256,), channels=2, start_step=start_step),
        train=config.Train(steps=steps, batch=4, lr=3e-3, betas=(0.8, 0.99), weight_decay=0.01, clip=10.0))


def training(codec: config.Codec) -> tuple[CodecObjective, dict[str, TorchEngine]]:
    torch.manual_seed(0)
    ctx = Context(0, 1, torch.device("cpu"), 0)
    held_out_BT = torch.stack([voice(6400, i) for i in (6, 7, 8)])
    objective = CodecObjective(codec, Voices(), held_out_BT, ctx, 0)
    return objective, {name: TorchEngine(m, codec.train, ctx, None, 0) for name, m in objective.modules.items()}


def run(objective: CodecObjective, engines: dict[str, TorchEngine], start: int, end: int, pieces: int = 1) -> dict:
    for step in range(start, end):
        for engine in engines.values():
            engine.set_lr(learning_rate(objective.codec.train, step))
        rows = range(objective.codec.train.batch)
        share = len(rows) // pieces
        batches = [objective.load(step, rows[i:i + share]) for i in range(0, len(rows), share)]
        result = objective.train_step(engines, batches, step)
    return result


def test_training_lowers_the_distance_and_the_export_gives_the_same_codes(tmp_path):
    objective, engines = training(tiny(start_step=36))
    first = run(objective, engines, 0, 1)
    assert "discriminator" not in first and first["units"] == 4 * 3200 / 16_000
    early = objective.evaluate()
    judge = engines["discriminator"].state()
    run(objective, engines, 1, 36)
    untouched = engines["discriminator"].state()
    assert engines["discriminator"].updates == 0 and all(torch.equal(judge[k], untouched[k]) for k in judge)
    last = run(objective, engines, 36, 40)
    late = objective.evaluate()
    assert engines["discriminator"].updates == 4 and {"adversarial", "feature", "grad_norm/discriminator"} <= set(last)
    assert any(not torch.equal(judge[k], v) for k, v in engines["discriminator"].state().items() if k in judge)
    assert late["loss"] < 0.75 * early["loss"] and late["loss"] == late["mel/q02"]
    assert late["gain/q01"] == pytest.approx(late["mel/q00"] - late["mel/q01"])

    weights, sizes = objective.export()
    store.put(f"{tmp_path}/export/model.safetensors", safetensors.torch.save(weights))
    store.put_json(f"{tmp_path}/export/config.json", sizes)
    loaded, wav_BT, lengths_B = load_codec(str(tmp_path)), voice(6400, 9)[None], torch.tensor([6400])
    direct = objective.averaged().encode(wav_BT)[0]
    assert torch.equal(loaded.encode(wav_BT, lengths_B)[0], direct[:20]) and len(loaded.hash) == 16
    assert loaded.spec.n_q == 3 and loaded.spec.vocab == 16 and loaded.spec.rate_hz == 50
    store.put_json(f"{tmp_path}/export/config.json", {**sizes, "dim": 8})
    with pytest.raises(ArtefactError, match="do not fit the codec"):
        load_codec(str(tmp_path))


def test_resume_equals_an_uninterrupted_run():
    whole, engines = training(tiny(start_step=2))
    run(whole, engines, 0, 2)
    saved = {name: engine.state() for name, engine in engines.items()}
    run(whole, engines, 2, 5)
    again, _ = training(tiny(start_step=2))
    ctx, updates = again.ctx, {"generator": 2, "discriminator": 0}
    resumed = {n: TorchEngine(m, again.codec.train, ctx, saved[n], updates[n]) for n, m in again.modules.items()}
    run(again, resumed, 2, 5)
    for name, engine in engines.items():
        other = resumed[name].state()
        assert all(torch.equal(value, other[key]) for key, value in engine.state().items())


def test_micro_batches_add_up_to_the_batch():
    one, engines = training(tiny(start_step=0))
    two, others = training(tiny(start_step=0))
    a, b = run(one, engines, 0, 1), run(two, others, 0, 1, pieces=2)
    for name in ("loss", "mel", "commitment", "adversarial", "discriminator", "grad_norm/generator"):
        # the feature loss is relative to a micro-batch's own magnitude, so it is near and not the same
        assert float(a[name]) == pytest.approx(float(b[name]), rel=0.05), name
    assert torch.allclose(one.generator.net.quantizer.codebook_QND, two.generator.net.quantizer.codebook_QND, atol=1e-5)


def test_dropout_draws_depend_on_step_and_row_alone():
    objective, _ = training(tiny())
    whole = objective.load(3, range(8))["n_q_B"]
    assert torch.equal(torch.cat([objective.load(3, range(i, i + 2))["n_q_B"] for i in (0, 2, 4, 6)]), whole)
    many = objective.load(4, range(60))["n_q_B"]
    assert set(many.tolist()) == {1, 2, 3}


def test_configs_that_cannot_train_are_refused():
    corpus = config.Corpus(name="x", sources=[{"kind": "folder", "name": "x", "root": "/nowhere"}])
    ctx = Context(0, 1, torch.device("cpu"), 0)
    for codec, message in ((config.Codec(strides=(2, 4, 5)), "make a hop of 40 samples"),
                           (config.Codec(crop_s=0.04), "raise it to at least 0.08")):
        with pytest.raises(ValueError, match=message):
            codec_objective({"codec": codec, "corpus": corpus, "seed": 0}, {"manifest": "/nowhere"}, ctx)


class Perfect:
    """A codec that gives back what it was given, to check the figures' scale."""

    def __init__(self, model_codec):
        self.spec, self.codec = model_codec.spec, model_codec

    def encode(self, wav_BT, lengths_B):
        self.wav_BT = torch.nn.functional.pad(wav_BT, (0, -wav_BT.shape[1] % 640))
        return self.codec.encode(wav_BT, lengths_B)

    def decode(self, codes_BTQ):
        return self.wav_BT


def test_figures(codec):
    wav = voice(32_000, 10).numpy()
    perfect = figures.codec_figures(Perfect(codec), [wav])
    assert perfect["levels"][0]["mel"] == 0 and perfect["levels"][0]["pesq"] > 4.6
    real = figures.codec_figures(codec, [wav, wav[:2000]])
    assert [r["n_q"] for r in real["levels"]] == [1, 2, 3, 4]
    assert [r["bits_per_s"] for r in real["levels"]] == [250.0, 500.0, 750.0, 1000.0]  # 50 Hz x 5 bits
    assert real["levels"][0]["pesq_clips"] == 1 and "shorter" in real["levels"][0]["pesq_failed"]["1"]
    assert real["mean_spectrum_mel"] > 0.1 and len(real["codebooks"]) == 4
    assert all(0 < r["used"] <= 1 and 1 <= r["perplexity"] <= 32 for r in real["codebooks"])
    silent = figures.codec_figures(codec, [np.zeros(8000, np.float32)])
    assert silent["levels"][0]["pesq"] is None and silent["levels"][0]["pesq_failed"]["0"]
    with pytest.raises(ValueError, match="no clips"):
        figures.codec_figures(codec, [])


def test_si_sdr_and_mean_spectrum():
    wav = noise(16_000).numpy()
    made = wav + 0.1 * noise(16_000, index=1).numpy()
    assert figures.si_sdr_db(wav, made) == pytest.approx(20, abs=0.5)
    assert figures.si_sdr_db(wav, 3 * made) == pytest.approx(figures.si_sdr_db(wav, made), abs=1e-6)
    steady = np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000).astype(np.float32)
    assert figures.mean_spectrum_distance(voice(16_000, 1).numpy()) > 2 * figures.mean_spectrum_distance(steady)
