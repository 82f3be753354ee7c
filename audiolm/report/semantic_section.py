"""The report's section on the semantic side: tokens, their sound and phones, ABX, layers, the masked models' training.

Reads semantic.json and layers*.json of the inputs' builds (eval.steps.semantic, eval.steps.layers).  The page names
what is missing.  Errors in %, differences in points, rates in tokens or bits a second.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from audiolm import store
from audiolm.render.html import Section, gone, number, playable, stored_picture, table, verdict
from audiolm.report.curves import Add, masked_model_curves, title_of

GROUPS = {"held_out": "held-out speakers", "test": "test speakers", "seen": "seen speakers"}
FEATURES = {"centroids": "tokens (centroids)", "semantic": "features", "mfcc": "MFCC (floor)"}
STATISTICS = (("rate", "tokens/s", 2), ("rate_dedup", "tokens/s, deduplicated", 2), ("bits_per_s", "bit/s", 1),
              ("bits_per_s_dedup", "bit/s, deduplicated", 1), ("entropy_bits", "entropy, bits", 2),
              ("perplexity", "perplexity", 1), ("used", "tokens used", 0), ("dedup_ratio", "left after deduplication", 3),
              ("mean_run", "mean run, frames", 2), ("seconds", "seconds of audio", 0))
PURITIES = (("phone_purity", "phone purity: a frame's phone is its token's likeliest"),
            ("cluster_purity", "cluster purity: a frame's token is its phone's likeliest"),
            ("pnmi", "PNMI: share of the phones' entropy that the tokens take away"))
SUMMARY = {"entropy_bits": "entropy, bits", "perplexity": "perplexity", "mean_run": "mean run, frames of 40 ms",
           "used": "tokens used"}  # evaluate.json's, of a run without semantic_figures


def semantic_section(paths: Mapping[str, str], tokens: Mapping[str, Any], add: Add) -> Section:
    """`paths`: builds by step; `tokens`: evaluate.json's statistics; `add` keeps a picture. Raises nothing for missing
    files."""
    folder = paths.get("semantic_figures")
    found = store.get_json(store.join(folder, "ui", "semantic.json")) if folder else None
    trainings = [{"title": title_of(name), "pictures": pictures} for name in paths if name.startswith("masked_model")
                 if (pictures := masked_model_curves(name, paths[name], add))]
    return Section("tokens", "Semantic tokens", "semantic.html", {
        "figures": _figures(found, folder) if found else None, "tokens_absent": folder is None, "trainings": trainings,
        "tokens": table(["", ""], [] if folder else [[SUMMARY.get(k, k), number(v, 2)] for k, v in tokens.items()], [1]),
        "layers": [_layers(n, paths[n]) for n in paths if re.fullmatch(r"layers(_\d+)?", n)]})


def _figures(found: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Tables and pictures of semantic.json."""
    groups = {name: found["statistics"][key] for key, name in (("train", "train"), ("held_out", "held out"))
              if found["statistics"][key]}
    statistics = [[label, *(number(s[key], digits) for s in groups.values())] for key, label, digits in STATISTICS]
    phones = found["phones"]
    return {
        "json": found, "statistics": table(["", *groups], statistics, range(1, 1 + len(groups))),
        "use_picture": stored_picture(folder, found["pictures"]["use"], "Share of each token, from the most used"),
        "runs_picture": stored_picture(folder, found["pictures"]["runs"], "Runs by their length"),
        "ends": groups,
        "abx": _abx(found["abx"] or {}), "groups": GROUPS,
        "examples": [(e, sound[1] if (sound := playable(store.join(folder, e["file"]))) else gone(e["file"]))
                     for e in found["examples"]],
        "phones": phones and table(["", ""], [[label, number(phones[key])] for key, label in PURITIES], [1]),
        "phones_picture": phones and stored_picture(folder, phones["picture"], "Share of phones within each token")}


def _interval(row: Mapping[str, Any], mode: str) -> str:
    if row.get(mode) is None:
        return "–"
    low, high = row[f"interval_{mode}"]
    return f"{row[mode]:.2f} [{low:.2f}, {high:.2f}]"


def _difference(row: Mapping[str, Any], mode: str) -> str:
    """The error minus MFCC's; a mark only where the interval leaves out 0."""
    if (found := row.get(f"difference_{mode}")) is None:
        return "–"
    mean, low, high = found
    text = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
    return verdict(mean < 0, text, text) if low > 0 or high < 0 else text


def _abx(groups: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for mode in ("within", "across"):
        for kind, label in FEATURES.items():
            cells = [f"{label}, {mode}"]
            for group in GROUPS:
                row = next((r for r in groups.get(group, {}).get("rows", ()) if r["features"] == kind), {})
                cells += [_interval(row, mode), _difference(row, mode)]
            rows.append(cells)
    return table(["", *(cell for label in GROUPS.values() for cell in (label, "minus MFCC"))], rows, range(1, 5))


def _layers(name: str, folder: str) -> dict[str, Any]:
    """The choice of a layer and K, for the tokens or for the next iteration of the masked model."""
    target = f"for {title_of('masked_model_' + name[7:])}" if name[7:] else "for the tokens"
    found = store.get_json(store.join(folder, "ui", "layers.json"))
    if not found:
        return {"target": target, "choice": None}
    choice, rows = found["choice"], []
    for r in found["rows"]:
        label = "MFCC" if r["layer"] is None else f"layer {r['layer']}, " + (f"K = {r['k']}" if r["k"] else "features")
        chosen = r["layer"] is not None and (r["layer"], r["k"]) == (choice["layer"], choice["k"])
        rows.append([label, _interval(r, "within"), _interval(r, "across"), verdict(True, "chosen", "") if chosen else ""])
    return {"target": target, "choice": choice, "table": table(["", "within speaker", "across speaker", ""], rows, [1, 2]),
            "picture": stored_picture(folder, "ui/layers.png", "ABX of each layer and K")}
