"""The report's section on the semantic side: tokens, their sound and phones, ABX, layers, the masked models' learning.

Reads semantic.json and layers*.json of the inputs' builds (eval.steps.semantic, eval.steps.layers); whatever is not there
is left out and said in words.  Errors in %, differences in points, rates in tokens or bits a second.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from audiolm import store
from audiolm.metrics_log import read_build
from audiolm.render import plots
from audiolm.render.html import Html, esc, join, missing, number, picture, table, tag, verdict

GROUPS = {"held_out": "held-out speakers", "test": "test speakers", "seen": "seen speakers"}
FEATURES = {"centroids": "tokens (centroids)", "semantic": "features", "mfcc": "MFCC (floor)"}
STATISTICS = (("rate", "tokens/s", 2), ("rate_dedup", "tokens/s, deduplicated", 2), ("bits_per_s", "bit/s", 1),
              ("bits_per_s_dedup", "bit/s, deduplicated", 1), ("entropy_bits", "entropy, bits", 2),
              ("perplexity", "perplexity", 1), ("used", "tokens used", 0), ("dedup_ratio", "left after deduplication", 3),
              ("mean_run", "mean run, frames", 2), ("seconds", "seconds of audio", 0))
POINTS = 1000  # of a curve

Add = Callable[[str, bytes, str], Html]
Sound = Callable[[str], tuple[np.ndarray, Html] | None]


def semantic_section(paths: Mapping[str, str], add: Add, sound: Sound) -> Html:
    """The section. paths: builds by step; add(name, png, text) files a picture with the report; sound(path) gives (wav_T,
    player) or None. Raises nothing for what is missing."""
    parts = []
    if (folder := paths.get("semantic_figures")) and (found := store.get_json(store.join(folder, "ui", "semantic.json"))):
        parts = [_statistics(found, folder), _abx(found), _phones(found, folder), _examples(found, folder, sound)]
    for name in (n for n in paths if re.fullmatch(r"layers(_\d+)?", n)):
        parts.append(_layers(name, paths[name]))
    for name in (n for n in paths if n.startswith("masked_model")):
        parts.append(_learning(name, paths[name], add))
    return join(parts)


def title_of(step: str) -> str:
    """masked_model_2 -> its name on the page."""
    _, _, iteration = step.partition("masked_model_")
    return f"masked audio model, iteration {iteration}" if iteration else "masked audio model"


def _image(folder: str, file: str, text: str) -> Html:
    try:
        return picture(store.get(store.join(folder, file)), text)
    except FileNotFoundError:
        return missing(f"{file} is gone.")


def _statistics(found: Mapping[str, Any], folder: str) -> Html:
    names = {"train": "train", "held_out": "held out"}
    there = {g: found["statistics"][g] for g in names if found["statistics"][g]}
    rows = [[label, *(number(s[key], digits) for s in there.values())] for key, label, digits in STATISTICS]
    parts = [tag("p", f"{found['vocab']} tokens; a frame is {1000 / found['rate_hz']:g} ms. Bit rates are those of single "
                      "tokens, without regard to their order.", cls="soft"),
             table(["", *(names[g] for g in there)], rows, range(1, 1 + len(there)))]
    if found["drift_bits"] is None:
        parts.append(missing("No clips are held out, so there is no use to compare with." if "train" in there
                             else "No train clips here, so there is no use to compare with."))
    else:
        parts.append(tag("p", f"Train and held-out use differ by {found['drift_bits']:.4f} bits (Jensen-Shannon; 0: alike, "
                              "1: no token in common).", cls="soft"))
    parts += [_image(folder, found["pictures"]["use"], "Share of each token, from the most used"),
              _image(folder, found["pictures"]["runs"], "Runs by their length")]
    for g, s in there.items():
        ends = [[what, e["token"], f"{100 * e['share']:.3f} %", number(e["mean_run"], 2)]
                for what, key in (("most", "most_used"), ("least", "least_used")) for e in s[key]]
        parts.append(tag("details", tag("summary", f"Most and least used tokens, {names[g]}"),
                         table(["used", "token", "of frames", "mean run"], ends, [1, 2, 3])))
    return join(parts)


def _interval(row: Mapping[str, Any], mode: str) -> str:
    if row.get(mode) is None:
        return "–"
    lo, hi = row[f"interval_{mode}"]
    return f"{row[mode]:.2f} [{lo:.2f}, {hi:.2f}]"


def _difference(row: Mapping[str, Any], mode: str) -> Html:
    found = row.get(f"difference_{mode}")
    if found is None:
        return esc("–")
    mean, lo, hi = found
    text = f"{mean:+.2f} [{lo:+.2f}, {hi:+.2f}]"
    return verdict(mean < 0, text, text) if lo > 0 or hi < 0 else esc(text)


def _abx(found: Mapping[str, Any]) -> Html:
    parts = [tag("h3", "ABX: are phones told apart?")]
    absent, groups = found["absent"], found["abx"] or {}
    if not groups:
        return join([*parts, missing(f"Not measured: {absent.get('abx', 'no items')}.")])
    parts.append(tag("p", "Error in %, 50 by chance, with 95 % intervals over speakers. The difference is to MFCC's error, in "
                          "points, the same speakers drawn for both; marked where its interval leaves out 0.", cls="soft"))
    rows = []
    for mode in ("within", "across"):
        for kind, label in FEATURES.items():
            cells: list[Any] = [f"{label}, {mode}"]
            for g in GROUPS:
                row = next((r for r in groups.get(g, {}).get("rows", ()) if r["features"] == kind), {})
                cells += [_interval(row, mode), _difference(row, mode)]
            rows.append(cells)
    head = [x for label in GROUPS.values() for x in (label, "minus MFCC")]
    parts.append(table(["", *head], rows, range(1, 5)))
    for g, label in GROUPS.items():
        if g in groups:
            parts.append(tag("p", f"{label}: {', '.join(groups[g]['speakers'])}", cls="soft"))
        else:
            parts.append(missing(f"No {label}: {absent.get(g, 'none')}."))
    return join([*parts, *(tag("p", r, cls="bad") for r in found["remarks"])])


def _phones(found: Mapping[str, Any], folder: str) -> Html:
    parts, phones = [tag("h3", "Tokens and phones")], found["phones"]
    if not phones:
        return join([*parts, missing(f"Not measured: {found['absent'].get('phones', 'no alignment')}.")])
    names = (("phone_purity", "phone purity: a frame's phone is its token's likeliest"),
             ("cluster_purity", "cluster purity: a frame's token is its phone's likeliest"),
             ("pnmi", "PNMI: share of the phones' entropy that the tokens take away"))
    return join([*parts, table(["", ""], [[label, number(phones[key])] for key, label in names], [1]),
                 tag("p", f"{phones['frames']} frames of {phones['tokens']} tokens, {len(phones['phones'])} phones with "
                          f"silence, {len(phones['speakers'])} speakers; figures as in HuBERT (2106.07447).", cls="soft"),
                 _image(folder, phones["picture"], "Share of phones within each token")])


def _examples(found: Mapping[str, Any], folder: str, sound: Sound) -> Html:
    rows = []
    for e in found["examples"]:
        heard = sound(store.join(folder, e["file"]))
        phone = f"{e['phone']} ({100 * e['phone_share']:.0f} %)" if e["phone"] else "–"
        clips = ", ".join(f"{o['clip']} at {o['start_s']:.2f} s" for o in e["occurrences"])
        rows.append([e["token"], f"{100 * e['share']:.2f} %", phone, heard[1] if heard else missing(f"{e['file']} is gone."),
                     tag("details", tag("summary", f"{len(e['occurrences'])} places"), tag("p", clips, cls="soft"))])
    if not rows:
        return missing("No tokens to listen to.")
    source = {"held_out": "held-out", "train": "train"}[found["examples_from"]]
    return join([tag("h3", "What the tokens sound like"),
                 tag("p", f"The most used tokens in {source} clips, each in up to six places, with a little of what lies "
                          "before and after.", cls="soft"),
                 table(["token", "of frames", "likeliest phone", "sound", "from"], rows, [0, 1])])


def _layers(name: str, folder: str) -> Html:
    target = f"for {title_of('masked_model_' + name[7:])}" if name[7:] else "for the tokens"
    found = store.get_json(store.join(folder, "ui", "layers.json"))
    parts = [tag("h3", f"Choice of layer and K, {target}")]
    if not found:
        return join([*parts, missing("layers.json is gone.")])
    choice, rows = found["choice"], []
    for r in found["rows"]:
        what = "MFCC" if r["layer"] is None else f"layer {r['layer']}, " + (f"K = {r['k']}" if r["k"] else "features")
        chosen = r["layer"] is not None and (r["layer"], r["k"]) == (choice["layer"], choice["k"])
        rows.append([what, _interval(r, "within"), _interval(r, "across"), verdict(True, "chosen", "") if chosen else ""])
    return join([*parts, _image(folder, "ui/layers.png", "ABX of each layer and K"),
                 tag("details", tag("summary", f"All {len(rows)} measured; chosen: layer {choice['layer']}, K = {choice['k']}"),
                     table(["", "within speaker", "across speaker", ""], rows, [1, 2]))])


def _learning(name: str, folder: str, add: Add) -> Html:
    """Accuracy and perplexities over the training of one masked model; its loss is among the others' losses."""
    rows = [r for r in read_build(folder) if any("accuracy" in m or "perplexity" in m for m in r["metrics"])]
    keep = set(np.linspace(0, len(rows) - 1, min(len(rows), POINTS)).astype(int).tolist())
    rows = [r for i, r in enumerate(rows) if i in keep or any(m.startswith("val.") for m in r["metrics"])]
    metrics = sorted({m for r in rows for m in r["metrics"]})
    parts = []
    for y in ("accuracy", "perplexity"):
        values = {_label(m, y): [r["metrics"].get(m) for r in rows] for m in metrics if y in m}
        if values:
            png = plots.curves([r["step"] for r in rows], values, title_of(name), y)
            parts.append(add(f"{y}-{name}", png, f"{y} over the training of the {title_of(name)}"))
    return join([tag("h3", f"Training of the {title_of(name)}"), *parts]) if parts else Html("")


def _label(metric: str, y: str) -> str:
    """val.prediction_perplexity -> prediction, validation."""
    own = metric.removeprefix("val.").replace(y, "").replace("_", " ").replace("/", " ").strip()
    return ", ".join(x for x in (own, "validation" if metric.startswith("val.") else "training") if x)
