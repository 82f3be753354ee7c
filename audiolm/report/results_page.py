"""Results as a page and as Markdown: the paper's value beside ours, one system or several side by side.

A column is (label, rows, sounds); a sound is {"group", "title", "file", "prompt_s"}.  Sounds of equal group and title
stand next to each other.  Rows that were not measured share one line for each reason.
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
from audiolm.render.html import Section, absent, card, number, picture, render, sound_card, stored_picture, table, verdict

Column = tuple[str, Sequence[Result], Sequence[dict]]
TITLES = {"I": "Table I: the tokens", "II": "Table II: what is said", "III": "Table III: who says it",
          "IV": "Table IV: likelihood tests", "losses": "Losses beside counting", "levels": "Losses by level",
          "conditioning": "Is the prefix used?",
          "ladder": "Stage ladder", "detector": "Told from the real", "stage 2's attention": "What stage 2 looks at",
          "temperatures": "Temperatures", "FAD": "Fréchet audio distance",
          "SALMon": "SALMon: consistent sound", "MOS": "Marks of a MOS predictor",
          "codecs": "Codecs by number of levels", "masked model": "The masked model's features",
          "Text": "What continuations say", "Notes": "Piano: the notes"}
PLAYERS = 4  # of a group, so that a page stays within megabytes; the results count all sounds
MOST_BARS = 40  # more do not fit one picture
MARKDOWN_END = 60  # characters kept for the line that counts what did not fit


def build(title: str, columns: Sequence[Column]) -> str:
    """The whole document, self-contained."""
    return render("page.html", title=title, subtitle=time.strftime("measured %Y-%m-%d %H:%M UTC", time.gmtime()),
                  sections=[*sections_of(columns), sounds_of("sound", "Sound", columns)])


def sections_of(columns: Sequence[Column]) -> list[Section]:
    """A section for each table of results."""
    tables = list(dict.fromkeys(r.table for _, rows, _ in columns for r in rows))
    return [Section(f"table-{i}", TITLES.get(t, t), "results_table.html", _table_data(t, columns))
            for i, t in enumerate(tables)]


def _table_data(name: str, columns: Sequence[Column]) -> dict[str, Any]:
    """Measured rows side by side, rows measured in no column by reason, and bars where there is one column."""
    by_key = [{(r.item, r.metric): r for r in rows if r.table == name} for _, rows, _ in columns]
    measured, unmeasured = [], []
    for key in dict.fromkeys(k for rows in by_key for k in rows):
        found = [rows.get(key) for rows in by_key]
        if any(r and r.value is not None for r in found):
            measured.append(_cells(found))
        else:
            unmeasured.append(next(r for r in found if r))
    differs = ["difference"] if len(columns) == 2 else []
    head = ["", "", *(label for label, _, _ in columns), *differs, "paper", "of", ""]
    return {"table": table(head, measured, range(2, 3 + len(columns) + len(differs))), "unmeasured": by_reason(unmeasured),
            "bars": _bars(TITLES.get(name, name), list(by_key[0].values())) if len(columns) == 1 else []}


def _cells(found: Sequence[Result | None]) -> list[Any]:
    """A row of the table: one item and metric, as each column measured it."""
    first = next(r for r in found if r)
    values = [r.value if r else None for r in found]
    difference = [] if len(found) != 2 else ["–" if None in values else f"{values[1] - values[0]:+.3f}"]
    note = "; ".join(dict.fromkeys(r.note for r in found if r and r.note))
    return [_item(first), first.metric,
            *(_value(r) if r and r.value is not None else verdict(False, "", "not measured") for r in found),
            *difference, number(first.paper, 1), _count(first), note]


def by_reason(rows: Iterable[Result]) -> list[tuple[str, str]]:
    """(items with their metrics, reason and fix) of rows that were not measured: one entry for each reason."""
    metrics: dict[tuple[str, str], list[str]] = {}
    for r in rows:
        paper = "" if r.paper is None else f", paper {number(r.paper, 1)}"
        metrics.setdefault((r.note, _item(r)), []).append(r.metric + paper)
    items: dict[str, dict[str, list[str]]] = {}
    for (note, item), names in metrics.items():
        items.setdefault(note, {}).setdefault("; ".join(names), []).append(item)
    return [("; ".join(", ".join(some) + ("" if names == "–" else f" ({names})") for names, some in groups.items()), note)
            for note, groups in items.items()]


def _bars(title: str, rows: Sequence[Result]) -> list[Any]:
    """A picture for each metric that several items have."""
    pictures = []
    for metric in dict.fromkeys(r.metric for r in rows):
        some = [r for r in rows if r.metric == metric and r.value is not None]
        if 1 < len(some) <= MOST_BARS and all(r.value >= 0 for r in some):
            png = plots.bars([r.item for r in some], [r.value for r in some], "", metric)
            pictures.append(picture(png, f"{title}: {metric}"))
    return pictures


def _item(r: Result) -> str:
    return r.item if r.role == "ours" else f"{r.item} ({r.role})"


def _value(r: Result) -> str:
    interval = "" if r.low is None else f" [{number(float(r.low))}, {number(float(r.high))}]"
    return number(float(r.value)) + interval


def _count(r: Result) -> str:
    return f"{number(r.n)} {r.of}" if r.n else "–"


def sounds_of(name: str, title: str, columns: Sequence[Column]) -> Section:
    """A section of players and pictures, in groups; each sound of all columns side by side."""
    by_key = [{(s["group"], s["title"]): s for s in sounds} for _, _, sounds in columns]
    groups: dict[str, list[str]] = {}
    for group, sound in dict.fromkeys(key for found in by_key for key in found):
        groups.setdefault(group, []).append(sound)
    if not groups:
        return absent(name, title, "None of these suites leaves sound.")
    data = [(group, [_card(sound if len(columns) == 1 else f"{sound}: {label}", found.get((group, sound)))
                     for sound in sounds[:PLAYERS] for (label, _, _), found in zip(columns, by_key, strict=True)])
            for group, sounds in groups.items()]
    return Section(name, title, "players.html", {"groups": data})


def _card(title: str, sound: Mapping[str, Any] | None) -> dict[str, Any]:
    if sound is None:
        return card(title, reason="no such sound")
    folder, file = sound["file"].rsplit("/", 1)
    if file.endswith(".png"):
        return card(title, picture=stored_picture(folder, file, title))
    return sound_card(title, folder, file, prompt_s=sound["prompt_s"])


def markdown(rows: Iterable[Result], limit: int) -> str:
    """The rows as a Markdown table of at most `limit` characters; the last line counts what does not fit."""
    rows = list(rows)
    text, size = ["| | | ours | paper | of |", "|---|---|---|---|---|"], 60
    for i, r in enumerate(rows):
        value = _value(r) if r.value is not None else f"not measured: {r.note}"
        cells = [f"{r.table}: {_item(r)}", r.metric, value, number(r.paper, 1), _count(r)]
        line = "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"
        size += len(line) + 1
        if size > limit - MARKDOWN_END:
            return "\n".join([*text, "", f"and {len(rows) - i} more rows in the report"])
        text.append(line)
    return "\n".join(text)


def run_and_report(steps: Mapping[str, str], names: Sequence[str], folder: str, config: Pipeline, out: Any, *, cache: str,
                   title: str, manifest: str | None = None) -> SuiteReport:
    """Runs suites (those of DEFAULT where none is named) on a system; writes report.html and rows.json into `folder`.

    `manifest`: the step whose held-out clips are used, the system's own by default. Raises ValueError for an unknown suite
    and where nothing could be measured.
    """
    report = run_suites(steps, names, folder, config, out, cache=cache, manifest=manifest)
    if all(r.value is None for r in report.rows):
        raise ValueError("nothing could be measured: " + "; ".join(dict.fromkeys(r.note for r in report.rows)))
    store.put(store.join(folder, "report.html"), build(title, [("ours", report.rows, report.sounds)]).encode())
    return report
