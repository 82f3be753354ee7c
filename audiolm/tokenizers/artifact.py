"""Semantic tokens: encoder features at one layer, z-scored per dimension, then the nearest centroid (paper III-B).

ONE self-describing artefact, {kmeans build}/export/: model.safetensors (`encoder.*` with the input's statistics,
`zscore.mean`, `zscore.std`, `centroids`) and config.json (format, family, encoder sizes, layer and its convention, sample
rate, k, window, sha256 of the weights, golden tokens).  Whatever does not match is refused on load.  Legend: wav_BT
float32 at 16 kHz, lengths_B true samples, features_BTD and codes_T1 at 25 Hz.
"""

from __future__ import annotations

import hashlib
import json

import torch
from safetensors.torch import load

from audiolm import store


class ArtifactError(ValueError):
    """An export that is incomplete, altered, or of another kind; the text names the path, the field and the fix."""


def read_export(build: str) -> tuple[dict[str, torch.Tensor], dict, str]:
    """(weights, config, digest) of {build}/export; the digest is of the bytes of both files. Raises ArtefactError."""
    data = []
    for name in ("model.safetensors", "config.json"):
        path = store.join(build, "export", name)
        try:
            data.append(store.get(path))
        except FileNotFoundError as e:
            raise ArtifactError(f"{path} is missing: the step that leaves it has not finished") from e
    weights, config = data[0], json.loads(data[1])
    expected = config.get("weights_sha256")
    if expected is not None and hashlib.sha256(weights).hexdigest() != expected:
        raise ArtifactError(f"{build}/export: model.safetensors is not the file that config.json describes (sha256 "
                            f"{expected[:16]}...); run the step that left it again")
    return load(weights), config, hashlib.sha256(data[0] + data[1]).hexdigest()[:16]
