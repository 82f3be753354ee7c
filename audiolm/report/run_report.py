"""The step `report`: one self-contained page with what ran, how it sounds and what was measured.

Reads samples.json, evaluate.json, recipes, done.json and metrics files of the inputs' builds; every part is optional
and the page names what is missing.  Writes {out.path}/ui/report.html and its pictures under ui/plots/.  Losses are in
nats per token, mel distances in nats, rates in kb/s; wavs are 16 kHz mono.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from audiolm import store
from audiolm.config.base import flatten
from audiolm.dag.outputs import build_of
from audiolm.eval import stage_gates
from audiolm.eval.codec_quality import HEADS, notes
from audiolm.eval.results import BASELINE_TITLES, STAGE_TITLES, Result
from audiolm.render import plots
from audiolm.render.html import Section, absent, number, picture, playable, render, sound_card, table, verdict
from audiolm.report import results_page
from audiolm.report.curves import curves_section
from audiolm.report.semantic_section import semantic_section

MODES = {"unconditional": "Unconditional: everything is made up", "acoustic": "Acoustic generation: the words of a held-out "
         "clip, a voice of the model's own", "continuation": "Continuation of a prompt by an unseen speaker (dashed line: "
         "where the prompt ends)", "resynthesis": "Resynthesis: held-out clips through the codec alone"}
CORPUS_FACTS = ("hours", "clips_by_split", "speakers", "shards", "files", "rejected")  # of the manifest
LADDER_CLIPS = 4  # with players; the distances count all clips


def build_report(config: dict[str, Any], inputs: Mapping[str, Any], out: Any) -> dict[str, Any]:
    """Step function. config: title; inputs: any of manifest, samples, evaluate and the trained models' artifacts.

    Returns the page's size and how much it holds. Raises nothing for what is missing.
    """
    paths = {name: artifact.path for name, artifact in inputs.items()}
    figures = _json(paths, "evaluate", "evaluate.json") or {}
    codec = _json(paths, "codec_figures", "codec.json") or {}
    plot = _Plots(store.join(out.path, "ui", "plots"))
    out.check()
    sections = [
        _samples(_json(paths, "samples", "samples.json") or [], paths.get("samples", "")),
        _ladder(figures.get("ladder") or [], paths.get("evaluate", ""), plot),
        *_tables(paths),
        _stages(figures.get("stages") or {}, figures.get("not_under") or (), paths),
        _conditioning(figures.get("conditioning") or {}),
        _codec(codec, paths.get("codec_figures", ""), plot),
        semantic_section(paths, figures.get("tokens") or {}, plot.add),
        curves_section(paths, figures.get("stages") or {}, codec.get("mean_spectrum_mel"), plot.add),
        _run(inputs),
    ]
    out.check()
    text = render("page.html", title=f"AudioLM: {config.get('title', 'run')}", sections=sections,
                  subtitle=time.strftime("built %Y-%m-%d %H:%M UTC", time.gmtime())).encode()
    store.put(store.join(out.path, "ui", "report.html"), text)
    players = text.count(b"<audio ")
    return {"bytes": len(text), "players": players, "plots": plot.count,
            "headline": f"{players} players, {plot.count} plots, {len(text) / 2**20:.1f} MB"}


class _Plots:
    """Writes each plot twice: into the page, and as a file that the tracker uploads."""

    def __init__(self, folder: str):
        self.folder, self.count = folder, 0

    def add(self, name: str, png: bytes, text: str) -> Any:
        store.put(store.join(self.folder, f"{name}.png"), png)
        self.count += 1
        return picture(png, text)


def _json(paths: Mapping[str, str], step: str, name: str) -> Any:
    return store.get_json(store.join(paths[step], name)) if step in paths else None


def _samples(samples: Sequence[Mapping[str, Any]], folder: str) -> Section:
    """Players of the generated samples, by mode."""
    groups: dict[str, list[dict]] = {mode: [] for mode in MODES}
    for s in samples:
        notes = [f"{number(s.get('seconds'), 1)} s, peak {number(s.get('peak'), 2)}"
                 + (f", prompt {number(s['prompt_s'], 1)} s" if s.get("prompt_s") else "")]
        notes += [f"“{s['text']}”"] if s.get("text") else []
        groups.setdefault(s.get("mode", "other"), []).append(
            sound_card(s.get("title", s["file"]), folder, s["file"], prompt_s=s.get("prompt_s"), notes=notes))
    if not samples:
        return absent("sound", "Sound", "No samples: the step `samples` is not among this report's inputs.")
    return Section("sound", "Sound", "players.html", {
        "groups": [(MODES.get(mode, mode), cards) for mode, cards in groups.items() if cards]})


def _ladder(rungs: Sequence[Mapping[str, Any]], folder: str, plot: _Plots) -> Section:
    if not rungs:
        return absent("ladder", "Stage ladder", "No stage ladder: the step `evaluate` is not among this report's inputs.")
    clips = list(dict.fromkeys(f["clip"] for r in rungs for f in r.get("files", ())))[:LADDER_CLIPS]
    rows = []
    for r in rungs:
        files = {f["clip"]: f["file"] for f in r.get("files", ())}
        sounds = (playable(store.join(folder, files[c])) if c in files else None for c in clips)
        rows.append([r["rung"], number(r.get("mel")), *(sound[1] if sound else "–" for sound in sounds)])
    measured = [r for r in rungs if isinstance(r.get("mel"), (int, float))]
    bars = plots.bars([r["rung"] for r in measured], [r["mel"] for r in measured], "Mel distance to the original", "nats")
    return Section("ladder", "Stage ladder", "ladder.html", {
        "bars": plot.add("ladder", bars, "Mel distance at each rung"), "table": table(["rung", "mel", *clips], rows, [1])})


def _tables(paths: Mapping[str, str]) -> list[Section]:
    """The paper's tables and their sounds."""
    if "tables" not in paths:
        return []
    rows = [Result(**r) for r in _json(paths, "tables", "rows.json") or ()]
    if not rows:
        return [absent("tables", "The paper's tables", "Not measured: tables.suites is empty.")]
    sounds = [{**s, "file": store.join(paths["tables"], s["file"])} for s in _json(paths, "tables", "heard.json") or ()]
    columns = [("ours", rows, sounds)]
    return [*results_page.sections_of(columns), results_page.sounds_of("heard", "Sound of the tables", columns)]


