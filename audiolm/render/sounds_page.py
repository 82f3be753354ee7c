"""Generated sounds of a folder as one line and as a page: each prompt's sound and spectrogram beside its samples'.

Reads the samples' JSON alone (generate.jobs); players and pictures refer to the files in the folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from audiolm.render.html import Section, number, render, table


def summary(samples: Sequence[Mapping[str, Any]]) -> str:
    """Files, seconds, error of the length, semantic tokens a second, and the real-time factor."""
    seconds = sum(m["seconds"] for m in samples)
    parts = [f"{len(samples)} files, {seconds:.1f} s of audio"]
    if errors := [abs(m["seconds"] - m["settings"]["seconds"]) for m in samples if m["settings"]["seconds"]]:
        parts.append(f"median |generated - requested| {median(errors):.2f} s")
    if rates := _rates(samples):
        parts.append(f"semantic tokens/s {rates}")
    if seconds:
        parts.append(f"real-time factor {_real_time_factor(samples)} (below 1: faster than the sound lasts)")
    return "; ".join(parts)


def _real_time_factor(samples: Iterable[Mapping[str, Any]]) -> str:
    wall, seconds = (sum(m[k] for m in samples) for k in ("wall_s", "seconds"))
    return f"{wall / max(1e-9, seconds):.2f}"


def _rates(samples: Iterable[Mapping[str, Any]]) -> str:
    generated, prompts = ([m[k] for m in samples if m.get(k) is not None] for k in ("semantic_per_s", "prompt_semantic_per_s"))
    return " against ".join(f"{median(r):.1f}{of}" for r, of in ((generated, ""), (prompts, " in the prompt")) if r)


def build(samples: Mapping[str, Mapping[str, Any]]) -> str:
    """index.html of the samples in a folder, by file name without its ending."""
    groups: dict[str, list[str]] = {}
    for file in sorted(samples, key=lambda f: (samples[f]["name"], samples[f]["settings"]["sample"])):
        groups.setdefault(samples[file]["name"], []).append(file)
    head = ("prompt", "run", "mode", "temperature", "samples", "seconds", "asked", "ended", "semantic tokens/s", "rtf")
    rows = [_row(name, [samples[f] for f in files]) for name, files in groups.items()]
    sections = [Section("all", "All", "table.html", table(head, rows, (4, 5, 6, 7, 9)))]
    for i, (name, files) in enumerate(groups.items()):
        cards = [(file, samples[file], _rates([samples[file]])) for file in files]
        sections.append(Section(f"prompt-{i}", name, "samples.html", {"name": name, "samples": cards}))
    return render("page.html", title="Generated audio", subtitle=summary(list(samples.values())), sections=sections)


def _row(name: str, samples: Sequence[Mapping[str, Any]]) -> list[Any]:
    settings = samples[0]["settings"]
    draws = ", ".join(f"{stage} {_draw(settings['draws'][stage])}" for stage in ("semantic", "coarse", "fine"))
    seconds = median(m["seconds"] for m in samples)
    return [name, samples[0]["run"], settings["mode"], draws, len(samples), f"{seconds:.2f}", number(settings["seconds"], 2),
            sum(m["ended"] for m in samples), _rates(samples) or "–", _real_time_factor(samples)]


def _draw(draw: Mapping[str, Any]) -> str:
    more = [f"{k} {draw[k]}" for k in ("top_k", "top_p", "window") if draw.get(k) is not None]
    return " ".join([f"{draw['temperature']:g}", *more])
