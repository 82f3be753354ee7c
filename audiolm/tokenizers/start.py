"""Weights to start a training from, found and identified at planning time; needs no torch.

`find_export` is the one place that knows how a config names an export. The hash of the export's
bytes is part of a step's identity, their place is not. train/objectives/start.py loads them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from audiolm import store
from audiolm.config.base import Config, ConfigError, Runtime
from audiolm.config.pipeline import Pipeline
from audiolm.config.start import CodecStartConfig, KMeansStartConfig, StartConfig
from audiolm.dag.ancestry import MixedRun
from audiolm.dag.outputs import build_id
from audiolm.dag.run_index import index_path, left_out, no_step, paths_of, steps_of
from audiolm.tokenizers.artifact import CONFIG, WEIGHTS, ArtifactError

AnyStart = StartConfig | CodecStartConfig | KMeansStartConfig
SPEAKS_UNITS = ("lm_semantic", "lm_coarse", "lm_parallel", "lm_decoder")  # have a row for each semantic id
STAGES = ("semantic", "coarse", "fine", "parallel", "decoder")  # sections of lm that are trained
CODEC_KINDS = ("soundstream", "spectral")  # exports of codecs that are trained here
MASKED_FAMILY = "masked-conformer"  # of masked models trained here (extractor.FAMILY, which needs torch)
HOW = "give a run's index (OUTPUTS/runs/NAME.json), or the folder or URI of a build that holds export/"


class StartWeights(Config):
    """Config of a step that starts from weights. Their bytes identify them, wherever the files are."""

    uri: Runtime[str]  # of the build
    field: Runtime[str]  # the config field that named it, for errors
    note: Runtime[str]  # for a plan's row: "speech.json codec 1a2b3c4d"
    digest: str
    tokens: Runtime[str] = ""  # of a run that has them: the semantic tokens that a language model was trained on
    tokens_build: str = ""  # which these are


def all_started(cfg: Pipeline) -> Pipeline:
    """The config with `start` handed down to each part that is trained and says none of its own.

    A part that the system there lacks begins with random weights.  Raises ConfigError where there is no such system.
    """
    if cfg.start is None:
        return cfg
    try:
        there = steps_of(cfg.start)
        if others := left_out(cfg.start):
            raise MixedRun(f"{next(iter(others.values()))}: finish that run, or name a part's own start")
    except MixedRun as e:
        raise ConfigError(f"start: {cfg.start} is no one system: {e}") from e
    except (ValueError, OSError) as e:
        raise ConfigError(f"start: {cfg.start} is no published system and no run's index: give a name or "
                          "OUTPUTS/runs/NAME.json, or start=null to train from nothing") from e

    def begun(part, kind: type[AnyStart], *steps: str):
        if part is None or part.start or not set(steps) & there.keys():
            return part
        return part.model_copy(update={"start": kind(uri=cfg.start)})

    sem, lm, codec = cfg.semantic, cfg.lm, cfg.codec
    if not (sem.pretrained or sem.tokenizer):
        sem = sem.model_copy(update={"model": begun(sem.model, StartConfig, "masked_model", "kmeans"),
                                     "kmeans": begun(sem.kmeans, KMeansStartConfig, "kmeans")})
    lm = lm.model_copy(update={name: begun(getattr(lm, name), StartConfig, f"lm_{name}") for name in STAGES
                               if name != "semantic" or not lm.semantic.warm_start})
    return cfg.model_copy(update={"semantic": sem, "lm": lm,
                                  "codec": codec if codec.pretrained else begun(codec, CodecStartConfig, "codec")})


def start_weights(field: str, start: AnyStart, step: str) -> StartWeights:
    """The weights that the step `step` starts from: `codec`, `masked_model`, `kmeans` or `lm_*`.

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
    of_run = name.endswith(".json")
    place = f"{name} {step}" if of_run else "/".join(build.split("/")[-4:])
    tokens = paths_of(start.uri).get("semantic_tokens", "") if of_run and step in SPEAKS_UNITS else ""
    return StartWeights(uri=build, field=field, note=f"{place} {digest[:8]}", digest=digest, tokens=tokens,
                        tokens_build=build_id(tokens) if tokens else "")


def refuse_own_run(cfg: Pipeline) -> None:
    """Raises ConfigError where a start names the index of the very run that it is for.

    That index names the trained step afterwards, so that each command would start another training.
    """
    sem, lm = cfg.semantic, cfg.lm
    parts = {"codec": cfg.codec, "semantic.model": sem.model, "semantic.kmeans": sem.kmeans,
             **{f"lm.{name}": getattr(lm, name) for name in STAGES}}
    places = {f"{name}.start.uri": part.start.uri for name, part in parts.items() if part and part.start}
    places |= {"semantic.tokenizer.uri": sem.tokenizer.uri} if sem.tokenizer else {}
    own = store.absolute(index_path(cfg.store, cfg.run.name))
    for field, uri in {"start": cfg.start, **places}.items():
        if uri and store.absolute(uri) == own:
            raise ConfigError(f"{field}: {uri} is this run's own index, which will name what it trains: give the new run a "
                              f"name of its own, run.name={cfg.run.name}-adapted")


def require_same(start: StartWeights, settings: Mapping[str, tuple[Any, Any]]) -> None:
    """Raises ValueError where settings, {config field: (its value, the export's)}, differ; it says what to set."""
    wrong = [f"{field} is {ours!r}: set it to {theirs!r}" for field, (ours, theirs) in settings.items() if ours != theirs]
    if wrong:
        raise ValueError(f"{start.field}: {start.uri} holds a model of another shape: {'; '.join(wrong)}")


def require_unchanged(start: StartWeights, digest: str) -> None:
    """Raises ArtifactError where an export is not the planned one any more."""
    if digest != start.digest:
        raise ArtifactError(f"{start.field}: the export at {start.uri} changed since this run was planned ({start.digest} -> "
                            f"{digest}): start it again")


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
    if step == "masked_model":  # a published system has its tokenizer alone, which holds the encoder
        names = names or [n for n in steps if n == "kmeans"]
    if not names:
        raise LookupError(f"{no_step(uri, [step])}, there are {', '.join(steps)}: {HOW}")
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
    if step == "kmeans":
        return about.get("family") == MASKED_FAMILY and "k" in about
    if step == "lm_decoder":
        return about.get("kind") == "hearing"
    return about.get("kind") in ("lm", "parallel") and about["stage"]["name"] == step.removeprefix("lm_")
