"""Rows of figures as a page and as Markdown: the paper's figure beside ours, one system or several side by side.

A column is (label, rows, sounds); a sound is {"group", "title", "file", "prompt_s"}, and sounds of equal group and title stand
next to each other.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from audiolm import store
from audiolm.config.pipeline import Pipeline
from audiolm.eval.results import Result
from audiolm.eval.suites.base import SuiteReport
from audiolm.eval.suites.run import run_suites
from audiolm.render import plots
from audiolm.render.html import Html, join, missing, number, page, picture, playable, table, tag, verdict

Column = tuple[str, Sequence[Result], Sequence[dict]]
TITLES = {"I": "Table I: the tokens", "II": "Table II: what is said", "III": "Table III: who says it",
          "IV": "Table IV: likelihood tests", "losses": "Losses beside counting", "levels": "Losses by level",
          "conditioning": "Is the prefix used?",
          "ladder": "Stage ladder", "detector": "Told from the real", "stage 2's attention": "What stage 2 looks at",
          "temperatures": "Temperatures", "FAD": "Fréchet audio distance",
          "Text": "What continuations say", "Notes": "Piano: the notes"}
PLAYERS = 4  # of a group; the figures count all


def build(title: str, columns: Sequence[Column]) -> str:
    """The whole document, self-contained."""
    sections = [*sections_of(columns), ("sound", "Sound", sounds_of(columns))]
    return page(title, time.strftime("measured %Y-%m-%d %H:%M UTC", time.gmtime()), sections)


def sections_of(columns: Sequence[Column]) -> list[tuple[str, str, Html]]:
    """(id, title, table and bars) of each table."""
    tables = list(dict.fromkeys(r.table for _, rows, _ in columns for r in rows))
    return [(f"table-{i}", TITLES.get(t, t), _table(t, columns)) for i, t in enumerate(tables)]


def _table(name: str, columns: Sequence[Column]) -> Html:
    by = [{(r.item, r.metric): r for r in rows if r.table == name} for _, rows, _ in columns]
    keys = list(dict.fromkeys(k for rows in by for k in rows))
    lines = []
    for key in keys:
        found = [rows.get(key) for rows in by]
        some = next(r for r in found if r)
        values = [r.value if r else None for r in found]
        apart = [_apart(values)] if len(columns) == 2 else []
        note = "; ".join(dict.fromkeys(r.note for r in found if r and r.note))
        lines.append([some.item + ("" if some.role == "ours" else f" ({some.role})"), some.metric,
                      *(_figure(r) if r and r.value is not None else verdict(False, "", "not measured") for r in found), *apart,
                      number(some.paper, 1), f"{number(some.n)} {some.of}" if some.n else "–", note])
    heads = [label for label, _, _ in columns]
    head = ["", "", *heads, *(["difference"] if len(columns) == 2 else []), "paper", "of", ""]
    parts = [table(head, lines, range(2, 3 + len(heads) + (len(columns) == 2)))]
    if len(columns) == 1:
        for metric in dict.fromkeys(m for _, m in keys):
            some = [r for (_, m), r in by[0].items() if m == metric and r.value is not None]
            if len(some) > 1 and len(some) <= 40 and all(r.value >= 0 for r in some):
                png = plots.bars([r.item for r in some], [r.value for r in some], "", metric)
                parts.append(picture(png, f"{TITLES.get(name, name)}: {metric}"))
    return join(parts)


def _figure(r: Result) -> str:
    return number(float(r.value)) + (f" [{number(float(r.low))}, {number(float(r.high))}]" if r.low is not None else "")


def _apart(values: Sequence[float | None]) -> str:
    return "–" if None in values else f"{values[1] - values[0]:+.3f}"


def sounds_of(columns: Sequence[Column]) -> Html:
    by = [{(s["group"], s["title"]): s for s in sounds} for _, _, sounds in columns]
    keys = list(dict.fromkeys(k for found in by for k in found))
    if not keys:
        return missing("None of these suites leaves sound.")
    parts = []
    for group in dict.fromkeys(g for g, _ in keys):
        cards = [_card(title if len(by) == 1 else f"{title}: {label}", found.get((group, title)))
                 for _, title in [k for k in keys if k[0] == group][:PLAYERS]
                 for (label, _, _), found in zip(columns, by, strict=True)]
        parts += [tag("h3", group), tag("div", *cards, cls="cards")]
    return join(parts)


def _card(title: str, sound: dict | None) -> Html:
    if sound and sound["file"].endswith(".png"):
        return tag("div", tag("h3", title), picture(store.get(sound["file"]), title), cls="card")
    found = playable(sound["file"]) if sound else None
    if found is None:
        return tag("div", tag("h3", title), missing("no such sound"), cls="card")
    wav_T, player = found
    image = picture(plots.spectrogram(wav_T, "", sound["prompt_s"]), f"Spectrogram of {title}")
    return tag("div", tag("h3", title), player, image, cls="card")


def markdown(rows: Iterable[Result], limit: int) -> str:
    """The rows as a Markdown table of at most `limit` characters; what does not fit is counted."""
    rows = list(rows)
    text, size = ["| | | ours | paper | of |", "|---|---|---|---|---|"], 60
    for i, r in enumerate(rows):
        item = r.item + ("" if r.role == "ours" else f" ({r.role})")
        value = _figure(r) if r.value is not None else f"not measured: {r.note}"
        cells = [f"{r.table}: {item}", r.metric, value, number(r.paper, 1), f"{number(r.n)} {r.of}" if r.n else "–"]
        line = "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"
        size += len(line) + 1
        if size > limit - 60:
            return "\n".join([*text, "", f"and {len(rows) - i} more rows in the report"])
        text.append(line)
    return "\n".join(text)


def run_and_report(steps: Mapping[str, str], names: Sequence[str], folder: str, config: Pipeline, out: Any, *, cache: str,
               title: str, manifest: str | None = None) -> SuiteReport:
    """Runs suites (those of DEFAULT where none is named) on a system; writes report.html and rows.json into `folder`.
    `manifest`: whose held-out clips are heard, its own by default. Raises ValueError for an unknown suite and where nothing
    could be measured."""
    report = run_suites(steps, names, folder, config, out, cache=cache, manifest=manifest)
    if all(r.value is None for r in report.rows):
        raise ValueError("nothing could be measured: " + "; ".join(dict.fromkeys(r.note for r in report.rows)))
    store.put(store.join(folder, "report.html"), build(title, [("ours", report.rows, report.sounds)]).encode())
    return report
