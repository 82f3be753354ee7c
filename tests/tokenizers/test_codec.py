"""The codec: lengths, causality, chunks, levels, training on synthetic sound, export and figures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from audiolm import rng
from audiolm.models import losses
from audiolm.models.discriminators import Discriminators
from audiolm.models.mel import mel_magnitudes
from audiolm.models.soundstream import SoundStream, SoundStreamSizes, fold
from audiolm.tokenizers.acoustic import AcousticTokenizer
from audiolm.tokenizers.base import padded_samples
from tests.worlds.tiny_codec import tiny_spectral, voice

STRIDES = (2, 4, 5, 8)


def noise(*shape: int, index: int = 0) -> torch.Tensor:
    return torch.from_numpy(rng.generator(0, "test-codec", index).standard_normal(shape).astype(np.float32))


@pytest.fixture(scope="module")
def model() -> SoundStream:
    torch.manual_seed(0)
    model = SoundStream(SoundStreamSizes(STRIDES, 4, 4, 16, 4, 32)).eval().requires_grad_(False)
    x_BDT = model.latents(noise(8, 32_000) / 10)
    model.quantizer.initialise(x_BDT.transpose(1, 2).flatten(0, 1), seed=0, reduce=lambda x: x)
    return model


@pytest.fixture(scope="module", params=["soundstream", "spectral", "fsq"])
def codec(request, model) -> AcousticTokenizer:
    if request.param != "soundstream":
        model = tiny_spectral({"spectral": "ema"}.get(request.param, request.param), n_q=4, vocab=32)
    return AcousticTokenizer(model, "0" * 16)


def test_the_paper_s_width_has_8_to_10_million_parameters():
    model = SoundStream(SoundStreamSizes(STRIDES, 32, 32, 128, 1, 2))
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


def test_chunks_equal_the_whole(codec):
    wav_BT = voice(320 * 200 + 77, 0)[None]
    lengths_B = torch.tensor([wav_BT.shape[1]])
    small = AcousticTokenizer(codec.model, "0" * 16, chunk_frames=33)
    whole = codec.encode(wav_BT, lengths_B)[0]
    assert len(whole) == 202 and torch.equal(small.encode(wav_BT, lengths_B)[0], whole)
    made, at_once = small.decode(whole[None]), codec.decode(whole[None])
    if codec.spec.name == "soundstream":
        assert torch.allclose(made, at_once, atol=1e-4)
    else:  # Griffin-Lim's phases differ by chunks: both come as near to the decoded frames, seams included
        mel_BTM = codec.model.mel(codec.model.expand(codec.model.quantizer.decode(whole[None])))
        off = [float((mel_magnitudes(wav_BT, 20, size=640) - mel_BTM).abs().mean()) for wav_BT in (made, at_once)]
        assert made.shape == at_once.shape and off[0] < 1.2 * off[1]


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
    model, judge = SoundStream(SoundStreamSizes(STRIDES, 4, 4, 16, 4, 32)), Discriminators("dac", (2, 3), (256,), 2)
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
        plain = SoundStream(SoundStreamSizes(STRIDES, 4, 4, 16, 4, 32), norm=False)
        plain.load_state_dict(folded.state_dict())
