"""The limits of a system that MLflow serves; saved with the model, and set anew where it is served."""

from __future__ import annotations

from pydantic import Field

from audiolm.config.base import Config


class ServeConfig(Config):
    """What one request may ask for, and how many may wait."""

    max_sounds: int = Field(32, ge=1, description="sounds of a request: the samples of all its rows together")
    max_mb: float = Field(20.0, gt=0, description="megabytes of a request's audio files, base64 removed")
    max_prompt_s: float = Field(60.0, gt=0, description="seconds of a row's audio; no more than this is decoded")
    max_channels: int = Field(8, ge=1, description="channels of a row's audio")
    max_waiting: int = Field(3, ge=0, description="requests that wait while one is answered; further ones are refused")
