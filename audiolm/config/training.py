"""The part of the configuration that every training step has: one training run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from audiolm.config.base import Config, Later, LengthOnly, Runtime


class RollbackConfig(Config):
    """The definition of a spike of the loss (train/guards.py)."""

    deviations: float = Field(10.0, gt=0, description="above the median of the window, in standard deviations")
    window: int = Field(100, ge=4, description="steps; no spike is seen before there were as many, but for a loss of nan")


class TrainConfig(Config):
    """One training run: warm-up, constant, decay to zero over the last `decay_steps`.

    Runs that differ in `steps` and `decay_steps` alone are one trunk up to their decay: the longer one continues.
    """

    steps: LengthOnly[int] = Field(ge=1)
    batch: int = Field(ge=1, description="rows of the global batch, over all workers")
    lr: float = Field(gt=0)
    warmup_steps: int = Field(0, ge=0)
    decay_steps: LengthOnly[int] = Field(0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = Field(1.0, ge=0, description="global gradient norm; 0 = off")
    eval_every: int = Field(1000, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    export: Literal["best", "last"] = Field("last", description="which weights later steps load: best by validation")
    patience: Annotated[int | None, Later(None)] = Field(None, ge=1, description="validations in a row without a new best "
                                                         "that end the training early; None = never")
    rollback: Annotated[RollbackConfig | None, Later(None)] = Field(
        None, description="go back to the newest checkpoint when the loss spikes and skip those rows, three times at most")
    micro_batch: Runtime[Annotated[int, Field(ge=1)] | Literal["auto"] | None] = Field(
        None, description="rows a forward pass; None = the worker's share; auto = measured, as many as fit the GPU; "
                          "changes nothing but rounding and which units dropout hits")
    save_every: Runtime[int] = Field(1000, ge=1)
    keep: Runtime[int] = Field(2, ge=1, description="checkpoints kept besides the best and the trunk's last")
    log_every: Runtime[int] = Field(10, ge=1)
    engine: Runtime[Literal["deepspeed", "torch"]] = "deepspeed"
    zero: Runtime[int] = Field(1, ge=0, le=3, description="DeepSpeed ZeRO stage; 3 is neither compiled nor for codecs")

    @property
    def trunk_steps(self) -> int:
        """Updates before the decay begins."""
        return self.steps - self.decay_steps

    @model_validator(mode="after")
    def _check(self):
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) + decay_steps ({self.decay_steps}) exceed "
                             f"steps ({self.steps})")
        if self.patience and self.export != "best":
            raise ValueError(f"patience ({self.patience}) ends a training past its best, and export is {self.export!r}: set "
                             "export: best, or leave patience out")
        return self
