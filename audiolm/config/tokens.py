"""The section of the token stores."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from audiolm.config.base import Config, Later


class TokensConfig(Config):
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
