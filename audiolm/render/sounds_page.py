"""What was generated into a folder, as a line and as a page: each prompt's sound and picture beside its samples'.

Reads the samples' JSON alone (generate.jobs); players and pictures are the files in the folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from audiolm.render import html


def summary(made: Sequence[Mapping[str, Any]]) -> str:
    """Files, seconds, how far from the length asked for, semantic tokens a second, and the real-time factor."""
    seconds = sum(m["seconds"] for m in made)
    parts = [f"{len(made)} files, {seconds:.1f} s of audio"]
    if off := [abs(m["seconds"] - m["settings"]["seconds"]) for m in made if m["settings"]["seconds"]]:
        parts.append(f"median |generated - requested| {median(off):.2f} s")
    if rates := _rates(made):
        parts.append(f"semantic tokens/s {rates}")
    if seconds:
        parts.append(f"real-time factor {sum(m['wall_s'] for m in made) / seconds:.2f} (below 1: faster than the sound lasts)")
    return "; ".join(parts)


def _rates(made: Iterable[Mapping[str, Any]]) -> str:
    own, prompts = ([m[k] for m in made if m.get(k) is not None] for k in ("semantic_per_s", "prompt_semantic_per_s"))
    return " against ".join(f"{median(r):.1f}{of}" for r, of in ((own, ""), (prompts, " in the prompt")) if r)


def build(made: Mapping[str, Mapping[str, Any]]) -> str:
    """index.html of the samples in a folder, by file name without its ending."""
    groups: dict[str, list[str]] = {}
    for file in sorted(made, key=lambda f: (made[f]["name"], made[f]["settings"]["sample"])):
        groups.setdefault(made[file]["name"], []).append(file)
    rows = []
    for name, files in groups.items():
        some, how = [made[f] for f in files], made[files[0]]["settings"]
        draws = ", ".join(f"{stage} {_draw(how['draws'][stage])}" for stage in ("semantic", "coarse", "fine"))
        rows.append([name, some[0]["run"], how["mode"], draws, len(some), f"{median(m['seconds'] for m in some):.2f}",
                     html.number(how["seconds"], 2), sum(m["ended"] for m in some), _rates(some) or "–",
                     f"{sum(m['wall_s'] for m in some) / max(1e-9, sum(m['seconds'] for m in some)):.2f}"])
    head = ("prompt", "run", "mode", "temperature", "samples", "seconds", "asked", "ended", "semantic tokens/s", "rtf")
    sections = [("all", "All", html.table(head, rows, (4, 5, 6, 7, 9)))]
    for i, (name, files) in enumerate(groups.items()):
        cards = [_prompt_card(name, made[files[0]])] if made[files[0]]["settings"]["prompt"] else []
        cards += [_card(file, made[file]) for file in files]
        sections.append((f"prompt-{i}", name, html.tag("div", *cards, cls="cards")))
    return html.page("Generated audio", summary(list(made.values())), sections)


def _draw(draw: Mapping[str, Any]) -> str:
    more = [f"{k} {draw[k]}" for k in ("top_k", "top_p", "window") if draw.get(k) is not None]
    return " ".join([f"{draw['temperature']:g}", *more])


def _prompt_card(name: str, made: Mapping[str, Any]) -> html.Html:
    asked = made["settings"]
    what = {"continuation": "Prompt, as the model heard it", "acoustic": "Its semantic tokens are said in new voices",
            "resynthesis": "Before the codec"}[asked["mode"]]
    return html.tag("div", html.tag("h3", "prompt"), html.beside(f"page/{name}-prompt.wav"),
                    html.beside(f"page/{name}-prompt.png"), html.tag("p", f"{what}: {asked['prompt']}", cls="soft"), cls="card")


def _card(file: str, made: Mapping[str, Any]) -> html.Html:
    asked = made["settings"]["seconds"]
    parts = [f"{made['seconds']:.2f} s" + (f" of {asked:g} s asked for" if asked else "")]
    parts += ["ended by the model"] if made["ended"] else []
    if made["settings"]["mode"] == "continuation":
        parts.append(f"the dashed line is where the prompt ends, at {made['prompt_s']:.2f} s")
    if rates := _rates([made]):
        parts.append(f"semantic tokens/s {rates}")
    return html.tag("div", html.tag("h3", f"sample {made['settings']['sample']}"), html.beside(f"{file}.wav"),
                    html.beside(f"page/{file}.png"), html.tag("p", "; ".join(parts), cls="soft"),
                    html.tag("p", html.beside(f"{file}.json"), cls="soft"), cls="card")
