"""The semantic section: masked model, its iterations, k-means, and ABX that chooses among them (paper III-B, IV-B)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from audiolm.config.base import Config, Later, PathField, Runtime
from audiolm.config.corpus import ClipFilter
from audiolm.config.start import KMeansStartConfig, StartConfig
from audiolm.config.training import TrainConfig


class ResidualConfig(Config):
    """More levels of semantic tokens, each of as many codes as the tokenizer has: 250 b/s a level at K = 1024."""

    levels: int = Field(8, ge=2, le=64, description="in all, the tokenizer's own among them; 24 = the paper's 6 kb/s")
    max_frames: int = Field(500_000, ge=1, description="frames sampled for the fit, which one task holds (2 GB at width 1024)")
    iterations: int = Field(30, ge=1, description="of k-means, each level, at most")


class VocoderDiscriminatorsConfig(Config):
    """The vocoder's adversary, DAC's: periods and STFT windows."""

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    windows: tuple[int, ...] = (2048, 1024, 512)
    channels: int = Field(32, ge=1)
    start_step: int = Field(1000, ge=0, description="first step of the adversarial game")


class VocoderLossWeights(Config):
    """Weights of the vocoder's losses, DAC's (2306.06546)."""

    reconstruction: float = Field(15.0, gt=0)
    feature: float = Field(2.0, ge=0)
    adversarial: float = Field(1.0, ge=0)


class VocoderConfig(Config):
    """The decoder of semantic tokens: blocks that look both ways at 25 Hz, then SoundStream's decoder (paper Table I)."""

    where: ClipFilter = ClipFilter()
    levels: int = Field(1, ge=1, le=64, description="1: tokens alone; more need the step residual, and any prefix decodes")
    dim: int = Field(512, ge=1)
    layers: int = Field(8, ge=0, description="blocks at 25 Hz, each seeing 3 frames to either side")
    channels: int = Field(32, ge=1, description="of SoundStream's decoder at 16 kHz; they double with each stride")
    heard_s: float = Field(4.0, gt=0, description="audio around a crop that the tokenizer gets, as it gets whole clips later")
    crop_s: float = Field(1.28, gt=0, description="audio that is decoded and compared")
    disc: VocoderDiscriminatorsConfig = VocoderDiscriminatorsConfig()
    weights: VocoderLossWeights = VocoderLossWeights()
    ema: float = Field(0.999, ge=0, lt=1)
    train: TrainConfig = TrainConfig(steps=200_000, batch=32, lr=2e-4, warmup_steps=1000, decay_steps=100_000,
                                     betas=(0.8, 0.99), weight_decay=0.01, clip=10.0, zero=0)

    @model_validator(mode="after")
    def _check(self):
        if self.crop_s > self.heard_s:
            raise ValueError(f"crop_s ({self.crop_s}) exceeds heard_s ({self.heard_s}), of which the crop is the middle: "
                             "raise heard_s")
        return self


class AugmentConfig(Config):
    """Augmentation of a masked model's input in training, each with a probability a crop; targets come from clean audio."""

    pitch: float = Field(0.0, ge=0, le=1)
    pitch_cents: float = Field(300.0, ge=0, le=1200, description="largest shift of the spectrum, up or down")
    noise: float = Field(0.0, ge=0, le=1)
    snr_db: tuple[float, float] = (5.0, 25.0)
    reverb: float = Field(0.0, ge=0, le=1)
    reverb_s: tuple[float, float] = Field((0.1, 0.5), description="time in which the room falls by 60 dB")


class W2vBertConfig(Config):
    """The paper's objective (2108.06209): a contrastive module and a masked-prediction module on its codes, jointly."""

    contrastive_layers: int | None = Field(None, ge=1, description="blocks of the contrastive module; None = half of them")
    codes: int = Field(1024, ge=2)
    code_dim: int = Field(1024, ge=1)
    negatives: int = Field(100, ge=1)
    temperature: float = Field(0.1, gt=0)
    gumbel: tuple[float, float, float] = Field((2.0, 0.5, 0.999995), description="first and last temperature, factor a step")
    contrastive: float = 1.0  # beta
    masked: float = 1.0  # gamma
    diversity: float = 0.1


