"""The step `report`: one self-contained page with what ran, what it sounds like and what the figures say.

Reads samples.json, evaluate.json, recipes, done.json and metrics files of the inputs' builds; every part is optional
and the page says what is missing.  Leaves {out.path}/ui/report.html and its pictures under ui/plots/.  Losses are in
nats per token, mel distances in nats, rates in kb/s; wavs are 16 kHz mono.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from audiolm import store
from audiolm.config.base import flatten
from audiolm.eval import gates
from audiolm.eval.codec_quality import HEADS, notes
from audiolm.eval.results import BASELINE_TITLES, STAGE_TITLES, Result
from audiolm.metrics_log import read_build
from audiolm.render import plots
from audiolm.render.html import Html, join, missing, number, page, picture, table, tag, verdict
from audiolm.render.html import playable as _wav
from audiolm.report import results_page
from audiolm.report.semantic_section import semantic_section, title_of

TRAINED = ("masked_model", "codec", "lm_semantic", "lm_coarse", "lm_fine")
MODES = {"unconditional": "Unconditional: everything is made up", "acoustic": "Acoustic generation: the words of a held-out "
         "clip, a voice of the model's own", "continuation": "Continuation of a prompt by an unseen speaker (dashed line: "
         "where the prompt ends)", "resynthesis": "Resynthesis: held-out clips through the codec alone"}
LADDER_CLIPS = 4  # with players; the distances count all clips
POINTS = 1000  # of a curve


def build_report(config: dict[str, Any], inputs: Mapping[str, Any], out: Any) -> dict[str, Any]:
    """Step function. config: title; inputs: any of manifest, samples, evaluate and the trained models' artifacts.

    Returns the page's size and what it holds. Raises nothing for what is missing.
    """
    paths = {name: artifact.path for name, artifact in inputs.items()}
    samples = _json(paths, "samples", "samples.json") or []
    figures = _json(paths, "evaluate", "evaluate.json") or {}
    codec = _json(paths, "codec_figures", "codec.json") or {}
    plot = _Plots(store.join(out.path, "ui", "plots"))
    out.check()
    parts = [
        ("sound", "Sound", _sound(samples, paths.get("samples", ""))),
        ("ladder", "Stage ladder", _ladder(figures.get("ladder") or [], paths.get("evaluate", ""), plot)),
        *_tables(paths),
        ("stages", "Language models", join([_stages(figures.get("stages") or {}, figures.get("not_under") or ()),
                                            *_gates(paths)])),
        ("conditioning", "Is the conditioning used?", _conditioning(figures.get("conditioning") or {})),
        ("codec", "Codec", _codec(codec, paths.get("codec_figures", ""), plot)),
        ("tokens", "Semantic tokens", join([
            semantic_section(paths, plot.add, _wav), "" if "semantic_figures" in paths else _tokens(figures.get("tokens") or {})])),
        ("curves", "Training", _curves(paths, figures, codec, plot)),
        ("run", "What ran", _what_ran(inputs)),
    ]
    out.check()
    title = f"AudioLM: {config.get('title', 'run')}"
    text = page(title, time.strftime("built %Y-%m-%d %H:%M UTC", time.gmtime()), parts).encode()
    store.put(store.join(out.path, "ui", "report.html"), text)
    return {"bytes": len(text), "players": text.count(b"<audio "), "plots": plot.count,
            "headline": f"{text.count(b'<audio ')} players, {plot.count} plots, {len(text) / 2**20:.1f} MB"}


class _Plots:
    """Pictures go into the page and, as files, to the tracker."""

    def __init__(self, folder: str):
        self.folder, self.count = folder, 0

    def add(self, name: str, png: bytes, text: str) -> Html:
        store.put(store.join(self.folder, f"{name}.png"), png)
        self.count += 1
        return picture(png, text)


def _json(paths: Mapping[str, str], step: str, name: str) -> Any:
    return store.get_json(store.join(paths[step], name)) if step in paths else None


def _sound(samples: list[dict], folder: str) -> Html:
    if not samples:
        return missing("No samples: the step `samples` is not among this report's inputs.")
    blocks = []
    for mode in dict.fromkeys([*MODES, *(s.get("mode", "other") for s in samples)]):
        cards = []
        for s in (s for s in samples if s.get("mode", "other") == mode):
            found = _wav(store.join(folder, s["file"]))
            facts = [f"{number(s.get('seconds'), 1)} s", f"peak {number(s.get('peak'), 2)}"]
            if s.get("prompt_s"):
                facts.append(f"prompt {number(s['prompt_s'], 1)} s")
            said = tag("p", "“", s["text"], "”", cls="soft") if s.get("text") else ""
            title = s.get("title", s["file"])
            if found is None:
                cards.append(tag("div", tag("h3", title), missing(f"{s['file']} is gone."), cls="card"))
                continue
            wav_T, sound = found
            image = picture(plots.spectrogram(wav_T, "", s.get("prompt_s")), f"Spectrogram of {title}")
            cards.append(tag("div", tag("h3", title), tag("p", ", ".join(facts), cls="soft"), sound, image, said, cls="card"))
        if cards:
            blocks += [tag("h3", MODES.get(mode, mode)), tag("div", *cards, cls="cards")]
    return join(blocks)


def _ladder(rungs: list[dict], folder: str, plot: _Plots) -> Html:
    if not rungs:
        return missing("No stage ladder: the step `evaluate` is not among this report's inputs.")
    measured = [r for r in rungs if isinstance(r.get("mel"), (int, float))]
    clips = list(dict.fromkeys(f["clip"] for r in rungs for f in r.get("files", ())))[:LADDER_CLIPS]
    rows = []
    for r in rungs:
        files = {f["clip"]: f["file"] for f in r.get("files", ())}
        found = (_wav(store.join(folder, files[c])) if c in files else None for c in clips)
        rows.append([r["rung"], number(r.get("mel")), *(sound[1] if sound else "–" for sound in found)])
    bars = plot.add("ladder", plots.bars([r["rung"] for r in measured], [r["mel"] for r in measured],
                                         "Mel distance to the original", "nats"), "Mel distance at each rung")
    return join([tag("p", "The same held-out clips with one more stage of the system at each rung: where the sound gets "
                          "worse, that stage is the weak one. From “coarse from true semantic” on the model is free to "
                          "say it in another voice, so the distance grows even where it sounds well.", cls="soft"),
                 bars, table(["rung", "mel", *clips], rows, [1])])


def _tables(paths: Mapping[str, str]) -> list[tuple[str, str, Html]]:
    """The paper's tables, and what can be heard of them."""
    if "tables" not in paths:
        return []
    rows = [Result(**r) for r in _json(paths, "tables", "rows.json") or ()]
    heard = [{**s, "file": store.join(paths["tables"], s["file"])} for s in _json(paths, "tables", "heard.json") or ()]
    if not rows:
        return [("tables", "The paper's tables", missing("Not measured: tables.suites is empty."))]
    found = [("ours", rows, heard)]
    return [*results_page.sections_of(found), ("heard", "Sound of the tables", results_page.sounds_of(found))]


