"""Publishes a codec: its export in float16, with the recipe, as a folder that loads like a build.

The folder is what `audiolm.pretrained` ships: export/model.safetensors, export/config.json, recipe.json. Nothing in it
names a path of the machine. The same build gives the same bytes, so the codec's hash stays.
"""

from __future__ import annotations

import posixpath
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from audiolm import store
from audiolm.dag.outputs import build_of
from audiolm.tokenizers.acoustic import load_codec
from audiolm.tokenizers.artifact import CONFIG, WEIGHTS, ArtifactError, read_export, write_export
from audiolm.tokenizers.codec_lookup import codec_folder
from audiolm.tokenizers.hf_codec import CLASSES

RECIPE = "recipe.json"
# Below it float16 has broken the first level's codebook or what stands before it. Rounding alone moves a few codes in a
# hundred there, and more at each later level, which quantizes what the earlier ones left.
LEAST_EQUAL = 0.9


@dataclass(frozen=True)
class Published:
    """A published codec, and how it compares with the build it was made of."""

    path: str
    hash: str
    size: int  # bytes of the weights
    original_size: int
    equal: float  # share of equal codes, all levels
    equal_first: float  # the same, of the first level
    codes: int  # compared
    recipe: bool  # the build had one


def publish(place: str, out: str, wavs: Sequence[np.ndarray], force: bool = False) -> Published:
    """Writes the codec of a build or of a run's index to the folder `out`; compares the codes of wav_T at 16 kHz.

    Nothing is written before the float16 codec was loaded and compared. Raises ValueError for an imported codec, for
    weights beyond float16's range, for codes that differ, and where `out` holds another codec (without `force`).
    """
    build = codec_folder(place)
    if not store.exists(store.join(build, "export", CONFIG)):
        raise ValueError(f"--codec: {build} is no codec build (no export/{CONFIG}); only codecs trained here are published, "
                         "somebody else's codec comes from its own authors")
    weights, config, _ = read_export(build)
    if config.get("kind") in CLASSES:
        raise ValueError(f"--codec: {build} is an imported codec ({config['kind']}); only codecs trained here are published, "
                         "somebody else's codec comes from its own authors")
    config = without_paths({key: value for key, value in config.items() if key != "weights_sha256"})
    with tempfile.TemporaryDirectory() as aside:
        write_export(aside, half_precision(weights), config)
        published, original = load_codec(aside), load_codec(build)
        equal, equal_first, codes = _equal_codes(original, published, wavs)
        if equal_first < LEAST_EQUAL:
            raise ValueError(f"--codec: in float16, {100 * equal_first:.1f} % of the first level's codes are those of {build}, "
                             f"at least {100 * LEAST_EQUAL:.0f} % must be: its weights do not survive float16")
        there = _hash_at(out)
        if not force and there not in (None, published.hash):
            raise ValueError(f"--out: {out} holds another codec ({there}), whose codes files this one could not decode: name "
                             "another folder, or --force")
        data = {name: store.get(store.join(aside, "export", name)) for name in (WEIGHTS, CONFIG)}
    for name, content in data.items():  # the config goes last: it names the checksum of the weights
        store.put(store.join(out, "export", name), content)
    # The export is in STEP/FINGERPRINT/BUILD/ATTEMPT; the recipe lies beside the builds.
    recipe = store.get_json(store.join(posixpath.dirname(build_of(build)), RECIPE))
    if recipe is not None:
        store.put_json(store.join(out, RECIPE), without_paths(recipe))
    elif there != published.hash:
        store.remove(store.join(out, RECIPE))  # that of the codec which was replaced
    return Published(out, published.hash, len(data[WEIGHTS]), len(store.get(store.join(build, "export", WEIGHTS))), equal,
                     equal_first, codes, recipe is not None)


def half_precision(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights with floating tensors in float16 and integers as they are.

    Raises ValueError that names a tensor with numbers which float16 cannot hold.
    """
    cast = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    if broken := [name for name, value in cast.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise ValueError(f"--codec: {', '.join(broken)} hold numbers beyond float16's 65504, or no numbers")
    return cast


def without_paths(value: Any) -> Any:
    """Plain JSON without the fields and items that are absolute paths or URIs of a machine."""
    if isinstance(value, dict):
        return {key: without_paths(v) for key, v in value.items() if not _is_path(v)}
    if isinstance(value, list):
        return [without_paths(v) for v in value if not _is_path(v)]
    return value


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and re.match(r"/|~|\.\.?/|[A-Za-z]:[\\/]|\w[\w+.-]*://", value) is not None


def _equal_codes(original: Any, published: Any, wavs: Sequence[np.ndarray]) -> tuple[float, float, int]:
    """(share of equal codes, the same of the first level, codes compared)."""
    same = []
    for wav_T in wavs:
        sound = torch.from_numpy(wav_T)[None], torch.tensor([len(wav_T)])
        same.append(original.encode(*sound)[0] == published.encode(*sound)[0])
    same_TQ = torch.cat(same).double()
    return float(same_TQ.mean()), float(same_TQ[:, 0].mean()), same_TQ.numel()


def _hash_at(folder: str) -> str | None:
    """The hash of the codec in a folder, None where there is none or half of one."""
    try:
        return read_export(folder)[2]
    except ArtifactError:
        return None