class MaskedModelConfig(Config):
    """The masked audio model: a Conformer on log-mels at 25 Hz; w2v-BERT XL as in the paper (III-B), or HuBERT."""

    objective: Literal["w2vbert", "hubert"] = "w2vbert"
    dim: int = 1024
    layers: int = 24  # 12 of the contrastive module, 12 of masked prediction (2108.06209)
    heads: int = 8
    ff: int = 4096
    conv_kernel: int = 5
    dropout: float = 0.1
    normalise: Annotated[Literal["corpus", "clip"], Later("corpus")] = Field(
        "corpus", description="of log-mels: by the corpus' mean and deviation per band, or by each clip's own, above a floor "
                              "30 dB below the clip's level: channel, codec and voice weigh less")
    spectrum: Annotated[Literal["mel", "semitones"], Later("mel")] = Field(
        "mel", description="of the input: log-mels; or, for music, what sounds in each semitone, of which HuBERT's first "
                           "targets are then clusters too, as MFCCs hold no pitch")
    targets_k: int = Field(100, ge=2, description="k of HuBERT's first targets")
    targets_cents: Annotated[float, Later(0.0)] = Field(
        0.0, ge=0, le=1200, description="a crop's MFCC targets are made under the warp of its spectrum, of at most this many "
                                        "cents, that lies nearest to the codebook (VTLN), so that readers share them; 0: none")
    mask_span_s: float = 0.4
    mask_share: float = Field(0.49, gt=0, lt=1, description="share of frames under a mask")  # starts of 0.065, spans of 10
    crop_s: float = 15.0
    unmasked: Annotated[float, Later(0.0)] = Field(0.0, ge=0, description="weight of the mean loss on frames that are not "
                                                   "masked, beside 1 on masked ones (HuBERT's alpha); it speeds up the start")
    augment: AugmentConfig = AugmentConfig()
    w2vbert: W2vBertConfig | None = Field(None, description="of objective w2vbert; None: the paper's")
    start: Annotated[StartConfig | None, Later(None)] = Field(
        None, description="encoder and input statistics at the start of the first iteration, of a masked model of the same "
                          "sizes; heads are new. Later iterations: semantic.iterations' start")
    train: TrainConfig = TrainConfig(steps=400_000, batch=2048, lr=2e-3, warmup_steps=25_000, decay_steps=100_000,
                                     weight_decay=0.01, dtype="bfloat16", micro_batch=16)

    @model_validator(mode="after")
    def _check(self):
        if self.w2vbert and self.objective != "w2vbert":
            raise ValueError(f"w2vbert is a section of objective w2vbert, objective is {self.objective}: drop one of them")
        speech = {"normalise": self.normalise == "clip", "targets_cents": self.targets_cents,
                  "augment.pitch": self.augment.pitch}
        if self.spectrum == "semitones" and any(speech.values()):
            field = next(name for name, is_set in speech.items() if is_set)
            raise ValueError(f"spectrum is semitones, for music, and {field} is for the log-mels of speech: drop one of them")
        if self.targets_cents and self.objective != "hubert":
            raise ValueError(f"targets_cents is of HuBERT's MFCC targets, objective is {self.objective}: drop one of them")
        if self.objective == "w2vbert":
            half = (self.w2vbert or W2vBertConfig()).contrastive_layers
            if half is not None and half >= self.layers:
                raise ValueError(f"w2vbert.contrastive_layers ({half}) must leave blocks of layers ({self.layers}) to masked "
                                 "prediction")
            if self.train.export == "best":
                raise ValueError("train.export: best goes by the loss, which is lowest where w2v-BERT's codes have collapsed: "
                                 "say last")
        return self


class PretrainedEncoderConfig(Config):
    """Someone else's masked model instead of one trained here, in transformers' format."""

    uri: Runtime[PathField] = Field(description="folder or URI of a HuBERT, WavLM, wav2vec 2.0 or w2v-BERT 2.0 model")


class IterationConfig(Config):
    """One more iteration of HuBERT: targets are k-means of a layer of the model before."""

    layer: int | Literal["auto"] = Field("auto", description="block whose output is clustered, from 1; auto: by ABX")
    k: int = Field(500, ge=2)
    start: Literal["fresh", "previous"] = Field("fresh", description="weights of the encoder at the start: "
                                                "random, or those of the model before")
    train: TrainConfig | None = Field(None, description="None: as semantic.model.train")


class AbxConfig(Config):
    """The items of ABX on phone triphones, spoken by speakers that nothing was trained on."""

    items: Runtime[PathField] = Field(description="ZeroSpeech item file")
    audio: Runtime[tuple[PathField, ...]] = Field(description="folders with the items' files, at any depth")
    phones: Runtime[PathField | None] = Field(
        None, description="alignment, a phone a line: file onset offset phone ...; for the phone-by-token plot")
    speakers: tuple[str, ...] | None = Field(None, description="None: those of the items that are not trained on")


class LayerSweepConfig(Config):
    """The choice of layer and K by ABX where semantic.kmeans or an iteration says auto."""

    layers: tuple[int, ...] | None = Field(None, description="None: all")
    k: tuple[int, ...] = Field((), description="candidates where semantic.kmeans.k is auto")
    top: int = Field(2, ge=1, description="layers, best by their features, on which centroids are measured")
    frames: int = Field(200_000, ge=1, description="training frames sampled for a candidate's centroids")
    iterations: int = Field(30, ge=1)


