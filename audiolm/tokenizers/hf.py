"""Models in transformers' format: a folder or URI with config.json and model.safetensors.

Codecs (hf_codec.py), encoders (hf_encoder.py) and text models (lm/warm_start.py) share this: the
digest that stands for a model in a plan, reading, building, and errors that name the config field,
the file and the fix. Pickles are never read. A plan calls `imported_codec`, `imported_encoder` and
`text_model`, which need neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from audiolm import store
from audiolm.config.base import Config, Runtime
from audiolm.config.installed import require
from audiolm.tokenizers.artifact import CONFIG, WEIGHTS, ArtifactError

if TYPE_CHECKING:
    import torch

# Unpickling runs code of whoever made the file, so these are named in errors and never opened.
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class ModelFiles:
    """The files of one kind of model.

    Digests are in build fingerprints, so the order of the names must not change.
    """

    field: str  # the config field that gives the place, which errors name
    what: str
    names: tuple[str, ...]
    optional: tuple[str, ...] = ()


CODEC = ModelFiles("codec.pretrained", "codec", (WEIGHTS, CONFIG))
# transformers 5 writes processor_config.json where a tokenizer is saved along (fine-tuned models).
ENCODER = ModelFiles("semantic.pretrained.uri", "encoder", (CONFIG, WEIGHTS),
                     ("preprocessor_config.json", "processor_config.json"))
TEXT_MODEL = ModelFiles("lm.semantic.warm_start.uri", "text model", (CONFIG, WEIGHTS))


class PretrainedModel(Config):
    """Config of a step that takes a model over. Its bytes identify it, wherever the files are."""

    uri: Runtime[str]
    digest: str


class ImportedCodec(Config):
    """Config of the step `codec` with codec.pretrained.

    `n_q` and `vocab` are those that the stages expect.
    """

    uri: Runtime[str]
    digest: str
    n_q: int
    vocab: int


@dataclass(frozen=True)
class ModelBytes:
    """A model as read. `json` is by file name (the files that are there), `weights` by tensor name.
    """

    digest: str
    json: dict[str, dict]
    weights: dict[str, torch.Tensor]
    safetensors: bytes


def imported_codec(uri: str, n_q: int, vocab: int) -> ImportedCodec:
    """Raises ArtifactError (a ValueError) where a file is missing, as the two below do."""
    return ImportedCodec(uri=uri, digest=_digest(CODEC, uri, store.pieces), n_q=n_q, vocab=vocab)


def imported_encoder(uri: str) -> PretrainedModel:
    return PretrainedModel(uri=uri, digest=_digest(ENCODER, uri, store.pieces))


def text_model(uri: str) -> PretrainedModel:
    return PretrainedModel(uri=uri, digest=_digest(TEXT_MODEL, uri, store.pieces))


def _digest(files: ModelFiles, uri: str, read: Callable[[str], Iterable[bytes]]) -> str:
    """16 hex digits of SHA-256 over the bytes that `read` gives of each file.

    Optional files are hashed one by one, because a joint hash could not say which of them is there.
    """
    joint, digests = hashlib.sha256(), {}
    for name in files.names + files.optional:
        sha = hashlib.sha256() if files.optional else joint
        try:
            for piece in read(store.join(uri, name)):
                sha.update(piece)
            digests[name] = sha.hexdigest()
        except (FileNotFoundError, NotADirectoryError) as e:
            if name in files.names:
                raise _missing(files, uri, name) from e
    if files.optional:
        joint.update(json.dumps(digests, sort_keys=True).encode())
    return joint.hexdigest()[:16]


def _missing(files: ModelFiles, uri: str, name: str) -> ArtifactError:
    pickle = next((n for n in store.names(uri) if n.endswith(PICKLES)), None)
    why = f"; {pickle} is a pickle, which is never read" if pickle else ""
    return ArtifactError(f"{files.field}: {uri} holds no {name}{why}. A pretrained {files.what} is a folder or URI with "
                         "config.json and one model.safetensors: load the model with transformers and save it again with "
                         "save_pretrained(folder, max_shard_size='1TB')")


def read_model(files: ModelFiles, uri: str, planned: str | None = None) -> ModelBytes:
    """The files of a model, read whole.

    Raises ArtifactError for a missing or unreadable file, and where their digest is not the
    `planned` one.
    """
    import safetensors.torch

    data: dict[str, bytes] = {}

    # Hash and keep the same bytes: a file that changes between two reads cannot slip through.
    def whole(path: str) -> list[bytes]:
        data[path.rsplit("/", 1)[1]] = store.get(path)
        return [data[path.rsplit("/", 1)[1]]]

    digest, where = _digest(files, uri, whole), f"{files.field}: {uri}"
    if planned not in (None, digest):
        raise ArtifactError(f"{files.field}: the files at {uri} changed since this run was planned ({planned} -> {digest}): "
                            "start it again")
    weights = data.pop(WEIGHTS)
    try:
        return ModelBytes(digest, {name: json.loads(text) for name, text in data.items()},
                          safetensors.torch.load(weights), weights)
    except Exception as e:  # json and safetensors raise many kinds for what is one fault: the files
        raise ArtifactError(f"{where}: a file of the model cannot be read: {e}; save it again with "
                            "save_pretrained(folder)") from e


def build_model(where: str, kind: str, classes: dict[str, tuple[str, str]], settings: dict, weights: dict,
                prepare: Callable[[Any], None], unused: tuple[str, ...] = ()):
    """The transformers model of a config (`settings`) and weights, in float32 on the CPU.

    `classes`: (config, model) class names by model_type; `prepare` checks or changes the config;
    tensors whose last name is in `unused` may be missing.  Raises ArtifactError where they make no
    model, ConfigError without transformers.
    """
    if kind not in classes:
        raise ArtifactError(f"{where}: config.json has model_type {kind!r}; the models that can be used are "
                            f"{', '.join(classes)}")
    require("a pretrained model", ["transformers"])
    import torch
    import transformers

    config_class, model_class = (getattr(transformers, name) for name in classes[kind])
    try:
        with quiet_loading():
            config = config_class.from_dict(settings)
            prepare(config)
            # Not load_state_dict: names in files differ from a model's (older weight norm, Mimi's
            # halves).
            model, report = model_class.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32,
                                                        output_loading_info=True)
    except Exception as e:  # transformers raises many kinds for what is one fault: the files
        raise ArtifactError(f"{where}: config.json and model.safetensors make no {kind} model: {e}") from e
    if wrong := misfits(report, len(weights) - len(model.state_dict()), unused):
        raise ArtifactError(f"{where}: model.safetensors does not fit config.json; tensors {' and '.join(wrong)}: save the "
                            "model again with save_pretrained(folder)")
    return model


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Hides transformers' progress bar and report: a step's progress board owns the terminal."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def misfits(report: dict, surplus: int, unused: tuple[str, ...]) -> list[str]:
    """Texts on missing, unexpected and misshapen tensors, by transformers' report of loading."""
    missing = [name for name in report["missing_keys"] if name.rsplit(".", 1)[-1] not in unused]
    found = {"missing": missing, "unexpected": report["unexpected_keys"], "of another shape": report["mismatched_keys"]}
    wrong = [f"{len(names)} {what} ({', '.join(sorted(map(str, names))[:3])})" for what, names in found.items() if names]
    # transformers' Mimi does not report unknown names inside a half (encoder, decoder) that it
    # knows.
    return wrong or ([f"{surplus} more than the model has"] if surplus > 0 else [])
