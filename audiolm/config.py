"""The configuration: frozen pydantic models with the paper's numbers as defaults.

Every field is part of a step's identity unless it is marked `Runtime` or `Later` (see identity.py).
Seconds end in `_s`, hertz in `_hz`.  Unknown keys are refused.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from audiolm.config_semantic import Semantic
from audiolm.config_train import Train, Where
from audiolm.identity import Config, Later, Runtime


class Run(Config):
    name: Runtime[str] = "quickstart"
    experiment: Runtime[str] = "audiolm"
    seed: int = 0


class Cluster(Config):
    """Where and how the work runs; no field changes what is computed."""

    address: Runtime[str | None] = Field(None, description="a Ray cluster to join; None starts one here")
    workers: Runtime[int | None] = Field(None, ge=1, description="data tasks at once; None = the cluster's CPUs")
    device: Runtime[Literal["auto", "cpu", "cuda"]] = "auto"
    train_workers: Runtime[int] = Field(1, ge=1, description="training workers (ranks) of one step")
    threads: Runtime[int | None] = Field(None, ge=1, description="torch threads a training worker; None = CPUs / ranks")
    parallel_training: Runtime[int] = Field(1, ge=1, description="training steps at once")
    retries: Runtime[int] = Field(2, ge=0, description="relaunches of a step after a node or worker died")
    compile: Runtime[bool] = Field(True, description="torch.compile what trains on a GPU, where the step knows how")
    audio_cache_mb: Runtime[int] = Field(512, ge=0, description="decoded audio kept in memory by a training worker")


class _Source(Config):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")


class FolderSource(_Source):
    """Audio files under any fsspec URI. `speaker` says which part of the path names the speaker."""

    kind: Literal["folder"]
    root: Runtime[str]
    glob: str = "**/*"
    speaker: Literal["none", "parent", "grandparent"] = Field("none", description="none: every file is its own speaker")
    split: Literal["train", "dev", "test"] | None = Field(None, description="put all of it there; None splits by speaker")


class LibriSpeechSource(_Source):
    """SUBSET/SPEAKER/CHAPTER/*.flac with optional *.trans.txt (LibriSpeech), or Libri-Light's SPEAKER/BOOK/*.flac."""

    kind: Literal["librispeech"]
    root: Runtime[str]
    splits: dict[str, Literal["train", "dev", "test"]] | None = Field(
        None, description="subset folder -> split; None: train*/dev*/test* by name, else split by speaker")


class ManifestSource(_Source):
    """The user's own Parquet: uri, and where present start, duration (seconds), speaker, source, split, text."""

    kind: Literal["manifest"]
    uri: Runtime[str]
    root: Runtime[str | None] = Field(None, description="what relative uris are relative to; None = the Parquet's folder")


Source = Annotated[FolderSource | LibriSpeechSource | ManifestSource, Field(discriminator="kind")]


class Corpus(Config):
    name: str
    revision: int = Field(1, ge=1, description="raise it when files were added or changed on purpose")
    sources: tuple[Source, ...] = Field(min_length=1)
    sample_rate: int = 16_000  # paper III-B
    min_s: float = Field(0.5, gt=0)
    max_s: float = Field(60.0, gt=0, description="longer audio is cut")
    join_s: float = Field(30.0, ge=0, description="consecutive utterances of a chapter are joined up to this; 0 = off")
    dev: float = Field(0.05, ge=0, lt=0.5, description="share of hours, by speaker, where the corpus has no splits")
    test: float = Field(0.05, ge=0, lt=0.5)
    hold_out: Annotated[dict[Literal["dev", "test"], tuple[str, ...]], Later({})] = Field(
        {}, description="speakers by name that are dev or test whatever else the corpus says")
    shard_s: float = Field(3600.0, gt=0, description="audio seconds in a shard, at most")
    max_rejected: float = Field(0.05, ge=0, le=1, description="share of files that may be unusable")
    silence_db: float = Field(-70.0, description="a clip whose peak lies below this (dBFS) is silent")
    changed: Runtime[Literal["stop", "ignore"]] = Field("stop", description="what to do when the files changed")

    @model_validator(mode="after")
    def _check(self):
        names = [s.name for s in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"sources must have different names, got {names}")
        if self.min_s >= self.max_s:
            raise ValueError(f"min_s ({self.min_s}) must be below max_s ({self.max_s})")
        if both := set(self.hold_out.get("dev", ())) & set(self.hold_out.get("test", ())):
            raise ValueError(f"hold_out names {sorted(both)} as dev and as test: keep each speaker in one")
        return self


class Discriminators(Config):
    """The codec's adversary: periods and STFT windows with `codec.losses: dac`, one STFT window with `soundstream`."""

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    windows: tuple[int, ...] = (2048, 1024, 512)
    stft_window: int = Field(1024, ge=128, description="of the paper's STFT discriminator (SoundStream III-D)")
    channels: int = 32
    start_step: int = Field(1000, ge=0, description="first step of the adversarial game")