def _stages(stages: Mapping[str, Mapping], over: Sequence[Mapping[str, Any]], paths: Mapping[str, str]) -> Section:
    """Losses of the language models beside their baselines, and the gates that failed."""
    semantic = {name: s for name, s in stages.items() if name == "lm_semantic"}
    acoustic = {name: s for name, s in stages.items() if name != "lm_semantic"}
    summary = None
    if all(s.get("baseline") is not None for s in stages.values()):
        names = "; ".join(f"{_stage_title(r['stage'], r['level'])} ({r['percent']:.1f} % over)" for r in over)
        summary = verdict(not over, "Every stage and level is under its better baseline.",
                          f"Not under the better baseline: {names}.")
    failed = [(title, text) for step, title in STAGE_TITLES.items() if step in paths
              for text in stage_gates.failures(paths[step])]
    return Section("stages", "Language models", "stages.html", {
        "tables": [_losses(semantic, ("unigram", "bigram", "fivegram"), ("bigram", "fivegram")),
                   _losses(acoustic, ("unigram", "previous", "below", "baseline"), ("baseline",))] if stages else [],
        "summary": summary, "gates": failed})


def _stage_title(name: str, level: int | str | None) -> str:
    part = f", {'' if isinstance(level, str) else 'level '}{level}" if level else ""
    return STAGE_TITLES.get(name, name) + part


def _losses(stages: Mapping[str, Mapping], columns: Sequence[str], against: Sequence[str]) -> dict[str, Any]:
    """Loss and baselines of each stage and level; `against` names the baselines it is compared with, in percent."""
    rows = []
    for name, stage in stages.items():
        lengths = stage.get("lengths")
        for s in (stage, *([{**lengths, "level": "run lengths"}] if lengths else ()), *(stage.get("levels") or ())):
            marks = []
            for base in map(s.get, against):
                if s.get("loss") is None or base is None:
                    marks.append("–")
                    continue
                over = 100 * (s["loss"] / base - 1)
                marks.append(verdict(over < 0, f"{-over:.1f} % under", f"{over:.1f} % over"))
            rows.append([_stage_title(name, s.get("level")), *(number(s.get(k)) for k in ("loss", *columns)), *marks,
                         number(s.get("tokens"))])
    head = ["", "loss", *(BASELINE_TITLES[n] for n in columns), *(f"against {BASELINE_TITLES[n]}" for n in against), "tokens"]
    return table(head, rows, [*range(1, 2 + len(columns)), len(head) - 1])