def _stages(stages: Mapping[str, dict], over: Sequence[Mapping[str, Any]]) -> Html:
    if not stages:
        return missing("No stage losses: the step `evaluate` is not among this report's inputs.")
    parts = [tag("p", "Validation loss on unseen speakers in nats per token, beside what counting the training tokens tells: "
                      "how often each occurs, what follows the tokens before it (Kneser-Ney) and, of acoustic tokens, what "
                      "follows the same level one frame before or goes with the level below. All are asked about the same "
                      "tokens.", cls="soft")]
    for columns, against in ((("unigram", "bigram", "fivegram"), ("bigram", "fivegram")),
                             (("unigram", "previous", "below", "baseline"), ("baseline",))):
        rows = []
        for stage, s in stages.items():
            if (stage == "lm_semantic") == ("bigram" in columns):
                rows += [_loss_row(_stage(stage, row.get("level")), row, columns, against)
                         for row in (s, *(s.get("levels") or ()))]
        head = ["", "loss", *(BASELINE_TITLES[n] for n in columns), *(f"against {BASELINE_TITLES[n]}" for n in against), "tokens"]
        parts.append(table(head, rows, [*range(1, 2 + len(columns)), len(head) - 1]))
    if all(s.get("baseline") is not None for s in stages.values()):
        named = "; ".join(f"{_stage(r['stage'], r['level'])} ({r['percent']:.1f} % over)" for r in over)
        parts.append(tag("p", verdict(not over, "Every stage and level is under its better baseline.",
                                      f"Not under the better baseline: {named}.")))
    return join(parts)


def _gates(paths: Mapping[str, str]) -> list[Html]:
    return [tag("p", verdict(False, "", f"{name}, a gate failed"), f": {text}") for step, name in STAGE_TITLES.items()
            if step in paths for text in gates.failures(paths[step])]


def _stage(name: str, level: int | None) -> str:
    return STAGE_TITLES.get(name, name) + (f", level {level}" if level else "")


