"""The sections of the language models and of the samples that they generate."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from audiolm.config.base import Config, Later, PathField, Runtime
from audiolm.config.corpus import ClipFilter
from audiolm.config.start import StartConfig
from audiolm.config.training import TrainConfig


class WarmStartConfig(Config):
    uri: Runtime[PathField] = Field(description="folder or URI of a text model in transformers' format (lm/warm_start.py)")


class DepthConfig(Config):
    """The small network over the levels of a frame, in a stage of kind frame (models/lm/depth.py)."""

    dim: int = 256
    layers: int = Field(1, ge=1)
    ff: int = 512


class StageConfig(Config):
    """One language model: the paper's 12 x 1024 x 16 x 4096 by default."""

    crop_s: float  # 30, 10 and 3 s in the paper
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
    kind: Annotated[Literal["flat", "frame"], Later("flat")] = Field(
        "flat", description="of lm.coarse: flat takes every code as a position (paper); frame takes a frame's codes as one "
                            "(RQ-Transformer, 2203.01941), for 3 (of 4 levels) to 8 times (of 12) fewer positions")
    depth: Annotated[DepthConfig | None, Later(None)] = Field(
        None, description="of kind frame: the network that predicts a frame's codes one after another; None = one layer of "
                          "the stage's dim, ff twice that")
    replaced: Annotated[float, Later(0.0)] = Field(
        0.0, ge=0, le=0.5, description="of kind frame: mean share of a training row's frames that others of the row replace "
                                       "where they are read; a stage that reads its own draws then keeps to its tokens")
    own: Annotated[float, Later(0.0)] = Field(
        0.0, ge=0, le=0.5, description="as replaced, by what the stage itself draws (parallel scheduled sampling, 1906.04331); "
                                       "costs passes without gradients")
    own_from: Annotated[int, Later(0)] = Field(
        0, ge=0, description="of own: the first step with draws, as those of a stage that knows nothing yet teach little")
    passes: Annotated[int, Later(1)] = Field(
        1, ge=1, description="of own: the first draws after true frames, each further one after frames of the pass before, as "
                             "generation does")
    checkpointing: Runtime[bool] = Field(False, description="less memory, a third more work: blocks are computed again in "
                                                            "the backward pass")
    warm_start: Annotated[WarmStartConfig | None, Later(None)] = Field(
        None, description="stage 1 alone: take a text model's body")
    start: Annotated[StartConfig | None, Later(None)] = Field(
        None, description="weights at the start, of a model of the same stage, shape and vocabulary")
    where: ClipFilter = ClipFilter()
    gates: Runtime[Literal["stop", "warn"]] = Field("stop", description="what a failed gate does: no better than unigrams, "
                                                                        "prefix not used, tokenizer collapsed")
    train: TrainConfig

    @property
    def depth_sizes(self) -> DepthConfig:
        """`depth`, or what None stands for."""
        return self.depth or DepthConfig(dim=self.dim, ff=2 * self.dim)


class ParallelConfig(Config):
    """The parallel decoder (SoundStorm, 2305.09636): a Conformer on acoustic frames, of the paper's size by default."""

    crop_s: float = 10.0
    dim: int = 1024
    layers: int = 12
    heads: int = 16
    ff: int = 4096
    conv_kernel: int = 5
    dropout: float = 0.1
    start: StartConfig | None = Field(None, description="weights at the start, of a decoder of the same shape and vocabulary")
    where: ClipFilter = ClipFilter()
    gates: Runtime[Literal["stop", "warn"]] = Field("stop", description="as of the stages")
    train: TrainConfig


class DecoderConfig(Config):
    """The decoder that hears: sound from codes and semantic tokens together (models/spectral/hearing.py)."""

    slow_s: float = Field(0.6, ge=0, description="seconds over which it averages the codes: longer and the words depend on the "
                                                 "tokens alone, shorter and the voice is closer")
    drawn: Annotated[int, Later(0)] = Field(
        0, ge=0, description="passes in which stage 2 draws the codes that it learns from (as lm.coarse.passes), so that "
                             "it learns how far to believe them; 0: recorded codes; for lm.coarse.kind=frame with all levels")
    crop_s: float = Field(3.0, gt=0)
    width: int = Field(256, ge=1)
    layers: int = Field(5, ge=0)
    start: Annotated[StartConfig | None, Later(None)] = Field(
        None, description="weights at the start, of a decoder of the same sizes")
    where: ClipFilter = ClipFilter()
    train: TrainConfig


