"""Reader of a configuration: one YAML file without inheritance, then `a.b=c` overrides."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from audiolm import pretrained
from audiolm.config.base import ConfigError, map_paths
from audiolm.config.pipeline import Pipeline


def load_config(path: str, overrides: list[str] = ()) -> Pipeline:
    """Reads a YAML file and applies `a.b=c` overrides (values are YAML; list items by number: `corpus.sources.0.root=x`).

    Relative paths in the file are relative to the file, those in overrides to the working folder; the store and the
    tracking database always to the working folder. A bare name of a published model, where there is no such file, is its
    folder. Raises ConfigError.
    """
    try:
        data = yaml.safe_load(Path(path).read_text()) or {}
    except FileNotFoundError as e:
        raise ConfigError(f"no config file {path}") from e
    except yaml.YAMLError as e:
        raise ConfigError(f"{path} is not YAML: {e}") from e
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}, expected sections such as corpus: and codec:")
    return _overridden(_resolve_paths(data, Path(path).resolve().parent), overrides, path)


def _overridden(data: dict, overrides: list[str], path: str) -> Pipeline:
    for item in overrides:
        _apply_override(data, item)
    try:  # a path that is still relative came with an override
        return Pipeline.model_validate(_resolve_paths(data, Path.cwd()))
    except ValidationError as e:
        lines = [f"  {'.'.join(map(str, err['loc'])) or 'config'}: {err['msg']}"
                 + ("" if isinstance(err["input"], dict) else f" (got {err['input']!r})") for err in e.errors()]
        raise ConfigError(f"{path} has {len(lines)} error(s):\n" + "\n".join(lines)) from e


def apply_overrides(cfg: Pipeline, overrides: list[str]) -> Pipeline:
    """A config with overrides as of the command line. Raises ConfigError."""
    return _overridden(cfg.model_dump(mode="json"), overrides, "the run's config")


def _resolve_paths(data: dict, folder: Path) -> dict:
    def resolve(text: str) -> str:
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
            if not name.isdigit() or int(name) >= len(node):
                raise ConfigError(f"override {item!r}: {name!r} is not one of the {len(node)} items there")
            node = node[int(name)]
        else:
            node = node.setdefault(name, {})
        if not isinstance(node, (dict, list)):
            raise ConfigError(f"override {item!r}: {name!r} is a value, not a section")
    value = yaml.safe_load(text)
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            raise ConfigError(f"override {item!r}: {last!r} is not one of the {len(node)} items there")
        node[int(last)] = value
    else:
        node[last] = value