def _loss_row(label: str, s: Mapping[str, Any], columns: Sequence[str], against: Sequence[str]) -> list:
    loss, marks = s.get("loss"), []
    for base in map(s.get, against):
        apart = None if loss is None or base is None else 100 * (loss / base - 1)
        marks.append(verdict(None if apart is None else apart < 0, f"{-(apart or 0):.1f} % under", f"{apart or 0:.1f} % over"))
    return [label, *(number(s.get(k)) for k in ("loss", *columns)), *marks, number(s.get("tokens"))]


def _conditioning(found: Mapping[str, dict]) -> Html:
    if not found:
        return missing("Not measured.")
    rows = []
    for name, c in found.items():
        true, shuffled = c.get("true"), c.get("shuffled")
        gain = None if true is None or shuffled is None else shuffled - true
        mark = verdict(None if gain is None else gain > gates.needed_gain(c), f"{gain or 0:.3f} lost without it", "not used")
        rows.append([STAGE_TITLES.get(name, name), number(true), number(shuffled), mark])
    return join([tag("p", "The same targets after their own prefix and after another clip's. A stage that reads its prefix "
                          "is worse with the wrong one.", cls="soft"),
                 table(["", "true prefix", "shuffled prefix", ""], rows, [1, 2])])


def _codec(codec: Mapping[str, Any], folder: str, plot: _Plots) -> Html:
    levels, usage, yardstick = codec.get("levels") or [], codec.get("usage") or [], codec.get("mean_spectrum_mel")
    if not levels and not usage:
        return missing("No codec figures: the step `codec_figures` is not among this report's inputs.")
    parts = []
    if codec.get("rows"):
        parts.append(_figures(sorted(codec["rows"], key=lambda r: r.get("kbps") or 0), HEADS))
        parts += [tag("p", line, cls="soft") for line in notes(codec)]
        series: dict[str, list] = {}
        for r in codec["rows"]:
            if r["kbps"] is not None and r["pesq"] is not None:
                series.setdefault(r["codec"], []).append((r["kbps"], r["pesq"]))
        if series:
            png = plots.rate_quality(series, "Quality over bit rate", "PESQ, wide band")
            parts.append(plot.add("codec-rate", png, "PESQ of each codec over its bit rate"))
    if levels and yardstick is not None and levels[-1].get("mel") is not None:
        mark = verdict(levels[-1]["mel"] < yardstick, "better", "worse")
        parts.append(tag("p", "With all levels ", mark, f" than each clip's mean spectrum ({number(yardstick)}).", cls="soft"))
    if levels:
        useless = codec.get("levels_that_do_not_help")
        mark = verdict(None if useless is None else not useless, "every level helps",
                       f"no gain from {', '.join(map(str, useless or ()))}")
        parts.append(tag("details", tag("summary", "Each number of levels: ", mark),
                         _figures(levels, (*HEADS[1:], ("gain", "mel gained by the level", 4)))))
    if usage:
        png = plots.codebook_use(*([u.get(k, 0) for u in usage] for k in ("level", "perplexity", "used")))
        parts.append(plot.add("codebook-use", png, "Codes used and perplexity of each level"))
    for clip in codec.get("players") or ():
        cards = []
        for f in clip["files"]:
            found, inside = _wav(store.join(folder, f["file"])), [missing(f"{f['file']} is gone.")]
            if found:
                image = picture(plots.spectrogram(found[0], ""), f"Spectrogram of {clip['clip']}, {f['label']}")
                inside = [found[1], image]
            cards.append(tag("div", tag("h3", f["label"]), *inside, cls="card"))
        parts += [tag("h3", f"Held-out clip {clip['clip']}"), tag("div", *cards, cls="cards")]
    return join(parts)


def _figures(rows: Iterable[Mapping[str, Any]], heads: Sequence[tuple[str, str, int]]) -> Html:
    """A table of the columns in which some row has a value; heads are (field, title, digits)."""
    rows = list(rows)
    heads = [h for h in heads if any(r.get(h[0]) is not None for r in rows)]
    cells = [[r[name] if isinstance(r.get(name), str) else number(r.get(name), digits) for name, _, digits in heads]
             for r in rows]
    return table([title for _, title, _ in heads], cells, (i for i, h in enumerate(heads) if h[0] != "codec"))


def _tokens(tokens: Mapping[str, Any]) -> Html:
    if not tokens:
        return missing("Not measured.")
    labels = {"entropy_bits": "entropy, bits", "perplexity": "perplexity", "mean_run": "mean run, frames of 40 ms",
              "used": "tokens used"}
    return table(["", ""], [[labels.get(k, k), number(v, 2)] for k, v in tokens.items()], [1])