class CodecWeights(Config):
    """Weights of the generator's losses; with `codec.balance`, shares of the gradient that reaches the waveform."""

    reconstruction: float = Field(15.0, gt=0)
    waveform: float = Field(0.0, ge=0, description="of the power of the difference, relative to the original's")
    feature: float = Field(2.0, ge=0)
    adversarial: float = Field(1.0, ge=0)
    commitment: float = Field(0.25, ge=0)
    codebook: float = Field(1.0, ge=0, description="factorised codes only")


class Codec(Config):
    """SoundStream (2107.03312) at 16 kHz: strides 2, 4, 5, 8 -> 50 Hz; 12 x 1024 codes = 6 kb/s (paper IV-B)."""

    where: Where = Where()
    pretrained: Runtime[str | None] = Field(None, description="folder or URI of a transformers EnCodec, DAC or Mimi model, "
                                            "imported instead of training one; n_q and vocab must fit it")
    strides: tuple[int, ...] = (2, 4, 5, 8)
    enc_channels: int = 32
    dec_channels: int = 32
    dim: int = 128  # with C = 32: 9.9 M parameters for both sides
    n_q: int = Field(12, ge=1, le=64)
    vocab: int = Field(1024, ge=2, le=65_535)
    quantizer: Literal["ema", "factorised"] = Field("ema", description="codes that are moving averages (paper), or learned "
                                                                       "in code_dim dimensions by cosine (DAC)")
    code_dim: int = Field(8, ge=1, description="factorised codes only")
    code_decay: float = Field(0.99, gt=0, lt=1)
    quantize_from: int = Field(0, ge=0, description="first quantized step: codebooks start by k-means of latents that "
                                                    "have learned so far")
    dead_share: float = Field(0.1, description="a code is dead below this x (global frames a step / vocab)")
    losses: Literal["dac", "soundstream"] = Field("dac", description="reconstruction, discriminators and game: DAC's 16 kHz "
                                                  "recipe, or the paper's (its weights: 1, feature 100, adversarial 1)")
    weights: CodecWeights = CodecWeights()
    balance: bool = Field(False, description="scale each loss by its own gradient's running norm (EnCodec's balancer)")
    disc: Discriminators = Discriminators()
    ema: float = 0.999
    crop_s: float = 0.48
    train: Train = Train(steps=400_000, batch=64, lr=1e-4, decay_steps=200_000, betas=(0.8, 0.99), weight_decay=0.01,
                         clip=10.0, zero=0)

    @model_validator(mode="after")
    def _check(self):
        if self.quantize_from >= self.train.steps:
            raise ValueError(f"quantize_from ({self.quantize_from}) must be below train.steps ({self.train.steps})")
        if self.quantizer == "factorised" and self.balance:
            raise ValueError("quantizer factorised with balance: true ended in one code a level wherever it was tried: set "
                             "balance: false with DAC's weights, or quantizer: ema")
        return self


class CodecFigures(Config):
    """What the step `codec_figures` depends on; whether Lyra v2 stands beside the codec counts, where its models lie not."""

    where: Where
    clips: int
    clip_s: float
    coarse_levels: int
    with_lyra: bool
    visqol: bool
    lyra: Runtime[str | None]


class Tokens(Config):
    batch_s: float = Field(120.0, gt=0, description="padded audio seconds encoded at once; a rule of the shard alone")
    dtype: Annotated[Literal["float32", "bfloat16"], Later("float32")] = Field(
        "float32", description="of the masked model's work on semantic tokens; bfloat16 is for GPUs")
    speeds: Annotated[tuple[float, ...], Later([])] = Field(
        (), description="both stores also hold each train clip resampled to these speeds, for the language models alone")

    @model_validator(mode="after")
    def _check(self):
        for s in self.speeds:
            if not 0.5 <= s <= 2 or s == 1 or s != round(s, 3):
                raise ValueError(f"speeds has {s}: give speeds from 0.5 to 2 of at most three decimals; 1 is there anyway")
        if len(set(self.speeds)) < len(self.speeds):
            raise ValueError(f"speeds {self.speeds} names one twice: give each once")
        return self


class WarmStart(Config):
    uri: Runtime[str] = Field(description="folder or URI of a text model in transformers' format (lm/warm_start.py)")


class Stage(Config):
    """One language model: the paper's 12 x 1024 x 16 x 4096 by default."""

    crop_s: float
    min_crop_s: Annotated[float | None, Later(None)] = Field(
        None, ge=0, description="rows are cut further, into crops of at least this; 0 = off; None = 1 s in the fine stage")
    dim: int = 1024
    layers: int = 12
    heads: int = 16
    ff: int = 4096
    dropout: float = 0.1
    positions: Annotated[Literal["rotary", "t5"], Later("rotary")] = Field(
        "rotary", description="t5: the paper's learned bias by distance; slower (a dense bias)")
    gated: Annotated[bool, Later(False)] = Field(False, description="gated feed-forward: three matrices of ff instead of two")
    activation: Annotated[Literal["gelu", "silu"], Later("gelu")] = "gelu"
    norm: Annotated[Literal["layer", "rms"], Later("layer")] = "layer"
    checkpointing: Runtime[bool] = Field(False, description="less memory, a third more work: blocks are computed again in "
                                                            "the backward pass")
    warm_start: Annotated[WarmStart | None, Later(None)] = Field(None, description="stage 1 alone: take a text model's body")
    where: Where = Where()
    gates: Runtime[Literal["stop", "warn"]] = Field("stop", description="what a failed gate does: no better than unigrams, "
                                                                        "prefix not used, tokenizer collapsed")
    train: Train