# The paper gives neither optimizer nor learning rate; batch 256 and 1 M steps are its own.
def _stage_training(batch: int) -> TrainConfig:
    return TrainConfig(steps=1_000_000, batch=batch, lr=3e-4, warmup_steps=2000, decay_steps=200_000, dtype="bfloat16",
                       export="best", zero=2, micro_batch=16)


class LMConfig(Config):
    """The three stages and the layout of their sequences (paper III-C)."""

    acoustic: Literal["stages", "parallel"] = Field(
        "stages", description="what predicts the codes: stages coarse and fine (paper), or one parallel decoder of all levels "
                              "(SoundStorm), which is many times as fast")
    dedupe: bool = Field(True, description="collapse runs of semantic tokens in stage 1, and without lengths in stage 2")
    lengths: bool = Field(True, description="stage 1 also predicts how long each token lasts, so that stages 2 and 3 know the "
                                            "token of every frame; the paper's does not")
    conditioning: Literal["aligned", "prefix"] = Field(
        "aligned", description="what stages 2 and 3 are told: the prefix alone (paper), or beside it each frame's own token or "
                               "coarse codes, added to the ids that predict the frame")
    condition_dropout: float = Field(0.1, ge=0, lt=1, description="share of training documents without prefix and condition; "
                                                                  "above 0 generation may use guidance")
    tied: bool = Field(True, description="tie stages 2's and 3's embeddings and heads to the codec's code vectors; the paper's "
                                         "are free")
    centroids: Annotated[bool, Later(False)] = Field(
        True, description="embeddings of semantic ids begin at their clusters' centroids, so that like ids are alike from the "
                          "first step on; the paper's are random")
    coarse_levels: int = Field(4, ge=1, description="Q', levels of the coarse stage")
    ablation: Literal["acoustic"] | None = Field(None, description="acoustic: stage 2 without semantic tokens, the paper's "
                                                                   "ablation; its sounds keep a voice and say nothing")
    semantic: StageConfig = StageConfig(crop_s=30.0, train=_stage_training(256))
    coarse: StageConfig = StageConfig(crop_s=10.0, train=_stage_training(256))
    fine: StageConfig = StageConfig(crop_s=3.0, train=_stage_training(256))
    parallel: ParallelConfig = ParallelConfig(train=_stage_training(256))
    decoder: Annotated[DecoderConfig | None, Later(None)] = Field(
        None, description="for the spectral codec: a decoder that also hears the semantic tokens makes the generated sound, so "
                          "that words survive badly drawn codes; None: the codec's own does (paper)")

    @model_validator(mode="after")
    def _check(self):
        if self.lengths and not self.dedupe:
            raise ValueError("lm.lengths counts the frames of deduplicated tokens, and lm.dedupe is false: drop one of them")
        if self.acoustic == "parallel" and self.dedupe and not self.lengths:
            raise ValueError("lm.acoustic is parallel, which needs the token of every frame, but lm.dedupe is true and "
                             "lm.lengths false: set lm.lengths=true or lm.dedupe=false")
        if self.conditioning == "aligned" and self.dedupe and not self.lengths:
            raise ValueError("lm.conditioning is aligned, but with lm.dedupe and without lm.lengths no token has a place in "
                             "time: set lm.lengths=true, lm.dedupe=false or lm.conditioning=prefix")
        if self.decoder and self.dedupe and not self.lengths:
            raise ValueError("lm.decoder hears the token of every frame, which lm.dedupe without lm.lengths does not keep: set "
                             "lm.lengths=true, lm.dedupe=false or lm.decoder=null")
        if self.decoder and self.ablation:
            raise ValueError("lm.ablation makes sound without semantic tokens, and lm.decoder would hear them: drop one")
        if self.decoder and self.decoder.drawn and (self.acoustic, self.coarse.kind) != ("stages", "frame"):
            raise ValueError(f"lm.decoder.drawn needs a stage 2 that draws frames, and lm.acoustic is {self.acoustic}, "
                             f"lm.coarse.kind {self.coarse.kind}: set stages and frame, or lm.decoder.drawn=0")
        if self.ablation and self.acoustic == "parallel":
            raise ValueError("lm.ablation is of stage 2, and lm.acoustic is parallel, which has none: drop one of them")
        if self.ablation and self.dedupe and not self.lengths:
            raise ValueError("lm.ablation leaves stage 2 without tokens that tell how long a sound lasts: set lm.lengths=true "
                             "or lm.dedupe=false")
        if self.semantic.warm_start and self.semantic.start:
            raise ValueError("lm.semantic has warm_start, a text model's body, and start, a whole stage: drop one of them")
        if self.coarse.kind == "frame" and self.dedupe and not self.lengths:
            raise ValueError("lm.coarse.kind is frame, but with lm.dedupe and without lm.lengths no frame has a place in time: "
                             "set lm.lengths=true, lm.dedupe=false or lm.coarse.kind=flat")
        for field in ("replaced", "own"):
            if (share := getattr(self.coarse, field)) and self.coarse.kind == "flat":
                raise ValueError(f"lm.coarse.{field} is {share}, but a flat stage reads codes of the frame that it predicts "
                                 f"among those before it: set lm.coarse.kind=frame or lm.coarse.{field}=0")
            for name in ("semantic", "fine"):
                if getattr(getattr(self, name), field):
                    raise ValueError(f"lm.{name}.{field} is set: only lm.coarse has frames as positions, leave it out here")
        for name in ("semantic", "coarse", "fine"):
            size = getattr(self, name)
            for field, unset in (("passes", 1), ("own_from", 0)):
                if (value := getattr(size, field)) != unset and not size.own:
                    raise ValueError(f"lm.{name}.{field} is {value}, and lm.{name}.own, whose draws it is of, is 0: set "
                                     f"lm.coarse.own or leave lm.{name}.{field} out")
        if self.coarse.own and self.coarse.own_from >= self.coarse.train.steps:
            raise ValueError(f"lm.coarse.own_from is {self.coarse.own_from}, and the training ends at step "
                             f"{self.coarse.train.steps}: set it below lm.coarse.train.steps, or lm.coarse.own=0")
        for name in ("semantic", "fine"):
            if getattr(self, name).kind == "frame":
                raise ValueError(f"lm.{name}.kind is frame: only lm.coarse has frames as positions, leave it out here")
        for name in ("coarse", "fine"):
            if getattr(self, name).warm_start:
                raise ValueError(f"lm.{name}.warm_start is set: text models start lm.semantic alone, leave it out here")
        return self


    def layout(self, stage: str) -> dict[str, Any]:
        """The fields that say how the sequences of a stage (lm_NAME) look, so that others do not train it anew."""
        if stage == "lm_semantic":
            return {"dedupe": self.dedupe, "lengths": self.lengths, "conditioning": "prefix", "tied": False,
                    "centroids": self.centroids}
        if stage == "lm_parallel":
            return {name: getattr(self, name) for name in ("condition_dropout", "tied", "centroids")}
        own = ("conditioning", "condition_dropout", "tied", "coarse_levels", "ablation")
        tokens = ("dedupe", "lengths", "centroids") if stage == "lm_coarse" else ()
        return {name: getattr(self, name) for name in tokens + own}


class SamplesConfig(Config):
    """The sound that a run generates at its end; temperatures as in the paper."""

    n: int = Field(2, ge=1, description="samples of each mode")
    prompt_s: float = 3.0  # paper III-D; 4.0 for piano
    seconds: float = Field(7.0, gt=0, description="seconds generated beyond a prompt")
    temperature_semantic: float = 0.6
    temperature_coarse: float = 0.8
    temperature_fine: float = 0.6
    guidance: float = Field(1.0, gt=0, description="of the acoustic stages: above 1 moves their scores away from those without "
                                                   "the condition; needs lm.condition_dropout; 1 = off (paper)")
