"""Golden numbers: the codec, its adversaries and its losses give what they gave when this was recorded.

`python -m tests.tokenizers.test_golden_codec` records them anew, which is right only where the change was meant.
"""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import safetensors.torch
import torch

from audiolm import rng
from audiolm.models import losses
from audiolm.models.discriminators import Discriminators
from audiolm.models.soundstream import SoundStream, SoundStreamSizes, fold
from tests.worlds.basics import ROOT
from tests.worlds.tiny_codec import tiny_spectral, voice

GOLDEN = ROOT / "tests" / "golden" / "codec.safetensors"


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """The same numbers in every parameter and codebook, whatever the initialisation is today."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith(("initialised", "share_QN", "window", "scale")):
                continue
            draw = rng.generator(0, "golden", zlib.crc32(name.encode())).standard_normal(tuple(value.shape))
            fan_in = value[0].numel() if value.ndim > 1 else 1
            value.copy_(torch.from_numpy((draw * (1.5 / fan_in**0.5 if value.ndim > 1 else 0.1)).astype(np.float32)))
    return module.eval()


@torch.no_grad()
def numbers() -> dict[str, torch.Tensor]:
    wav_BT, found = voice(6400, 1)[None], {}
    for kind in ("ema", "factorised"):
        model = filled(fold(SoundStream(SoundStreamSizes((2, 4, 5, 8), 2, 4, 8, 3, 16, quantizer=kind, code_dim=4))))
        codes_BTQ = model.encode(wav_BT)
        found |= {f"{kind}/x_BDT": model.latents(wav_BT), f"{kind}/codes_BTQ": codes_BTQ,
                  f"{kind}/wav_BT": model.decode(codes_BTQ), f"{kind}/one_level_BT": model.decode(codes_BTQ[..., :1])}
    for kind in ("spectral", "fsq"):
        model = tiny_spectral({"spectral": "ema"}.get(kind, kind))
        codes_BTQ = model.encode(wav_BT)
        found |= {f"{kind}/x_BDT": model.latents(wav_BT), f"{kind}/codes_BTQ": codes_BTQ,
                  f"{kind}/frames_BTF": model.expand(model.quantizer.decode(codes_BTQ[..., :2])),
                  f"{kind}/wav_BT": model.decode(codes_BTQ)}
    other_BT = voice(6400, 2)[None]
    for kind in ("dac", "soundstream"):
        judge = filled(Discriminators(kind, (2, 3), (256,), 2, 256))
        real, fake = judge(wav_BT), judge(other_BT)
        found |= {f"{kind}/discriminator": losses.discriminator_loss(real, fake, kind),
                  f"{kind}/adversarial": losses.adversarial_loss(fake, kind),
                  f"{kind}/feature": losses.feature_loss(real, fake, kind)}
    found |= {"mel": losses.multi_scale_mel(wav_BT, other_BT), "spectral": losses.multi_scale_spectral(wav_BT, other_BT),
              "waveform": losses.waveform_distance(wav_BT, other_BT)}
    return {k: v.contiguous() for k, v in found.items()}


@pytest.fixture(scope="module")
def found() -> dict[str, torch.Tensor]:
    return numbers()


@pytest.mark.parametrize("name", sorted(safetensors.torch.load_file(GOLDEN)) if GOLDEN.exists() else [])
def test_numbers_are_those_recorded(name, found):
    expected = safetensors.torch.load_file(GOLDEN)[name]
    if expected.dtype == torch.int64:
        assert torch.equal(found[name], expected)
    else:
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4)


def test_everything_computed_is_recorded(found):
    assert set(found) == set(safetensors.torch.load_file(GOLDEN))
    assert all(len(found[f"{kind}/codes_BTQ"].unique()) > 5 for kind in ("ema", "factorised", "spectral", "fsq"))


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    safetensors.torch.save_file(numbers(), GOLDEN)