def _conditioning(stages: Mapping[str, Mapping]) -> Section:
    name, title = "conditioning", "Is the conditioning used?"
    if not stages:
        return absent(name, title, "Not measured.")
    rows = []
    for stage, c in stages.items():
        true, shuffled = c.get("true"), c.get("shuffled")
        gain = None if true is None or shuffled is None else shuffled - true
        used = None if gain is None else gain > stage_gates.needed_gain(c)
        mark = verdict(used, f"{gain or 0:.3f} lost without it", "not used")
        rows.append([STAGE_TITLES.get(stage, stage), number(true), number(shuffled), mark])
    return Section(name, title, "conditioning.html", {"table": table(["", "true prefix", "shuffled prefix", ""], rows, [1, 2])})


def _codec(codec: Mapping[str, Any], folder: str, plot: _Plots) -> Section:
    """Codec quality beside other codecs, by number of levels, and the use of the codebooks."""
    levels, usage, mean_spectrum = codec.get("levels") or [], codec.get("usage") or [], codec.get("mean_spectrum_mel")
    if not levels and not usage:
        return absent("codec", "Codec", "No codec figures: the step `codec_figures` is not among this report's inputs.")
    rows = sorted(codec.get("rows") or (), key=lambda r: r.get("kbps") or 0)
    best = levels[-1].get("mel") if levels else None
    useless = codec.get("levels_that_do_not_help")
    use = plots.codebook_use(*([u.get(k, 0) for u in usage] for k in ("level", "perplexity", "used"))) if usage else None
    series: dict[str, list] = {}  # of each codec its (kb/s, PESQ)
    for r in rows:
        if r["kbps"] is not None and r["pesq"] is not None:
            series.setdefault(r["codec"], []).append((r["kbps"], r["pesq"]))
    rates = plots.rate_quality(series, "Quality over bit rate", "PESQ, wide band") if series else None
    return Section("codec", "Codec", "codec.html", {
        "gates": stage_gates.failures(folder) if folder else [],
        "codecs": _quality(rows, HEADS), "notes": notes(codec) if rows else [],
        "rate_picture": plot.add("codec-rate", rates, "PESQ of each codec over its bit rate") if rates else "",
        "mean_spectrum": mean_spectrum, "beats_mean": None if None in (best, mean_spectrum) else
        verdict(best < mean_spectrum, "better", "worse"),
        "levels": _quality(levels, (*HEADS[1:], ("gain", "mel gained by the level", 4))),
        "levels_help": verdict(None if useless is None else not useless, "every level helps",
                               f"no gain from {', '.join(map(str, useless or ()))}"),
        "usage_picture": plot.add("codebook-use", use, "Codes used and perplexity of each level") if use else "",
        "players": [(clip["clip"], [sound_card(f["label"], folder, f["file"], alt=f"{clip['clip']}, {f['label']}")
                                    for f in clip["files"]]) for clip in codec.get("players") or ()]})


def _quality(rows: Iterable[Mapping[str, Any]], heads: Sequence[tuple[str, str, int]]) -> dict[str, Any]:
    """A table of the columns in which some row has a value; heads are (field, title, digits)."""
    heads = [h for h in heads if any(r.get(h[0]) is not None for r in rows)]
    cells = [[r[name] if isinstance(r.get(name), str) else number(r.get(name), digits) for name, _, digits in heads]
             for r in rows]
    return table([title for _, title, _ in heads], cells, (i for i, h in enumerate(heads) if h[0] != "codec"))


def _run(inputs: Mapping[str, Any]) -> Section:
    """Builds, their times and configs, and the corpus."""
    rows, configs = [], []
    for name, artifact in inputs.items():
        folder = build_of(artifact.path)
        root, build = folder.rsplit("/", 1)
        done = store.get_json(store.join(folder, "done.json")) or {}
        recipe = store.get_json(store.join(root, "recipe.json")) or {}
        when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(done["time"])) if done.get("time") else "–"
        rows.append([name, root.rsplit("/", 1)[1], build, when, number(done.get("seconds"), 1)])
        if fields := flatten(recipe.get("config") or {}):
            configs.append((name, table(["field", "value"], fields.items())))
    facts = inputs["manifest"].facts if "manifest" in inputs else None
    return Section("run", "What ran", "run.html", {
        "steps": table(["step", "fingerprint", "build", "finished (UTC)", "seconds"], rows, [4]),
        "configs": configs, "corpus": None if facts is None else dict.fromkeys(CORPUS_FACTS) | facts})
