"""Pieces of one HTML page: text is escaped, sound and pictures are inside it or in files beside it, no script, no network.

`Html` marks text that is markup already; every function here takes plain values and returns `Html`.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np

from audiolm import store

CSS = """
:root { --ink: #1f2933; --soft: #5f6c7b; --line: #e1e6ec; --blue: #2f6db5; --good: #23794a; --bad: #b3372f; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem 1rem 4rem; color: var(--ink); background: #fff;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; margin: 1rem 0 .2rem; line-height: 1.2; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .8rem; border-top: 2px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); font-size: .9rem; }
nav { font-size: .9rem; margin: .6rem 0; } nav a { margin-right: .9rem; white-space: nowrap; } a { color: var(--blue); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td.n, th.n { text-align: right; white-space: nowrap; }
td.long { overflow-wrap: anywhere; }
.good { color: var(--good); font-weight: 600; white-space: nowrap; }
.bad { color: var(--bad); font-weight: 600; white-space: nowrap; }
audio { width: 100%; max-width: 26rem; height: 2.4rem; display: block; margin: .2rem 0; }
img { max-width: 100%; height: auto; display: block; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .8rem; min-width: 0; overflow-wrap: anywhere; }
.card h3 { margin: 0 0 .2rem; } td audio { width: 14rem; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--blue); font-size: .9rem; }
"""


class Html(str):
    """Markup. Anything else is text and gets escaped."""


def esc(value: Any) -> Html:
    return value if isinstance(value, Html) else Html(html.escape(str(value), quote=True))


def join(parts: Iterable[Any], between: str = "") -> Html:
    return Html(between.join(esc(p) for p in parts))


def tag(name: str, *inside: Any, cls: str = "") -> Html:
    mark = Html(f' class="{cls}"') if cls else Html("")
    return Html(f"<{name}{mark}>{join(inside)}</{name}>")


def number(value: Any, digits: int = 3) -> str:
    """A figure as text; an en dash where there is none."""
    if value is None or isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.{digits}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Iterable[int] = ()) -> Html:
    """A table; the columns in `numbers` are set to the right. Empty where there are no rows."""
    right = set(numbers)

    def row(kind: str, cells: Sequence[Any]) -> Html:
        return tag("tr", *(tag(kind, c, cls="n" if i in right else "long" if kind == "td" and len(str(c)) > 60
                               and not isinstance(c, Html) else "") for i, c in enumerate(cells)))

    body = [row("td", cells) for cells in rows]
    if not body:
        return Html("")
    return tag("div", tag("table", tag("thead", row("th", head)), tag("tbody", *body)), cls="wide")


def verdict(good: bool | None, yes: str, no: str) -> Html:
    if good is None:
        return esc("–")
    return tag("span", f"✓ {yes}" if good else f"✗ {no}", cls="good" if good else "bad")


def picture(png: bytes, text: str) -> Html:
    return Html(f'<img alt="{esc(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">')


def player(data: bytes, kind: str) -> Html:
    """`kind` is wav or flac."""
    return Html(f'<audio controls preload="none" src="data:audio/{kind};base64,{base64.b64encode(data).decode()}"></audio>')


def beside(path: str) -> Html:
    """The player, picture or link of a file, by its path from the page."""
    href, kind = esc(quote(path)), path.rsplit(".", 1)[1]
    if kind == "png":
        return Html(f'<img alt="Spectrogram of {esc(path)}" loading="lazy" src="{href}">')
    if kind == "wav":
        return Html(f'<audio controls preload="none" src="{href}"></audio>')
    return Html(f'<a href="{href}">{esc(path)}</a>')


def missing(what: str) -> Html:
    return tag("p", what, cls="soft")


def section(name: str, title: str, *inside: Any) -> Html:
    return Html(f'<section id="{esc(name)}">{tag("h2", title)}{join(inside)}</section>')


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str, Html]]) -> str:
    """The whole document; sections are (id, title, content)."""
    links = join((Html(f'<a href="#{esc(name)}">{esc(label)}</a>') for name, label, _ in sections), " ")
    body = join(section(name, label, content) for name, label, content in sections)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{esc(title)}</title>'
            f"<style>{CSS}</style></head><body>{tag('h1', title)}{tag('p', subtitle, cls='soft')}"
            f"{tag('nav', links)}<main>{body}</main></body></html>\n")


def playable(path: str) -> tuple[np.ndarray, Html] | None:
    """(wav_T, player) of a file, or None where it is gone. FLAC halves the page and loses nothing."""
    import soundfile

    try:
        wav_T, rate = soundfile.read(io.BytesIO(store.get(path)), dtype="float32", always_2d=False)
    except (FileNotFoundError, soundfile.LibsndfileError):
        return None
    wav_T = wav_T if wav_T.ndim == 1 else wav_T.mean(axis=1)
    sink = io.BytesIO()
    soundfile.write(sink, wav_T, rate, format="FLAC", subtype="PCM_16")
    return wav_T, player(sink.getvalue(), "flac")
