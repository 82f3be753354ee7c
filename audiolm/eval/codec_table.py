"""The table of codecs: each metric's mean and interval for every codec and number of levels, beside ceiling and floor.

It is made of the parts of codec_scores.py in the clips' own order, so it is the same to the last bit however the work was
shared out.  Intervals are 95 %, over the clips' groups (speakers, or clips).  WER counts errors over the words of all clips.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from audiolm import store
from audiolm.config.run import ClusterConfig
from audiolm.eval.codec_scores import METRICS, Scoring, System, TableClip, available, part_path, score_all
from audiolm.eval.codec_wer import NO_WORDS
from audiolm.eval.metrics.stats import bootstrap_interval, text_table
from audiolm.eval.results import Result, not_measured
from audiolm.tokenizers.base import SAMPLE_RATE

NAME = "codecs"  # of the table, among a page's tables
DIGITS = {"pesq": 2, "visqol": 2, "stoi": 3, "si_sdr_db": 1, "mel": 3, "f0": 3, "wer": 1, "speaker": 3}


def measure(clips: Sequence[TableClip], systems: Sequence[System], absent: Mapping[str, str], scoring: Scoring, folder: str,
            out: Any, cluster: ClusterConfig) -> dict[str, Any]:
    """The table as JSON; `absent`: {shipped codec: why it is not among `systems`}.

    "rows": codec, levels, kbps, role, and by metric {"value", "low", "high", "n"} or {"why"}; "metrics", "absent", "left_out"
    {clip: reason}, "clips", "groups", "seconds", "visqol", "useless" {codec: levels that do not lower the mel distance}.
    Raises ValueError where no clip can be read.
    """
    scoring, lacking = available(scoring)
    left_out = score_all(clips, systems, scoring, folder, out, cluster)
    clips = [clip for clip in clips if clip.name not in left_out]
    if not clips:
        raise ValueError(f"none of the clips can be read, the first: {next(iter(left_out.values()), 'there is none')}")
    rows, samples = [], []
    for system in systems:
        parts = store.at_once(store.get_json, [part_path(folder, clip, system, scoring) for clip in clips])
        samples = [part["samples"] for part in parts]
        versions = zip(*(part["rows"] for part in parts), strict=True)
        rows += [_row(system, some, [c.group for c in clips], sum(samples), scoring) for some in versions]
    return {"rows": rows, "metrics": list(scoring.metrics), "absent": {**lacking, **absent}, "left_out": left_out,
            "clips": len(clips), "groups": len({c.group for c in clips}), "seconds": sum(samples) / SAMPLE_RATE,
            "visqol": scoring.visqol, "asr": scoring.asr, "useless": _useless(rows),
            "spectral": [s.name for s in systems if s.family == "spectral"]}


def _row(system: System, some: Sequence[Mapping[str, Any]], groups: Sequence[str], samples: int,
         scoring: Scoring) -> dict[str, Any]:
    """One number of levels of a codec, of its versions of all clips."""
    bits = [version["bits"] for version in some]
    row: dict[str, Any] = {"codec": system.name, "levels": some[0]["levels"], "role": system.role,
                           "kbps": None if None in bits else sum(bits) * SAMPLE_RATE / samples / 1000}
    for name in scoring.metrics:
        found = [(v["values"][name], group, v["words"]) for v, group in zip(some, groups, strict=True) if name in v["values"]]
        if not found:
            row[name] = {"why": Counter(v["why"][name] for v in some).most_common(1)[0][0]}
            continue
        values, own, words = zip(*found, strict=True)
        value, low, high = bootstrap_interval(values, own, weights=words if name == "wer" else None)
        row[name] = {"value": value, "low": low, "high": high, "n": len(values)}
    return row


def _useless(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """{codec: numbers of levels whose mel distance is no lower than that of the number before}."""
    found: dict[str, list[int]] = {}
    for before, row in zip(rows, rows[1:], strict=False):
        mels = [r.get("mel", {}).get("value") for r in (before, row)]
        if row["role"] == "ours" and before["codec"] == row["codec"] and None not in mels and mels[1] >= mels[0]:
            found.setdefault(row["codec"], []).append(row["levels"])
    return found


def results(table: Mapping[str, Any]) -> list[Result]:
    """The table's rows as pages know them; a metric or a shipped codec that is absent is one row with the fix."""
    rows = []
    for r in table["rows"]:
        item = r["codec"] if r["levels"] is None else f"{r['codec']}, {r['levels']} level{'s' * (r['levels'] > 1)}"
        if r["kbps"] is not None:
            rows.append(Result(NAME, item, "kb/s", r["kbps"], n=table["clips"], role=r["role"]))
        for name in table["metrics"]:
            found = r[name]
            if "value" in found:
                rows.append(Result(NAME, item, METRICS[name], found["value"], found["low"], found["high"], found["n"],
                                   role=r["role"]))
            elif r["role"] != "floor":  # noise has neither pitch nor words: that is what it is for
                rows.append(Result(NAME, item, METRICS[name], None, role=r["role"], note=found["why"]))
    return rows + [not_measured(NAME, "all codecs" if k in METRICS else k, METRICS.get(k, "all metrics"), why)
                   for k, why in table["absent"].items()]


def as_text(table: Mapping[str, Any]) -> str:
    """Aligned columns by bit rate, a value with half the width of its interval, and notes below."""
    names = table["metrics"]
    lines = [["codec", "levels", "kb/s", *(METRICS[name] for name in names)]]
    for r in sorted(table["rows"], key=lambda r: (r["kbps"] is not None, r["kbps"] or 0)):  # stable: equal rates as given
        lines.append([r["codec"], _cell(r["levels"]), "-" if r["kbps"] is None else f"{r['kbps']:.2f}",
                      *(_value(r[name], DIGITS[name]) for name in names)])
    return text_table(lines, notes(table))


def _cell(value: int | None) -> str:
    return "-" if value is None else str(value)


def _value(found: Mapping[str, Any], digits: int) -> str:
    if "value" not in found:
        return "-"
    return f"{found['value']:.{digits}f} ±{(found['high'] - found['low']) / 2:.{digits}f}"


def notes(table: Mapping[str, Any]) -> list[str]:
    """What the numbers are of, and what is absent and why."""
    over = "clips" if table["groups"] == table["clips"] else f"{table['groups']} speakers"
    lines = [f"{table['clips']} clips, {table['seconds']:.1f} s; ± half of the 95 % interval over {over}; rates count the "
             "packets' bits; noise has each clip's mean spectrum."]
    if "wer" in table["metrics"]:
        lines.append(f"WER: by {table['asr'] or 'Whisper tiny.en'}, against what it hears in the original.")
    if table["visqol"]:
        lines.append(f"ViSQOL: {table['visqol']}; scores of another mapper cannot be set beside these.")
    if table["spectral"]:
        lines.append(f"{', '.join(table['spectral'])}: phases are found anew, so SI-SDR says nothing of it.")
    lines += [f"{name}: levels that do not lower the mel distance: {', '.join(map(str, levels))}."
              for name, levels in table["useless"].items()]
    lines += [f"No {METRICS.get(name, name)}: {why}." for name, why in table["absent"].items()]
    for name in table["metrics"]:
        found = [r for r in table["rows"] if r["role"] != "floor"]
        if (fewest := min(r[name].get("n", 0) for r in found)) < table["clips"]:
            why = next((r[name]["why"] for r in found if "why" in r[name]), "too short, or no speech found" if name != "wer"
                       else NO_WORDS)
            lines.append(f"{METRICS[name]} has a value on as few as {fewest} of {table['clips']} clips ({why}).")
    return lines
