"""Inputs of the steps that measure the semantic side, with the digests of their files; importable without torch.

Paths are Runtime; the bytes of the item file and of the alignment are part of the identity through their digests.
"""

from __future__ import annotations

import hashlib

from pydantic import Field

from audiolm import store
from audiolm.config.base import Config, PathField, Runtime
from audiolm.config.corpus import ClipFilter
from audiolm.config.semantic import AbxConfig


class AbxFilesConfig(Config):
    """Inputs of a step that measures ABX: the bytes of the items count, their path does not."""

    items: Runtime[PathField]
    audio: Runtime[tuple[PathField, ...]]
    digest: str
    speakers: tuple[str, ...] | None


class SemanticMetricsConfig(Config):
    """Inputs of the step `semantic_figures`."""

    where: ClipFilter = Field(ClipFilter(), description="clips of the statistics; speakers of its train clips are seen ones")
    items: Runtime[PathField | None] = Field(None, description="ZeroSpeech item file; None: no ABX")
    digest: str | None = Field(None, description="of the item file")
    audio: Runtime[tuple[PathField, ...]] = ()
    phones: Runtime[PathField | None] = Field(None, description="alignment; None: no phone-by-token matrix")
    phones_digest: str | None = None
    speakers: tuple[str, ...] | None = Field(None, description="held out; None: those of the items not trained on")
    examples: int = Field(24, ge=0, description="tokens, from the most used, that can be listened to")


def semantic_metrics_config(abx: AbxConfig | None, where: ClipFilter | None = None) -> SemanticMetricsConfig:
    """The step's config from semantic.abx and semantic.where; reads both files. Raises ValueError where one is missing."""
    where = where or ClipFilter()
    if abx is None:
        return SemanticMetricsConfig(where=where)
    return SemanticMetricsConfig(where=where, items=abx.items, digest=_digest("semantic.abx.items", abx.items), audio=abx.audio,
                                 phones=abx.phones, speakers=abx.speakers,
                                 phones_digest=_digest("semantic.abx.phones", abx.phones) if abx.phones else None)


def abx_files_config(abx: AbxConfig) -> AbxFilesConfig:
    """For the steps that choose by ABX. Raises ValueError where the item file is missing."""
    return AbxFilesConfig(items=abx.items, audio=abx.audio, digest=_digest("semantic.abx.items", abx.items),
                          speakers=abx.speakers)


def _digest(field: str, path: str) -> str:
    try:
        return hashlib.sha256(store.get(path)).hexdigest()[:16]
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
        raise ValueError(f"{field} is {path!r}, and there is no such file: give its path or URI, or leave semantic.abx "
                          "out") from e
