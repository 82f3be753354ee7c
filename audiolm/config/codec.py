"""The codec's section: SoundStream, its training, and how it is measured."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from audiolm.config.base import Config, Later, PathField, Runtime
from audiolm.config.corpus import ClipFilter
from audiolm.config.start import CodecStartConfig
from audiolm.config.training import TrainConfig


class CodecDiscriminatorsConfig(Config):
    """The codec's discriminators: three waveform scales and one STFT, or with `codec.losses: dac` periods and STFT windows."""

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    windows: tuple[int, ...] = (2048, 1024, 512)
    stft_window: int = Field(1024, ge=128, description="of the paper's STFT discriminator (SoundStream III-D)")
    channels: int = 32
    start_step: int = Field(1000, ge=0, description="first step of the adversarial game")


class CodecLossWeights(Config):
    """Weights of the generator's losses (SoundStream III-E); with `codec.balance`, shares of the waveform's gradient.

    `losses: dac` goes with reconstruction 15, feature 2, adversarial 1 (2306.06546).
    """

    reconstruction: float = Field(1.0, gt=0)
    waveform: float = Field(0.0, ge=0, description="of the squared difference, relative to the original's power")
    feature: float = Field(100.0, ge=0)
    adversarial: float = Field(1.0, ge=0)
    commitment: float = Field(0.25, ge=0)  # not in the paper: VQ-VAE's (1711.00937)
    codebook: float = Field(1.0, ge=0, description="factorised codes only")


class SpectralConfig(Config):
    """The spectral codec's frames and networks, `codec.family: spectral` (models/spectral)."""

    n_mels: int = Field(80, ge=8, description="bands of an analysis hop of 10 ms; a frame has two hops")
    window: int = Field(640, ge=320, multiple_of=2, description="samples of the analysis window")
    power: float = Field(0.3, gt=0, le=1, description="of mel magnitudes, about as loudness grows: what is loud gets the bits")
    width: int = Field(256, ge=1, description="of encoder and decoder")
    enc_layers: int = Field(3, ge=0)
    dec_layers: int = Field(5, ge=0)
    fsq: tuple[int, ...] = Field((8, 5, 5, 5), description="quantizer fsq: values of each dimension of a group of bands; "
                                                           "their product is codec.vocab")
    iterations: int = Field(4, ge=0, description="of Griffin-Lim, which finds the phases; more lost PESQ on coded frames")
    square: float = Field(0.3, ge=0, description="weight of the frames' squared distance beside the absolute one")
    gain_db: float = Field(10.0, ge=0, description="largest change of loudness in training, up or down")


