"""The base of all config sections, and the marks that say which fields belong to a step's identity.

A step's outputs are addressed by the hash of *what* is computed.  Every field counts unless it is marked `Runtime`
(where and how: roots, workers, micro-batch, engine) or `Later(default)` (added after a release: left out while it holds
its first value).  `LengthOnly` marks a training's length: it counts, but not in the identity of the trunk that trainings
of different length share.  `PathField` marks a path or URI, which in a YAML file may be relative to that file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True)
class _Runtime:
    pass


@dataclass(frozen=True)
class _LengthOnly:
    pass


@dataclass(frozen=True)
class _Path:
    pass


@dataclass(frozen=True)
class Later:
    """Marks a field added after a release: it joins the identity only when it differs from `default`."""

    default: Any


T = TypeVar("T")
Runtime = Annotated[T, _Runtime()]
LengthOnly = Annotated[T, _LengthOnly()]
PathField = Annotated[str, _Path()]


class Config(BaseModel):
    """A section of the configuration: immutable, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def identity(x: Any, trunk: bool = False) -> Any:
    """The identity-bearing part of a config as plain JSON. Raises TypeError for values that no config has.

    `trunk` leaves out the fields marked `LengthOnly`.
    """
    if isinstance(x, BaseModel):
        plain, fields = x.model_dump(mode="json"), type(x).model_fields
        kept = {}
        for name, field in fields.items():
            later = next((m for m in field.metadata if isinstance(m, Later)), None)
            left_out = (_Runtime, _LengthOnly) if trunk else _Runtime
            if any(isinstance(m, left_out) for m in field.metadata) or (later and plain[name] == later.default):
                continue
            value = getattr(x, name)
            kept[name] = identity(value, trunk) if isinstance(value, (BaseModel, dict, list, tuple)) else plain[name]
        return kept
    if isinstance(x, dict):  # a section that has only Runtime fields leaves no trace
        return {str(k): v for k, v in ((k, identity(v, trunk)) for k, v in x.items()) if v != {}}
    if isinstance(x, (list, tuple)):
        return [identity(v, trunk) for v in x]
    if isinstance(x, (str, int, float, bool, type(None))):
        return x
    raise TypeError(f"cannot take the identity of a {type(x).__name__}: use a config model or a plain value")


def flatten(x: Any, prefix: str = "") -> dict[str, str]:
    """Every field of a config as dotted name -> text, for a tracker's params."""
    plain = x.model_dump(mode="json") if isinstance(x, BaseModel) else x
    if isinstance(plain, dict):
        return {k: v for key, value in plain.items() for k, v in flatten(value, f"{prefix}{key}.").items()}
    if isinstance(plain, list) and plain and isinstance(plain[0], dict):
        return {k: v for i, value in enumerate(plain) for k, v in flatten(value, f"{prefix}{i}.").items()}
    return {prefix.rstrip("."): plain if isinstance(plain, str) else json.dumps(plain)}


def map_paths(kind: Any, value: Any, resolve: Callable[[str], str], is_path: bool = False) -> Any:
    """Applies `resolve` to the texts at the `PathField`s of a type, in values as YAML has them (not yet validated).

    Values that do not fit their type pass unchanged: validation reports them later.
    """
    arguments = get_args(kind)
    if isinstance(value, str) and kind is str:
        return resolve(value) if is_path else value
    if get_origin(kind) is Annotated:
        return map_paths(arguments[0], value, resolve, any(isinstance(m, _Path) for m in arguments[1:]))
    if get_origin(kind) in (Union, UnionType):  # several sections may fit: each resolves the fields that it knows
        for member in arguments:
            value = map_paths(member, value, resolve)
    elif isinstance(value, list) and get_origin(kind) is tuple:
        return [map_paths(arguments[0], v, resolve) for v in value]
    elif isinstance(value, dict) and get_origin(kind) is dict:
        return {k: map_paths(arguments[1], v, resolve) for k, v in value.items()}
    elif isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, BaseModel):
        fields = {name: field.rebuild_annotation() for name, field in kind.model_fields.items()}
        return {k: map_paths(fields.get(k), v, resolve) for k, v in value.items()}
    return value


def kinds_at(kind: Any, keys: Sequence[str]) -> Iterator[Any]:
    """The types that the value at dotted keys may have, below a type; several in a union, none for an unknown field."""
    arguments = get_args(kind)
    if get_origin(kind) is Annotated:
        yield from kinds_at(arguments[0], keys)
    elif get_origin(kind) in (Union, UnionType):
        for member in arguments:
            yield from kinds_at(member, keys)
    elif not keys:
        yield kind
    elif get_origin(kind) in (tuple, dict):
        yield from kinds_at(arguments[0 if get_origin(kind) is tuple else 1], keys[1:])
    elif isinstance(kind, type) and issubclass(kind, BaseModel) and keys[0] in kind.model_fields:
        yield from kinds_at(kind.model_fields[keys[0]].rebuild_annotation(), keys[1:])


class ConfigError(ValueError):
    """A configuration that cannot be used; the text names the field, the value and the fix."""