def _lm(batch: int) -> Train:
    return Train(steps=1_000_000, batch=batch, lr=3e-4, warmup_steps=2000, decay_steps=200_000, dtype="bfloat16",
                 export="best")


class LM(Config):
    dedupe: bool = Field(True, description="collapse runs of semantic tokens in stages 1 and 2 (paper)")
    coarse_levels: int = Field(4, ge=1, description="Q', levels of the coarse stage")
    semantic: Stage = Stage(crop_s=30.0, train=_lm(256))
    coarse: Stage = Stage(crop_s=10.0, train=_lm(256))
    fine: Stage = Stage(crop_s=3.0, train=_lm(256))

    @model_validator(mode="after")
    def _check(self):
        for name in ("coarse", "fine"):
            if getattr(self, name).warm_start:
                raise ValueError(f"lm.{name}.warm_start is set: text models start lm.semantic alone, leave it out here")
        return self


class Samples(Config):
    n: int = Field(2, ge=1, description="samples of each mode")
    prompt_s: float = 3.0  # paper III-D; 4.0 for piano
    seconds: float = Field(7.0, gt=0, description="seconds generated beyond a prompt")
    temperature_semantic: float = 0.6
    temperature_coarse: float = 0.8
    temperature_fine: float = 0.6


class Evaluate(Config):
    clips: int = Field(8, ge=1, description="held-out clips for codec figures and the ladder")
    clip_s: float = Field(8.0, gt=0, description="seconds of each such clip")
    rows: int = Field(64, ge=1, description="held-out crops a stage's losses are measured on")
    visqol: bool = Field(True, description="score codecs by ViSQOL too: 2 s a clip, codec and number of levels")
    lyra: Runtime[str | None] = Field(None, description="folder or URI of Lyra v2's .tflite models, to set it beside the codec")


class Tables(Config):
    """The paper's tables, measured at the end of a run (step `tables`) and by workflows/evaluate.py."""

    suites: tuple[str, ...] = Field(("abx", "wer", "speakers", "detector", "likelihood", "attention", "temperatures", "fad"),
                                    description="of the step; empty: none")
    sounds: int = Field(20, ge=1, description="clips whose sound Table I judges")
    utterances: int = Field(100, ge=1, description="with a text, of 4 to 10 s, for Table II")
    asr: str | None = Field(None, description="folder or URI of a transformers speech recogniser; None: Whisper tiny.en")
    learned: int = Field(6, ge=1, description="utterances of a speaker that Table III's classifier learns")
    judged: int = Field(2, ge=1, description="and other ones that it judges")
    net_steps: int = Field(600, ge=1, description="of the classifiers of Table III and of the detector")
    continued: int = Field(100, ge=2, description="clips whose continuations detector, FAD, DNSMOS, text and notes judge")
    text_model: str | None = Field(None, description="folder or URI of a transformers causal model, for the suite text")
    probes: dict[str, Runtime[str]] = Field({}, description="{name: folder with a gold.csv}: sWUGGY, sBLIMP and their like")
    temperatures: tuple[float, ...] = (0.4, 0.6, 0.8, 1.0)


class Pipeline(Config):
    run: Run = Run()
    store: str = Field("./outputs", description="any fsspec URI that every node sees")
    tracking: str = Field("sqlite", description="sqlite (in the store), none, or an MLflow tracking URI")
    cluster: Cluster = Cluster()
    corpus: Corpus
    semantic: Semantic = Semantic()
    codec: Codec = Codec()
    tokens: Tokens = Tokens()
    lm: LM = LM()
    samples: Samples = Samples()
    evaluate: Evaluate = Evaluate()
    tables: Tables = Tables()

    @model_validator(mode="after")
    def _check(self):
        if self.lm.coarse_levels > self.codec.n_q:
            raise ValueError(f"lm.coarse_levels ({self.lm.coarse_levels}) exceeds codec.n_q ({self.codec.n_q})")
        known = {s.name for s in self.corpus.sources}
        sounds = self.semantic.vocoder.where if self.semantic.vocoder else Where()
        for field, where in (("semantic.where", self.semantic.where), ("semantic.vocoder.where", sounds),
                             ("codec.where", self.codec.where), ("lm.semantic.where", self.lm.semantic.where),
                             ("lm.coarse.where", self.lm.coarse.where), ("lm.fine.where", self.lm.fine.where)):
            if unknown := set(where.source or ()) - known:
                if not any(isinstance(s, ManifestSource) for s in self.corpus.sources):
                    raise ValueError(f"{field}.source names {sorted(unknown)}; corpus.sources are {sorted(known)}")
        return self

    @property
    def has_fine(self) -> bool:
        return self.lm.coarse_levels < self.codec.n_q


class ConfigError(ValueError):
    """A configuration that cannot be used; the text names the field, the value and the fix."""