class KMeansConfig(Config):
    """Clusters of one layer; the paper's are 1024 of the 7th block of masked prediction, the 19th of all (IV-B)."""

    layer: int | Literal["auto"] = Field(19, description="block whose output is clustered, from 1; auto: by ABX")
    k: int | Literal["auto"] = 1024
    max_frames: int = Field(5_000_000, ge=1, description="frames sampled for the fit; one task holds them, 20 GB at width 1024")
    method: Annotated[Literal["lloyd", "minibatch"], Later("lloyd")] = Field(
        "lloyd", description="minibatch: fewer passes over the frames, an inertia some per cent higher")
    window_s: float = Field(16.0, gt=0, description="audio in one pass of the model; longer clips are cut into windows")
    overlap_s: float = Field(2.0, ge=0, description="of a window's ends, encoded for context and dropped")
    iterations: int = Field(100, ge=1, description="passes over the frames, at most")
    restarts: int = Field(3, ge=1)
    start: Annotated[KMeansStartConfig | None, Later(None)] = Field(
        None, description="centroids to adapt in place of new ones, so that language models of the old tokens go on")


class SemanticConfig(Config):
    where: ClipFilter = ClipFilter()
    model: MaskedModelConfig = MaskedModelConfig()
    pretrained: PretrainedEncoderConfig | None = Field(None, description="imported instead of training semantic.model")
    tokenizer: StartConfig | None = Field(None, description="a trained tokenizer, taken over as it is: no masked model and no "
                                                            "k-means are trained, and tokens keep their meaning")
    iterations: tuple[IterationConfig, ...] = Field((), description="further iterations of HuBERT")
    abx: AbxConfig | None = None
    sweep: LayerSweepConfig = LayerSweepConfig()
    kmeans: KMeansConfig = KMeansConfig()
    residual: ResidualConfig | None = Field(
        None, description="also fit more levels of tokens by residual k-means (paper, Table I)")
    vocoder: VocoderConfig | None = Field(None, description="also train a decoder of semantic tokens alone (paper, Table I)")

    @model_validator(mode="after")
    def _check(self):
        if self.tokenizer and (self.pretrained or self.iterations or self.model.start or self.kmeans.start):
            raise ValueError("tokenizer takes a trained one over; pretrained, iterations, model.start and kmeans.start are of "
                             "one that is trained here: drop them, or tokenizer")
        if self.pretrained and self.model.start:
            raise ValueError("pretrained imports a model that is not trained, model.start begins a training: drop one of them")
        if self.pretrained and self.iterations:
            raise ValueError("iterations need a model that is trained here: drop pretrained, or iterations")
        if self.iterations and self.model.objective != "hubert":
            raise ValueError(f"iterations are for objective hubert, model.objective is {self.model.objective}: "
                             "drop one of them")
        if self.tokenizer:
            return self
        chosen = [("kmeans", self.kmeans.layer), *((f"iterations.{i}", a.layer) for i, a in enumerate(self.iterations))]
        chosen += [("sweep", n) for n in self.sweep.layers or ()]
        for name, layer in chosen:
            if layer != "auto" and (layer < 1 or (layer > self.model.layers and not self.pretrained)):
                raise ValueError(f"{name}: layer {layer} is not one of model.layers ({self.model.layers}), counted from 1")
        levels = self.residual.levels if self.residual else 1
        if self.vocoder and self.vocoder.levels > levels:
            raise ValueError(f"vocoder.levels ({self.vocoder.levels}) exceeds the {levels} level(s) there are: say "
                             f"residual={{levels: {self.vocoder.levels}}}, or vocoder.levels=1")
        if self.kmeans.window_s <= 2 * self.kmeans.overlap_s:
            raise ValueError(f"kmeans.window_s ({self.kmeans.window_s}) must exceed twice kmeans.overlap_s "
                             f"({self.kmeans.overlap_s})")
        if isinstance(self.kmeans.k, int) and self.kmeans.k < 2:
            raise ValueError(f"kmeans.k ({self.kmeans.k}) must be at least 2")
        if self.kmeans.k == "auto" and len(self.sweep.k) < 2:
            raise ValueError("kmeans.k: auto chooses among sweep.k, which needs at least two values: sweep.k=[256,512,1024]")
        if "auto" in (self.kmeans.k, *(layer for _, layer in chosen)) and self.abx is None:
            raise ValueError("auto chooses by ABX: give semantic.abx.items and semantic.abx.audio, or numbers in place of auto")
        return self