def _curves(paths: Mapping[str, str], figures: Mapping[str, Any], codec: Mapping[str, Any], plot: _Plots) -> Html:
    parts = []
    stages, spectrum = figures.get("stages") or {}, codec.get("mean_spectrum_mel")
    trained = [n for n in paths if n.startswith("masked_model_")]
    for name in (n for n in (TRAINED[0], *trained, *TRAINED[1:]) if n in paths):
        rows = [r for r in read_build(paths[name]) if "loss" in r["metrics"] or any(map(_validates, r["metrics"]))]
        if not rows:
            parts.append(missing(f"No metrics file in the build of {STAGE_TITLES.get(name) or title_of(name)}."))
            continue
        keep = set(np.linspace(0, len(rows) - 1, min(len(rows), POINTS)).round().astype(int).tolist())
        rows = [r for i, r in enumerate(rows) if i in keep or any(map(_validates, r["metrics"]))]
        told = stages.get(name, {})
        base = {title: told[k] for k, title in BASELINE_TITLES.items() if told.get(k) is not None and
                (k != "baseline" or told.get("levels"))}  # the mean of each level's better one, a line of its own
        title = STAGE_TITLES.get(name) or title_of(name)
        drawn = [(f"loss-{name}", title, "loss", {"training": "loss", "validation": "val.loss"}, base)]
        if name == "codec":  # its two losses are not one quantity: a weighted sum, and the mel distance
            levels = sorted({k for r in rows for k in r["metrics"] if k.startswith("val.mel/q")})
            by_levels = {f"{i + 1} level{'s' * (i > 0)}": k for i, k in enumerate(levels) if i in (0, 1, 3, len(levels) - 1)}
            whole = {"not quantized": "val.mel/unquantized"}
            drawn = [("loss-codec-training", "codec, training", "loss", {"training": "loss"}, {}),
                     ("loss-codec-validation", "codec, held-out crops", "mel distance",
                      by_levels | whole, {} if spectrum is None else {"mean spectrum": spectrum}),
                     ("codec-pesq", "codec, held-out crops", "PESQ", {"1 level": "val.pesq/q00", "all": "val.pesq"}, {})]
        for file, title, y, metrics, lines in drawn:
            values = {label: [r["metrics"].get(metric) for r in rows] for label, metric in metrics.items()}
            values = {label: v for label, v in values.items() if any(x is not None for x in v)}
            if values:
                png = plots.curves([r["step"] for r in rows], values, title, y, lines)
                parts.append(plot.add(file, png, f"{y} over the training of the {title}"))
    return join(parts) if parts else missing("No training step is among this report's inputs.")


def _validates(metric: str) -> bool:
    return metric.startswith("val.")


def _what_ran(inputs: Mapping[str, Any]) -> Html:
    rows, configs = [], []
    for name, artifact in inputs.items():
        root, build = artifact.path.rstrip("/").rsplit("/", 1)
        done = store.get_json(store.join(artifact.path, "done.json")) or {}
        recipe = store.get_json(store.join(root, "recipe.json")) or {}
        when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(done["time"])) if done.get("time") else "–"
        rows.append([name, root.rsplit("/", 1)[1], build, when, number(done.get("seconds"), 1)])
        lines = [[k, v] for k, v in flatten(recipe.get("config") or {}).items()]
        if lines:
            configs.append(tag("details", tag("summary", f"Configuration of {name}"), table(["field", "value"], lines)))
    parts = [table(["step", "fingerprint", "build", "finished (UTC)", "seconds"], rows, [4])]
    if "manifest" in inputs:
        parts += [tag("h3", "Corpus"), _corpus(inputs["manifest"].facts)]
    return join([*parts, tag("h3", "Configuration"), *configs] if configs else parts)


def _corpus(facts: Mapping[str, Any]) -> Html:
    rows = [[f"hours of {source}", ", ".join(f"{split} {number(h, 2)}" for split, h in by.items())]
            for source, by in (facts.get("hours") or {}).items() if isinstance(by, Mapping)]
    for key, label in (("clips_by_split", "clips"), ("speakers", "speakers"), ("shards", "shards")):
        if isinstance(facts.get(key), Mapping):
            rows.append([label, ", ".join(f"{split} {number(n)}" for split, n in facts[key].items())])
    if isinstance(facts.get("rejected"), Mapping):
        reasons = ", ".join(f"{reason} {n}" for reason, n in facts["rejected"].items() if reason != "total")
        rows.append(["files", f"{number(facts.get('files'))}, rejected {facts['rejected'].get('total', 0)}"
                              + (f" ({reasons})" if reasons else "")])
    return table(["", ""], rows) if rows else missing("The manifest gave no figures.")
