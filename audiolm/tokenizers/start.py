"""Weights to start a training from, found and identified at planning time; needs no torch.

`find_export` is the one place that knows how a config names an export. The hash of the export's
bytes is part of a step's identity, their place is not. train/objectives/start.py loads them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from audiolm import store
from audiolm.config.base import Config, ConfigError, Runtime
from audiolm.config.start import CodecStartConfig, StartConfig
from audiolm.dag.run_index import index_path, steps_of
from audiolm.tokenizers.artifact import CONFIG, WEIGHTS

CODEC_KINDS = ("soundstream", "spectral")  # exports of codecs that are trained here
MASKED_FAMILY = "masked-conformer"  # of masked models trained here (extractor.FAMILY, which needs torch)
HOW = "give a run's index (OUTPUTS/runs/NAME.json), or the folder or URI of a build that holds export/"


class StartWeights(Config):
    """Config of a step that starts from weights. Their bytes identify them, wherever the files are."""

    uri: Runtime[str]  # of the build
    field: Runtime[str]  # the config field that named it, for errors
    note: Runtime[str]  # for a plan's row: "speech.json codec 1a2b3c4d"
    digest: str


def start_weights(field: str, start: StartConfig | CodecStartConfig, step: str) -> StartWeights:
    """The weights that the step `step` starts from: `codec`, `masked_model` or `lm_*`.

    Raises ConfigError, naming `field`, where there is no export, or one of another kind.
    """
    try:
        build = find_export(start.uri, step)
        about, digest = json.loads(store.get(store.join(build, "export", CONFIG))), _digest(build)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise ConfigError(f"{field}: {start.uri} holds no export/{CONFIG} and export/{WEIGHTS}: {HOW}") from e
    except LookupError as e:
        raise ConfigError(f"{field}: {e.args[0]}") from e
    except Exception as e:  # noqa: BLE001  filesystems raise many kinds, and none of them names the field
        raise ConfigError(f"{field}: {start.uri} cannot be read ({type(e).__name__}: {e}): {HOW}") from e
    if not _fits(step, about):
        kind = about.get("kind") or about.get("family")
        kind = f"lm_{about['stage']['name']}" if kind == "lm" else kind
        raise ConfigError(f"{field}: {start.uri} holds the export of a {kind!r}, and this step starts from that of a step "
                          f"{step} that was trained here: name such a build")
    name = start.uri.rstrip("/").rsplit("/", 1)[-1]
    place = f"{name} {step}" if name.endswith(".json") else "/".join(build.split("/")[-4:])
    return StartWeights(uri=build, field=field, note=f"{place} {digest[:8]}", digest=digest)


def refuse_own_run(folder: str, run: str, starts: Mapping[str, StartConfig | CodecStartConfig | None]) -> None:
    """Raises ConfigError where a start, by config field, names the index of the very run that it is for.

    That index names the trained step afterwards, so that each command would start another training.
    """
    own = store.absolute(index_path(folder, run))
    for field, start in starts.items():
        if start and store.absolute(start.uri) == own:
            raise ConfigError(f"{field}.uri: {start.uri} is this run's own index, which will name what it trains: give the new "
                              f"run a name of its own, run.name={run}-adapted")


def find_export(uri: str, step: str) -> str:
    """The build that `uri` names, for a step: a run's index names its step of that name, and of the
    masked models the last; else `uri` is a build (or its export/) itself, on any filesystem of fsspec.

    Raises LookupError where a run's index names no such step, FileNotFoundError where it is missing.
    """
    if not uri.endswith(".json"):
        return uri.rstrip("/").removesuffix("/export")
    if not store.exists(uri):
        raise LookupError(f"there is no run index {uri}: {HOW}")
    steps = steps_of(uri)
    # Iterations of HuBERT are masked_model_2, masked_model_3 ...: the index lists steps in their order.
    names = [n for n in steps if n == step or (step == "masked_model" and n.startswith("masked_model_"))]
    if not names:
        raise LookupError(f"{uri} names no finished step {step}, there are {', '.join(steps)}: {HOW}")
    return steps[names[-1]]


def _digest(build: str) -> str:
    """16 hex digits of SHA-256 over the export's bytes, as `read_export` has it."""
    sha = hashlib.sha256()
    for name in (WEIGHTS, CONFIG):
        for piece in store.pieces(store.join(build, "export", name)):
            sha.update(piece)
    return sha.hexdigest()[:16]


def _fits(step: str, about: dict) -> bool:
    if step == "codec":
        return about.get("kind") in CODEC_KINDS
    if step == "masked_model":
        return about.get("family") == MASKED_FAMILY
    return about.get("kind") in ("lm", "parallel") and about["stage"]["name"] == step.removeprefix("lm_")