class CodecConfig(Config):
    """SoundStream (2107.03312) at 16 kHz: strides 2, 4, 5, 8 -> 50 Hz; 12 x 1024 codes = 6 kb/s (paper IV-B)."""

    family: Literal["soundstream", "spectral"] = Field("soundstream", description="spectral: mel frames, whose phases are "
                                                       "found afterwards; trains on a CPU in minutes")
    spectral: SpectralConfig = SpectralConfig()
    where: ClipFilter = ClipFilter()
    pretrained: Runtime[PathField | None] = Field(
        None, description="folder or URI of a transformers EnCodec, DAC or Mimi model, imported instead of training one; "
                          "n_q and vocab must fit it")
    start: Annotated[CodecStartConfig | None, Later(None)] = Field(
        None, description="weights and codebooks at the start, of a codec of the same sizes; quantize_from is then 0")
    strides: tuple[int, ...] = (2, 4, 5, 8)
    enc_channels: int = 32
    dec_channels: int = 32
    dim: int = 128  # with C = 32: 9.9 M parameters for both sides
    n_q: int = Field(12, ge=1, le=64)
    vocab: int = Field(1024, ge=2, le=65_535)
    quantizer: Literal["ema", "factorised", "fsq"] = Field(
        "ema", description="codes that are moving averages (paper); learned in code_dim dimensions by cosine (DAC, soundstream "
                           "alone); or a grid for each group of mel bands (2309.15505, spectral alone)")
    code_dim: int = Field(8, ge=1, description="factorised codes only")
    quantizer_dropout: float = Field(0.5, ge=0, le=1, description="share of rows whose number of levels is drawn; the others "
                                                                  "use all; 1 = SoundStream's")
    code_decay: float = Field(0.99, gt=0, lt=1)
    quantize_from: int = Field(0, ge=0, description="first quantized step: codebooks start by k-means of latents that "
                                                    "have learned so far")
    # SoundStream replaces a code whose moving count falls below 2; a share of the mean count fits any batch and vocabulary.
    dead_share: float = Field(0.1, description="a code is dead below this x (global frames a step / vocab)")
    losses: Literal["soundstream", "dac"] = Field("soundstream", description="reconstruction, discriminators and adversarial "
                                                  "losses: the paper's, or DAC's 16 kHz recipe (weights 15, feature 2)")
    weights: CodecLossWeights = CodecLossWeights()
    balance: bool = Field(False, description="scale each loss by its own gradient's running norm (EnCodec's balancer)")
    disc: CodecDiscriminatorsConfig = CodecDiscriminatorsConfig()
    ema: float = 0.999  # of the weights: the average is validated and exported
    crop_s: float = 0.48
    gates: Runtime[Literal["stop", "warn"]] = Field("stop", description="what a failed gate of codec_figures does: words not "
                                                                        "understood, codes collapsed")
    # Ours: the paper does not say how its codec was trained.
    train: TrainConfig = TrainConfig(steps=400_000, batch=64, lr=1e-4, decay_steps=200_000, betas=(0.8, 0.99),
                                     weight_decay=0.01, clip=10.0, dtype="bfloat16", zero=0)

    @model_validator(mode="after")
    def _check(self):
        if self.pretrained and self.start:
            raise ValueError("pretrained imports a codec that is not trained, start begins a training: drop one of them")
        if self.quantize_from >= self.train.steps:
            raise ValueError(f"quantize_from ({self.quantize_from}) must be below train.steps ({self.train.steps})")
        if self.quantizer == {"soundstream": "fsq", "spectral": "factorised"}[self.family]:
            raise ValueError(f"quantizer {self.quantizer} does not exist in the {self.family} family: use ema")
        waveform = {"balance": self.balance, "quantize_from": self.quantize_from}
        if self.family == "spectral" and any(waveform.values()):
            raise ValueError(f"{next(k for k, v in waveform.items() if v)} is set, and the spectral family has no waveform "
                             "losses and quantizes from the first step: leave it out")
        if self.quantizer == "fsq" and (points := math.prod(self.spectral.fsq)) != self.vocab:
            raise ValueError(f"spectral.fsq {self.spectral.fsq} makes {points} codes and vocab is {self.vocab}: set vocab to "
                             f"{points}")
        # A frame has two hops of bands; a group of bands needs as many values as its grid has dimensions.
        values = 2 * self.spectral.n_mels
        if self.family == "spectral" and self.quantizer == "ema" and self.dim > values:
            raise ValueError(f"dim ({self.dim}) exceeds the {values} values of a frame: lower dim or raise spectral.n_mels")
        if self.quantizer == "fsq" and 2 * (self.spectral.n_mels // self.n_q) < len(self.spectral.fsq):
            raise ValueError(f"n_q ({self.n_q}) groups of {self.spectral.n_mels} bands have too few for spectral.fsq "
                             f"{self.spectral.fsq}: lower n_q or raise spectral.n_mels")
        if self.quantizer == "factorised" and self.balance:
            raise ValueError("quantizer factorised with balance: true ended in one code a level wherever it was tried: set "
                             "balance: false with DAC's weights, or quantizer: ema")
        return self


class CodecMetricsConfig(Config):
    """Inputs of the step `codec_figures`: whether Lyra v2 is measured too counts, where its models are does not."""

    where: ClipFilter
    clips: int
    clip_s: float
    coarse_levels: int
    with_lyra: bool
    visqol: bool
    wer: int = 0
    asr: PathField | None = None
    lyra: Runtime[PathField | None]
    gates: Runtime[Literal["stop", "warn"]] = "stop"
