"""Reader of a configuration: one YAML file without inheritance, then `a.b=c` overrides."""

from __future__ import annotations

import os
from pathlib import Path
from types import NoneType
from typing import Any

from pydantic import ValidationError

from audiolm import places, pretrained
from audiolm.config.base import ConfigError, kinds_at, map_paths
from audiolm.config.pipeline import Pipeline
from audiolm.config.yaml_text import NULLS, Plain, parse


def load_config(path: str, overrides: list[str] = ()) -> Pipeline:
    """Reads a YAML file and applies `a.b=c` overrides (list items by number: `corpus.sources.0.root=x`).

    An override's value is YAML; for a field of text it is what stands there, without quotes around it.

    Relative paths in the file are relative to the file, those in overrides to the working folder; the store and the
    tracking database always to the working folder. A bare name of a published model, where there is no such file, is its
    folder. Raises ConfigError.
    """
    try:
        data = parse(Path(path).read_bytes())
    except FileNotFoundError as e:
        raise ConfigError(f"no config file {path}") from e
    except IsADirectoryError as e:
        raise ConfigError(f"{path} is a folder: name the YAML file in it") from e
    except OSError as e:
        raise ConfigError(f"the config file {path} cannot be read: {e.strerror}") from e
    except ValueError as e:
        raise ConfigError(f"{path} is not YAML: {e}") from e
    if not isinstance(data, dict):
        what = "nothing" if data is None else "a list" if isinstance(data, list) else "a single text"
        raise ConfigError(f"{path} holds {what}, expected sections such as corpus: and codec:")
    return _overridden(_resolve_paths(data, Path(path).resolve().parent), overrides, path)


def _overridden(data: dict, overrides: list[str], path: str) -> Pipeline:
    for item in overrides:
        _apply_override(data, item)
    try:  # a path that is still relative came with an override
        return Pipeline.model_validate(_resolve_paths(data, Path.cwd()))
    except ValidationError as e:
        lines = [f"  {'.'.join(map(str, err['loc'])) or 'config'}: {err['msg']}{_fix(err)}"
                 + ("" if isinstance(err["input"], dict) else f" (got {err['input']!r})") for err in e.errors()]
        raise ConfigError(f"{path} has {len(lines)} error(s):\n" + "\n".join(lines)) from e


def _fix(error: Any) -> str:
    """What helps with a pydantic error that does not say so itself."""
    if error["type"] == "extra_forbidden":
        sections = kinds_at(Pipeline, [str(key) for key in error["loc"][:-1]])
        known = sorted({name for kind in sections for name in getattr(kind, "model_fields", ())})
        return f"; there are {', '.join(known)}" if known else ""
    return ": an empty value, ~ and null mean none; leave the key out for its default" if error["input"] is None else ""


def apply_overrides(cfg: Pipeline, overrides: list[str]) -> Pipeline:
    """A config with overrides as of the command line. Raises ConfigError."""
    return _overridden(cfg.model_dump(mode="json"), overrides, "the run's config")


def _resolve_paths(data: dict, folder: Path) -> dict:
    def resolve(text: str) -> str:
        place = places.split(text)
        if place.inner:
            return f"{place.protocol}://{place.name}::{resolve(place.inner)}"
        if "://" in text:
            return text
        return os.path.normpath(folder / Path(pretrained.resolve(text, str(folder))).expanduser())

    return map_paths(Pipeline, data, resolve)


def _apply_override(data: dict, item: str) -> None:
    key, eq, text = item.partition("=")
    if not eq or not key:
        raise ConfigError(f"override {item!r} is not of the form a.b=c")
    # Walk to the section that holds the key; sections that the file leaves out are added.
    *parents, last = key.split(".")
    node: Any = data
    for name in parents:
        if isinstance(node, list):
            if not name.isdecimal() or int(name) >= len(node):
                raise ConfigError(f"override {item!r}: {name!r} is not one of the {len(node)} items there")
            node = node[int(name)]
        else:
            node = node.setdefault(name, {})
        if not isinstance(node, (dict, list)):
            raise ConfigError(f"override {item!r}: {name!r} is a value, not a section")
    value = _override_value(item, key.split("."), text)
    if isinstance(node, list):
        if not last.isdecimal() or int(last) >= len(node):
            raise ConfigError(f"override {item!r}: {last!r} is not one of the {len(node)} items there")
        node[int(last)] = value
    else:
        node[last] = value


def _override_value(item: str, keys: list[str], text: str) -> Any:
    """An override's value; a text for a field of text, whatever YAML takes it for. Raises ConfigError."""
    is_text = set(kinds_at(Pipeline, keys)) in ({str}, {str, NoneType})
    try:
        value = parse(text)
    except ValueError as e:
        if not is_text:
            raise ConfigError(f"override {item!r}: {e}; put quotes around a text with special characters") from e
        value = Plain(text)
    if is_text and text.strip() not in NULLS and not (text.strip()[0] in "'\"" and type(value) is str):
        return Plain(text.strip())
    return value
