"""Generated sounds of a folder as one line and as a page: each prompt's sound and spectrogram beside its samples'.

Reads the samples' JSON alone (generate.jobs); players and pictures refer to the files in the folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from audiolm.render.html import Section, card, number, player, render, table

PROMPT_NOTES = {"continuation": "Prompt, as the model heard it", "acoustic": "Its semantic tokens are said in new voices",
                "resynthesis": "Before the codec"}


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
        cards = [*_prompt_card(name, samples[files[0]]["settings"]), *(_card(f, samples[f]) for f in files)]
        sections.append(Section(f"prompt-{i}", name, "players.html", {"groups": [("", cards)]}))
    return render("page.html", title="Generated audio", subtitle=summary(list(samples.values())), sections=sections)


def _row(name: str, samples: Sequence[Mapping[str, Any]]) -> list[Any]:
    settings = samples[0]["settings"]
    draws = ", ".join(f"{stage} {_draw(settings['draws'][stage])}" for stage in ("semantic", "coarse", "fine"))
    return [name, samples[0]["run"], settings["mode"], draws, len(samples), f"{median(m['seconds'] for m in samples):.2f}",
            number(settings["seconds"], 2), sum(m["ended"] for m in samples), _rates(samples) or "–", _real_time_factor(samples)]


def _draw(draw: Mapping[str, Any]) -> str:
    more = [f"{k} {draw[k]}" for k in ("top_k", "top_p", "window") if draw.get(k) is not None]
    return " ".join([f"{draw['temperature']:g}", *more])


def _file_card(title: str, sound: str, picture: str, notes: Sequence[Any]) -> dict[str, Any]:
    """A card of files beside the page, by their paths from it; pictures load when they come into view."""
    image = Markup('<img alt="Spectrogram of {}" loading="lazy" src="{}">').format(picture, quote(picture))
    return card(title, player=player(quote(sound)), picture=image, notes=notes)


def _prompt_card(name: str, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not settings["prompt"]:
        return []
    note = f"{PROMPT_NOTES[settings['mode']]}: {settings['prompt']}"
    return [_file_card("prompt", f"page/{name}-prompt.wav", f"page/{name}-prompt.png", [note])]


def _card(file: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    requested = sample["settings"]["seconds"]
    parts = [f"{sample['seconds']:.2f} s" + (f" of {requested:g} s asked for" if requested else "")]
    parts += ["ended by the model"] if sample["ended"] else []
    if sample["settings"]["mode"] == "continuation":
        parts.append(f"the dashed line is where the prompt ends, at {sample['prompt_s']:.2f} s")
    if rates := _rates([sample]):
        parts.append(f"semantic tokens/s {rates}")
    return _file_card(f"sample {sample['settings']['sample']}", f"{file}.wav", f"page/{file}.png",
                      ["; ".join(parts), Markup('<a href="{}">{}</a>').format(quote(f"{file}.json"), f"{file}.json")])
