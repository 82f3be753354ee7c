"""What of a config says *what* is computed, as plain JSON to be hashed (DESIGN 1.2).

Every field counts unless it is marked `Runtime` (where and how: roots, workers, micro-batch, engine) or
`Later(default)` (added after a release: left out while it holds its first value).  `Leaf` marks what a training run can
differ in and still begin alike (its length): it counts, but not in the identity of the trunk (DESIGN 1.6).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True)
class _Runtime:
    pass


@dataclass(frozen=True)
class _LengthOnly:
    pass


@dataclass(frozen=True)
class Later:
    """Marks a field added after a release: it joins the identity only when it differs from `default`."""

    default: Any


T = TypeVar("T")
Runtime = Annotated[T, _Runtime()]
LengthOnly = Annotated[T, _LengthOnly()]


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def identity(x: Any, trunk: bool = False) -> Any:
    """The identity-bearing part of a config as plain JSON (DESIGN 1.2); raises TypeError for anything else.

    `trunk` leaves out the fields marked `Leaf`.
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


class ConfigError(ValueError):
    """A configuration that cannot be used; the text names the field, the value and the fix."""
