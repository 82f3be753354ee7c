"""Weights that a training begins with, in place of random ones: those of any export of this project."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from audiolm.config.base import Config, PathField, Runtime


class StartConfig(Config):
    """The export that a training goes on from (tokenizers/start.py)."""

    uri: Runtime[PathField] = Field(description="a published name, a run's index (OUTPUTS/runs/NAME.json), or folder or URI of "
                                                "a build")


class KMeansStartConfig(Config):
    """As StartConfig, of a semantic tokenizer: its z-scores stay, and its centroids are adapted by MAP."""

    uri: Runtime[PathField] = Field(description="a published name, a run's index (OUTPUTS/runs/NAME.json), or folder or URI of "
                                                "a build")
    frames: float = Field(16.0, ge=0, description="that a centroid's old place counts for, beside the corpus' own frames: "
                                                  "more and tokens keep their meaning, 0 and they follow the corpus alone")


class CodecStartConfig(Config):
    """As StartConfig, and which parts of the codec learn."""

    uri: Runtime[PathField] = Field(description="a published name, a run's index (OUTPUTS/runs/NAME.json), or folder or URI of "
                                                "a build")
    train: Literal["all", "decoder"] = Field("all", description="decoder: encoder and codebooks keep every bit, so audio "
                                                                "keeps its tokens, and what was trained on them stays valid")
