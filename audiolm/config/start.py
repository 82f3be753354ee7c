"""Weights that a training begins with, in place of random ones: those of any export of this project."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from audiolm.config.base import Config, PathField, Runtime


class StartConfig(Config):
    """The export that a training goes on from (tokenizers/start.py)."""

    uri: Runtime[PathField] = Field(description="a published name, a run's index (OUTPUTS/runs/NAME.json), or folder or URI of "
                                                "a build")


class CodecStartConfig(Config):
    """As StartConfig, and which parts of the codec learn."""

    uri: Runtime[PathField] = Field(description="a published name, a run's index (OUTPUTS/runs/NAME.json), or folder or URI of "
                                                "a build")
    train: Literal["all", "decoder"] = Field("all", description="decoder: encoder and codebooks keep every bit, so audio "
                                                                "keeps its tokens, and what was trained on them stays valid")
