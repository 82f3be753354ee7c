"""Exports, the models that finished steps leave in {build}/export for later steps.

model.safetensors holds tensors by name; config.json says how to rebuild the module from them, and
carries `weights_sha256`, the checksum of the weights' bytes, which is verified on load. No pickle
is read or written. torch is imported by the calls alone, so that a plan needs none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from audiolm import store

if TYPE_CHECKING:
    import torch

WEIGHTS, CONFIG = "model.safetensors", "config.json"
AGAIN = "give the run's command once more with --repair"
MASKED_FORMAT = "audiolm-masked-1"  # of a masked model's export, trained here or imported


class ArtifactError(ValueError):
    """An export that is incomplete, altered, or of another kind.

    The text names path, field and fix.
    """


def identities(steps: Mapping[str, str]) -> dict[str, list[str | None]]:
    """{step: [its folder, SHA-256 of its export's weights, None without one]}.

    For keys of what is kept: a build never changes, but the folder of a published system may get other weights.
    """
    abouts = {step: store.get_json(store.join(path, "export", CONFIG)) or {} for step, path in steps.items()}
    return {step: [store.absolute(path), abouts[step].get("weights_sha256")] for step, path in steps.items()}


def read_export(build: str) -> tuple[dict[str, torch.Tensor], dict, str]:
    """(weights, config, digest) of {build}/export.

    The digest is of the bytes of both files. Raises ArtifactError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = []
    for name in (WEIGHTS, CONFIG):
        path = store.join(build, "export", name)
        try:
            data.append(store.get(path))
        except FileNotFoundError as e:
            raise ArtifactError(f"{path} is missing: the step that leaves it has not finished") from e
    try:
        weights, config = data[0], json.loads(data[1])
    except ValueError as e:
        raise ArtifactError(f"{build}/export/{CONFIG} is cut or altered ({e}); {AGAIN}") from e
    expected = config.get("weights_sha256")
    if expected is not None and hashlib.sha256(weights).hexdigest() != expected:
        raise ArtifactError(f"{build}/export: model.safetensors is not the file that config.json describes (sha256 "
                            f"{expected[:16]}...); {AGAIN}")
    try:
        tensors = load(weights)
    except SafetensorError as e:
        raise ArtifactError(f"{build}/export/{WEIGHTS} is cut or altered ({e}); {AGAIN}") from e
    return tensors, config, hashlib.sha256(data[0] + data[1]).hexdigest()[:16]


def write_export(build: str, weights: Mapping[str, torch.Tensor] | bytes, config: Mapping[str, Any]) -> str:
    """Writes {build}/export from tensors by name, or from the bytes of a safetensors file.

    The config goes last: where it is, the weights are whole.  Returns their SHA-256.
    """
    from safetensors.torch import save

    if not isinstance(weights, bytes):
        weights = save({name: value.detach().cpu().contiguous() for name, value in weights.items()})
    digest = hashlib.sha256(weights).hexdigest()
    store.put(store.join(build, "export", WEIGHTS), weights)
    store.put_json(store.join(build, "export", CONFIG), {**config, "weights_sha256": digest})
    return digest


def require_keys(build: str, config: Mapping[str, Any], kind: str, keys: Sequence[str], what: str) -> None:
    """Raises ArtifactError for an export of another `kind` and for a config without some of `keys`.
    """
    missing = [key for key in keys if key not in config]
    if config.get("kind") != kind or missing:
        raise ArtifactError(f"{build}/export/config.json is no {what}'s (kind {config.get('kind')!r}, without "
                            f"{', '.join(missing) or 'nothing'}): give the path of a {what} build, or run its step again")


def fill_module(build: str, module: torch.nn.Module, weights: Mapping[str, torch.Tensor], what: str) -> None:
    """Loads the weights into the module. Raises ArtifactError where names or shapes differ."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as e:
        raise ArtifactError(f"{build}/export: the weights do not fit the {what} that config.json describes: {e}") from e
