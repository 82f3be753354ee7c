"""Texts without the credentials that URIs may hold."""

from __future__ import annotations

import re
from typing import Any

_HIDE = (
    (re.compile(r"(\w://)[^/\s]+@"), r"\1***@"),
    (re.compile(r"([?&][^=&\s]*(?:token|secret|sig|password|credential|key)[^=&\s]*=)[^&\s]+", re.I), r"\1***"),
)


def hide_credentials(text: Any) -> str:
    """Text without the credentials that its URIs may hold."""
    text = str(text)
    for pattern, shown in _HIDE:
        text = pattern.sub(shown, text)
    return text


def hide_credentials_in(value: Any) -> Any:
    """Plain JSON with every text masked."""
    if isinstance(value, dict):
        return {k: hide_credentials_in(v) for k, v in value.items()}
    if isinstance(value, list):
        return [hide_credentials_in(v) for v in value]
    return hide_credentials(value) if isinstance(value, str) else value
