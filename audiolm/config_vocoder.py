"""The configuration of sound from semantic tokens alone, for the paper's Table I: residual k-means and the decoder."""

from __future__ import annotations

from pydantic import Field, model_validator

from audiolm.config_train import Train, Where
from audiolm.identity import Config


class Residual(Config):
    """More levels of semantic tokens, each of as many codes as the tokenizer has: 250 b/s a level at K = 1024."""

    levels: int = Field(8, ge=2, le=64, description="in all, the tokenizer's own among them; 24 = the paper's 6 kb/s")
    max_frames: int = Field(500_000, ge=1, description="frames sampled for the fit, which one task holds (2 GB at width 1024)")
    iterations: int = Field(30, ge=1, description="of k-means, each level, at most")


class Judges(Config):
    """The vocoder's adversary, DAC's: periods and STFT windows."""

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    windows: tuple[int, ...] = (2048, 1024, 512)
    channels: int = Field(32, ge=1)
    start_step: int = Field(1000, ge=0, description="first step of the adversarial game")


class VocoderWeights(Config):
    reconstruction: float = Field(15.0, gt=0)
    feature: float = Field(2.0, ge=0)
    adversarial: float = Field(1.0, ge=0)


class Vocoder(Config):
    """The decoder of semantic tokens: blocks that look both ways at 25 Hz, then SoundStream's decoder (paper Table I)."""

    where: Where = Where()
    levels: int = Field(1, ge=1, le=64, description="1: tokens alone; more need the step residual, and any prefix decodes")
    dim: int = Field(512, ge=1)
    layers: int = Field(8, ge=0, description="blocks at 25 Hz, each seeing 3 frames to either side")
    channels: int = Field(32, ge=1, description="of SoundStream's decoder at 16 kHz; they double with each stride")
    heard_s: float = Field(4.0, gt=0, description="audio around a crop that the tokenizer hears, as it hears whole clips later")
    crop_s: float = Field(1.28, gt=0, description="audio that is made and compared")
    disc: Judges = Judges()
    weights: VocoderWeights = VocoderWeights()
    ema: float = Field(0.999, ge=0, lt=1)
    train: Train = Train(steps=200_000, batch=32, lr=2e-4, warmup_steps=1000, decay_steps=100_000, betas=(0.8, 0.99),
                         weight_decay=0.01, clip=10.0, zero=0)

    @model_validator(mode="after")
    def _check(self):
        if self.crop_s > self.heard_s:
            raise ValueError(f"crop_s ({self.crop_s}) exceeds heard_s ({self.heard_s}): the crop lies inside what is heard")
        return self
