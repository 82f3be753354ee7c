"""Discriminators, losses and the balancer of the codec's training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from audiolm import rng
from audiolm.config.codec import CodecLossWeights
from audiolm.models import losses
from audiolm.models.discriminators import Discriminators, Period
from audiolm.train.gan import LossBalancer

KINDS = ("dac", "soundstream")


def noise(*shape: int, index: int = 0) -> torch.Tensor:
    return torch.from_numpy(rng.generator(0, "test-adversary", index).standard_normal(shape).astype(np.float32))


def discriminators(kind: str) -> Discriminators:
    torch.manual_seed(0)
    return Discriminators(kind, (2, 5), (256,), 4, 256)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient_and_halves_of_a_batch_stay_apart(kind):
    model, wav_BT = discriminators(kind), 0.1 * noise(4, 3200)
    outputs = model(wav_BT)
    assert len(outputs) == (3 if kind == "dac" else 4)
    losses.adversarial_loss(outputs, kind).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    for (logits, features), (alone, layers) in zip(outputs, model(wav_BT[2:]), strict=True):
        assert torch.allclose(logits[2:], alone, atol=1e-5)
        assert all(torch.allclose(f[2:], g, atol=1e-5) for f, g in zip(features, layers, strict=True))


def test_a_period_sees_each_interleaved_signal_alone():
    torch.manual_seed(0)
    period, wav_BT = Period(5, 4), noise(1, 1000)
    moved_BT = wav_BT.clone()
    moved_BT[:, 3::5] += 1.0
    changed = (period(wav_BT)[0] != period(moved_BT)[0]).flatten(2).any(-1)[0]
    assert changed.tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_zero_where_they_should_be(kind):
    real, fake = [(torch.ones(2, 1, 5), [torch.ones(2, 4)])], [(-torch.ones(2, 1, 5), [torch.zeros(2, 4)])]
    if kind == "dac":
        fake[0][0].zero_()
    assert float(losses.discriminator_loss(real, fake, kind)) == 0 < float(losses.discriminator_loss(fake, real, kind))
    assert float(losses.adversarial_loss(real, kind)) == 0 < float(losses.adversarial_loss(fake, kind))
    assert float(losses.feature_loss(real, real, kind)) == 0 and float(losses.feature_loss(real, fake, kind)) == 1.0


def test_features_are_summed_by_dac_and_averaged_by_the_paper():
    real = [(torch.ones(1, 1), [torch.ones(1, 3), torch.ones(1, 3)])] * 2
    fake = [(torch.ones(1, 1), [torch.zeros(1, 3), torch.ones(1, 3)])] * 2
    assert float(losses.feature_loss(real, fake, "dac")) == 2.0
    assert float(losses.feature_loss(real, fake, "soundstream")) == 0.5


@pytest.mark.parametrize("measure", [losses.multi_scale_mel, losses.multi_scale_spectral, losses.waveform_distance])
def test_reconstruction_losses_grow_with_the_error_and_give_finite_gradients(measure):
    wav_BT = 0.1 * noise(2, 4800)
    near, far = (float(measure(wav_BT + level * noise(2, 4800, index=1), wav_BT)) for level in (0.01, 0.1))
    assert float(measure(wav_BT, wav_BT)) < 1e-3 < near < far
    for real_BT in (wav_BT, torch.zeros(2, 4800)):  # silence too
        fake_BT = (0.1 * noise(2, 4800, index=2)).requires_grad_()
        gradient_BT, = torch.autograd.grad(measure(fake_BT, real_BT), fake_BT)
        assert gradient_BT.isfinite().all() and gradient_BT.abs().sum() > 0
        silent_BT = torch.zeros(2, 4800, requires_grad=True)
        gradient_BT, = torch.autograd.grad(measure(silent_BT, real_BT), silent_BT)
        assert gradient_BT.isfinite().all()


def test_the_balancer_gives_each_loss_its_share_whatever_its_scale():
    weights = CodecLossWeights(reconstruction=3.0, waveform=1.0, commitment=2.0)
    real_BT, start_BT = noise(4, 50), noise(4, 50, index=1)

    def gradient(scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        balance, fake_BT, side = LossBalancer(), start_BT.clone().requires_grad_(), torch.ones((), requires_grad=True)
        for step in range(3):
            terms = {"reconstruction": scale * (fake_BT - real_BT).square().mean(), "waveform": fake_BT.abs().mean(),
                     "commitment": side * side, "discriminator": torch.ones(())}
            made_BT = start_BT.clone().requires_grad_()
            target = balance.target(made_BT, fake_BT, terms, weights, 1.0, step)
            found = torch.autograd.grad(target, (made_BT, side))
            balance.update(lambda x: x, 1)
        return *found, balance.norms()["reconstruction"]

    one_BT, side, norm = gradient(1.0)
    thousand_BT, _, larger = gradient(1000.0)
    assert torch.allclose(one_BT, thousand_BT, rtol=1e-4) and float(larger) == pytest.approx(1000 * float(norm), rel=1e-4)
    assert float(side) == 2.0 * 2.0  # what does not reach the waveform keeps its weight
    first_BT = start_BT - real_BT
    waveform_BT = start_BT.sign() / start_BT.sign().norm(dim=1, keepdim=True)
    expected_BT = 0.75 * first_BT / first_BT.norm(dim=1).mean() + 0.25 * waveform_BT
    assert torch.allclose(one_BT, expected_BT / 4, atol=1e-4)  # the mean over four rows


def test_micro_batches_and_ranks_do_not_change_the_balance():
    weights, real_BT, start_BT = CodecLossWeights(reconstruction=15.0, waveform=1.0), noise(4, 50), noise(4, 50, index=1)

    def after(pieces: int) -> tuple[torch.Tensor, torch.Tensor]:
        balance = LossBalancer()
        for step in range(2):
            parts = []
            for fake_BT, wav_BT in zip(start_BT.chunk(pieces), real_BT.chunk(pieces), strict=True):
                fake_BT = fake_BT.clone().requires_grad_()
                terms = {"reconstruction": (fake_BT - wav_BT).square().mean(), "waveform": fake_BT.abs().mean()}
                made_BT = fake_BT.detach().clone().requires_grad_()
                target = balance.target(made_BT, fake_BT, terms, weights, 1 / pieces, step)
                parts.append(torch.autograd.grad(target / pieces, made_BT)[0])
            balance.update(lambda x: x, 1)
        return torch.cat(parts), balance.total

    (whole_BT, total), (parts_BT, other) = after(1), after(2)
    assert torch.allclose(whole_BT, parts_BT, atol=1e-6) and torch.allclose(total, other, rtol=1e-5)


def test_with_known_norms_one_pass_gives_the_balanced_gradient_and_norms_are_measured_every_eighth_step():
    weights, start_BT = CodecLossWeights(reconstruction=1.0, waveform=1.0, adversarial=0.3), noise(4, 50, index=1)
    made_BT, balance, passes = noise(4, 50).requires_grad_(), LossBalancer(), []

    def gradient(step: int, *extra: str) -> tuple[torch.Tensor, int]:
        """Of a step's target at the generator's waveform, and the number of passes back to it."""
        fake_BT = start_BT.clone().requires_grad_()
        shared_BT = fake_BT * 1.0
        shared_BT.register_hook(lambda g: passes.append(step))
        every = {"reconstruction": 1e4 * shared_BT.square().mean(), "waveform": shared_BT.abs().mean(),
                 "adversarial": shared_BT.tanh().mean()}
        terms = {name: every[name] for name in ("reconstruction", "waveform", *extra)}
        target = balance.target(made_BT, fake_BT, terms, weights, 1.0, step)
        found_BT, = torch.autograd.grad(target, made_BT)
        passes_here = passes.count(step)
        passes.clear()
        return found_BT, passes_here

    def update() -> dict:
        return balance.update(lambda x: x, 1)

    assert gradient(3)[1] == 2 and update().keys() == {"reconstruction", "waveform"}  # no norms yet
    balance.total *= torch.tensor([1.5, 0.7, 1.0, 1.0])  # such as other steps would have left
    norms = balance.norms()
    one_BT, one = gradient(4)
    assert update() == {name: norms[name] for name in ("reconstruction", "waveform")}  # reported, not measured
    each_BT, each = gradient(8)
    assert (one, each) == (1, 2) and torch.allclose(one_BT, each_BT, rtol=1e-5, atol=1e-7)
    assert update()["reconstruction"] != norms["reconstruction"]
    assert gradient(9, "adversarial")[1] == 3  # a new term
    assert update()["adversarial"] > 0 and gradient(10, "adversarial")[1] == 1


def test_norms_that_a_checkpoint_brings_are_known_and_a_term_without_gradient_has_no_scale_yet():
    weights, start_BT, passes = CodecLossWeights(reconstruction=1.0, waveform=1.0), noise(4, 50, index=1), []

    def gradient(balance: LossBalancer, step: int, silent: float = 1.0) -> torch.Tensor:
        fake_BT, made_BT = start_BT.clone().requires_grad_(), start_BT.clone().requires_grad_()
        shared_BT = fake_BT * 1.0
        shared_BT.register_hook(lambda g: passes.append(step))
        terms = {"reconstruction": shared_BT.square().mean(), "waveform": silent * shared_BT.abs().mean()}
        found_BT, = torch.autograd.grad(balance.target(made_BT, fake_BT, terms, weights, 1.0, step), made_BT)
        balance.update(lambda x: x, 1)
        return found_BT

    first, resumed = LossBalancer(), LossBalancer()
    gradient(first, 8)
    gradient(resumed, 3, 5.0)  # a trial before the checkpoint is loaded
    resumed.load_state_dict(first.state_dict())
    passes.clear()
    assert torch.equal(gradient(first, 9), gradient(resumed, 9)) and len(passes) == 2
    resumed.load_state_dict(LossBalancer().state_dict())
    gradient(resumed, 9)
    assert len(passes) == 4  # none are known, so both are measured

    late = LossBalancer()
    gradient(late, 8, 0.0)
    passes.clear()
    assert gradient(late, 9).abs().max() < 1 and len(passes) == 1
    gradient(late, 16)
    assert late.norms()["waveform"] > 0
