"""HTML pages from jinja2 templates: self-contained, escaped, without script or network.

Callers prepare plain data: sections, tables, cards. The templates in `templates/` lay it out.
Only the functions here make markup; every other value is text, and autoescape escapes it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from audiolm import store
from audiolm.render import plots


@dataclass(frozen=True)
class Section:
    """A part of a page with a link in its navigation; `template` lays out `data`, which it calls `d`."""

    name: str
    title: str
    template: str
    data: Mapping[str, Any] = field(default_factory=dict)


@cache
def _environment() -> Environment:
    # StrictUndefined: a template that reads a field nobody prepared fails in the tests, not on the page.
    found = Environment(loader=PackageLoader("audiolm.render"), autoescape=True, undefined=StrictUndefined,
                        trim_blocks=True, lstrip_blocks=True)
    found.filters["number"] = number
    found.globals["verdict"] = verdict
    return found


def render(template: str, **data: Any) -> str:
    """The text of a template with `data` filled in."""
    return _environment().get_template(template).render(**data)


def absent(name: str, title: str, reason: str) -> Section:
    """A section that holds no more than the reason why it is empty."""
    return Section(name, title, "absent.html", {"reason": reason})


def number(value: Any, digits: int = 3) -> str:
    """A number as text; an en dash where there is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], right: Iterable[int] = ()) -> dict[str, Any]:
    """A table's data; the columns in `right` hold numbers and are set to the right."""
    return {"head": head, "rows": list(rows), "right": set(right)}


def verdict(good: bool | None, yes: str, no: str) -> Markup:
    """A check mark with `yes` or a cross with `no`, coloured; an en dash where `good` is None."""
    if good is None:
        return Markup("–")
    text, kind = (f"✓ {yes}", "good") if good else (f"✗ {no}", "bad")
    return Markup('<span class="{}">{}</span>').format(kind, text)


def data_uri(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def picture(png: bytes, text: str) -> Markup:
    """An image within the page; `text` says what it shows."""
    return Markup('<img alt="{}" src="{}">').format(text, data_uri(png, "image/png"))


def stored_picture(folder: str, file: str, text: str) -> Markup:
    """The image at {folder}/{file}, or a line that it is gone."""
    try:
        return picture(store.get(store.join(folder, file)), text)
    except FileNotFoundError:
        return gone(file)


def gone(file: str) -> Markup:
    """The line that takes the place of a lost file."""
    return Markup('<p class="soft">{} is gone.</p>').format(file)


def player(source: str) -> Markup:
    return Markup('<audio controls preload="none" src="{}"></audio>').format(source)


def playable(path: str) -> tuple[np.ndarray, Markup] | None:
    """(wav_T, player) of a sound file, or None where it is gone or damaged. FLAC halves the page and loses nothing."""
    import soundfile

    try:
        wav_T, rate = soundfile.read(io.BytesIO(store.get(path)), dtype="float32", always_2d=False)
    except (FileNotFoundError, soundfile.LibsndfileError):
        return None
    wav_T = wav_T if wav_T.ndim == 1 else wav_T.mean(axis=1)
    sink = io.BytesIO()
    soundfile.write(sink, wav_T, rate, format="FLAC", subtype="PCM_16")
    return wav_T, player(data_uri(sink.getvalue(), "audio/flac"))


def card(title: str, *, reason: str = "", player: str = "", picture: str = "", notes: Sequence[Any] = ()) -> dict[str, Any]:
    """A card's data: what it plays and shows, or the reason why it does not."""
    return {"title": title, "missing": reason, "player": player, "picture": picture, "notes": notes}


def sound_card(title: str, folder: str, file: str, *, prompt_s: float | None = None, alt: str = "",
               notes: Sequence[str] = ()) -> dict[str, Any]:
    """The card of a sound file: player and spectrogram, with a line where the prompt ends."""
    sound = playable(store.join(folder, file))
    if sound is None:
        return card(title, reason=f"{file} is gone.")
    image = picture(plots.spectrogram(sound[0], "", prompt_s), f"Spectrogram of {alt or title}")
    return card(title, player=sound[1], picture=image, notes=notes)
