"""The spectral codec's parts: Griffin-Lim, the fixed transform, contexts, the grid of FSQ."""

from __future__ import annotations

import pytest
import torch

from audiolm.models.mel import filterbank, mel_magnitudes
from audiolm.models.spectral.fsq import BandFSQ
from audiolm.models.spectral.griffin_lim import griffin_lim, magnitudes
from tests.worlds.tiny_codec import tiny_spectral, voice

WINDOW = 640


@pytest.fixture(scope="module", params=["ema", "fsq"])
def model(request):
    return tiny_spectral(request.param)


def distance(a_BT: torch.Tensor, b_BT: torch.Tensor) -> float:
    """Of the mel magnitudes, relative to those of b."""
    a, b = (mel_magnitudes(x, 80, size=WINDOW) for x in (a_BT, b_BT))
    return float((a - b).abs().sum() / b.abs().sum())


def test_magnitudes_have_the_mel_bands_that_they_were_made_from():
    mel_BTM = mel_magnitudes(voice(16_000, 0)[None], 80, size=WINDOW)
    found_BFT = magnitudes(mel_BTM, WINDOW)
    assert found_BFT.shape == (1, 321, 100) and (found_BFT >= 0).all()
    again_BTM = found_BFT.transpose(1, 2) @ filterbank(16_000, WINDOW, 80)
    assert (again_BTM - mel_BTM).abs().sum() < 0.02 * mel_BTM.sum()


def test_peaks_lead_the_phases_and_iterations_come_nearer():
    wav_BT = torch.stack([voice(16_000, 1), voice(16_000, 2)])
    found_BFT = magnitudes(mel_magnitudes(wav_BT, 80, size=WINDOW), WINDOW)
    none, few, many = (griffin_lim(found_BFT, n) for n in (0, 4, 30))
    off = [distance(made, wav_BT) for made in (none, few, many)]
    assert many.shape == wav_BT.shape and off[2] < 0.8 * off[1] < 0.8 * off[0] < 0.1  # from random phases: 0.55
    assert torch.equal(griffin_lim(found_BFT, 30), many)
    assert torch.allclose(griffin_lim(found_BFT[1:], 30)[0], many[1], atol=1e-4)  # whatever the other rows are


def test_griffin_lim_goes_on_from_known_sound_without_a_click():
    wav_BT = voice(16_000, 3)[None]
    found_BFT = magnitudes(mel_magnitudes(wav_BT, 80, size=WINDOW), WINDOW)
    whole = griffin_lim(found_BFT, 30)
    cut = 8000
    after = griffin_lim(found_BFT[..., cut // 160 - 16:], 30, whole[:, cut - 2560:cut])
    joined = torch.cat([whole[:, :cut], after[:, 2560:]], 1)
    blind = torch.cat([whole[:, :cut], griffin_lim(found_BFT[..., cut // 160 - 16:], 30)[:, 2560:]], 1)
    near = slice(cut - 480, cut + 480)
    assert distance(joined[:, near], wav_BT[:, near]) < 0.75 * distance(blind[:, near], wav_BT[:, near])


def test_a_click_lands_in_its_frame(model):
    for at in (3200, 3359, 9 * 320 + 5, 32 * 320 - 1):
        wav_BT = torch.zeros(1, 40 * 320)
        wav_BT[0, at] = 0.9
        energy_T = model.decode(model.encode(wav_BT)).unflatten(1, (-1, 320)).square().sum(2)[0]
        frames_T = model.frames(wav_BT).sum(2)[0]
        assert abs(int(frames_T.argmax()) - at // 320) <= 1, at
        assert abs(int(energy_T.argmax()) - at // 320) <= 1 or model.quantizer.vocab < 64, at


def test_networks_start_as_nothing_so_that_the_fixed_transform_alone_is_heard():
    model = tiny_spectral()
    for net in (model.encoder, model.decoder):
        torch.nn.init.zeros_(net.last.weight)
    frames_BTF = model.frames(voice(32_000, 7)[None])
    y_BTF = (frames_BTF - model.mean_F) / model.scale
    x_BDT = model.compress(frames_BTF)
    assert torch.allclose(x_BDT.transpose(1, 2), y_BTF @ model.analysis_FD)
    kept = (model.expand(x_BDT) - frames_BTF).square().mean() / (frames_BTF - model.mean_F).square().mean()
    assert kept < 0.1  # twelve of forty components hold nearly all of the variance


def test_context_covers_what_an_output_sees(model):
    """Gradients find how far the encoder and the decoder reach to either side."""
    wav_BT = (voice(320 * 60, 4)[None] + 1e-3).requires_grad_()
    model.latents(wav_BT)[..., 40].sum().backward()
    seen = wav_BT.grad[0].nonzero() // 320
    assert 40 - int(seen.min()) <= model.encoder_context and int(seen.max()) - 40 <= model.encoder_lookahead == 1
    x_BDT = torch.randn(1, model.quantizer.dim, 60).requires_grad_()
    model.expand(x_BDT)[:, 30].sum().backward()
    seen = x_BDT.grad[0].abs().sum(0).nonzero()
    assert int(seen.min()) == 30 - 3 and int(seen.max()) == 30 + 3 < 30 + model.decoder_lookahead
    assert model.decoder_context >= 8


def test_codes_of_a_prompt_are_the_beginning_of_the_clip_s(model):
    wav_BT = voice(320 * 60, 5)[None]
    whole, part = model.encode(wav_BT), model.encode(wav_BT[:, :320 * 30])
    assert torch.equal(whole[:, :29], part[:, :29])  # the last frame's window looks half beyond its end


def test_the_grid_s_codes_decode_to_the_nearest_points():
    fsq = BandFSQ(3, (4, 3, 2))
    x_BDT = torch.randn(2, 9, 50)
    out, codes_BTQ = fsq(x_BDT), fsq.encode(x_BDT)
    assert fsq.vocab == 24 and codes_BTQ.max() <= 23 and len(codes_BTQ.unique()) == 24
    assert torch.equal(out["codes_BTQ"], codes_BTQ)
    assert torch.allclose(fsq.decode(codes_BTQ), out["quantized_BDT"], atol=1e-6)
    steps_D = torch.tensor([2 / 3, 1.0, 2.0]).repeat(3)
    assert ((fsq.decode(codes_BTQ) - x_BDT.tanh()).abs() <= steps_D[:, None] / 2 + 1e-6).all()
    # every code decodes to a point whose code it is
    all_BTQ = torch.arange(24)[None, :, None].expand(1, 24, 3)
    assert torch.equal(fsq.encode(torch.atanh(fsq.decode(all_BTQ) * 0.999)), all_BTQ)


def test_groups_of_bands_that_are_left_out_are_zero_and_get_no_gradient():
    fsq, x_BDT = BandFSQ(3, (4, 2)), torch.randn(2, 6, 5, requires_grad=True)
    out = fsq(x_BDT, torch.tensor([1, 3]))
    assert (out["quantized_BDT"][0, 2:] == 0).all() and (out["quantized_BDT"][1] != 0).all()
    assert torch.allclose(fsq.decode(out["codes_BTQ"][:1, :, :1]), out["quantized_BDT"][:1])
    out["quantized_BDT"].sum().backward()
    assert (x_BDT.grad[0, 2:] == 0).all() and (x_BDT.grad[1] > 0).all()
