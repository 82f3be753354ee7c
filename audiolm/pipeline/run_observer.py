"""One run as people see it: the terminal's board, the tracker's runs, the index `runs/{run}.json` and the last words.

Implements dag.Observer; knows steps and paths, not audio.
"""

from __future__ import annotations

import time

from audiolm.config.base import flatten
from audiolm.config.pipeline import Pipeline
from audiolm.dag.plan import PlanRow
from audiolm.dag.run_index import index_path, write_index
from audiolm.dag.step import Artifact, StepContext
from audiolm.pipeline.progress import ProgressBoard, duration
from audiolm.store import exists, get_json, join
from audiolm.tracking.registry import SYSTEM
from audiolm.tracking.tracker import Tracker

PROGRESS_S = 5.0  # how often a data step's progress becomes a metric
HEADLINES = {"codec.pesq": ("codec_figures", "pesq"), "abx.within": ("semantic_figures", "abx_within"),
             "abx.across": ("semantic_figures", "abx_across"),
             "wer.acoustic": ("tables", "II/acoustic generation/WER %")}  # the run's own metrics: (step, its fact)
ENDS = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}  # a step's end in MLflow's words


class RunObserver:
    """Tells board and tracker how steps fare. Called from several threads."""

    def __init__(self, cfg: Pipeline, rows: list[PlanRow], git: dict[str, str]):
        self.cfg, self.rows, self.git = cfg, rows, git
        self.board = ProgressBoard()
        self.tracker = Tracker(cfg.tracking, cfg.store, cfg.run.experiment, cfg.run.name, self.board.say)
        self._handles, self._began, self._logged, self._index = {}, {}, {}, {}
        self._made_with: dict[str, str] = {}  # the builds that the samples were made with, by step
        self.tracker.start(flatten(cfg), {**git, "store": cfg.store, "corpus": cfg.corpus.name})

    def say(self, text: str) -> None:
        self.board.say(text)

    def began(self, out: StepContext) -> None:
        name = out.step.name
        self._began[name] = time.monotonic()
        self.board.start(name)
        handle = self.tracker.begin_step(
            name, join(out.path, "attempts", f"{out.attempt:04d}.json"), flatten(out.step.recipe["config"]),
            {**self.git, "fingerprint": out.step.fingerprint, "build": out.path.rsplit("/", 1)[1],
             "attempt": str(out.attempt), "path": out.path})
        self.tracker.ship(handle, out.metrics_path, out.path if out.step.trains else None)
        self._handles[name] = handle

    def progress(self, out: StepContext, done: float, total: float, unit: str, note: str) -> None:
        name = out.step.name
        self.board.update(name, done, total, unit, note)
        now = time.monotonic()
        if out.step.trains or (done < total and now - self._logged.get(name, 0.0) < PROGRESS_S):
            return  # a training step's workers log their own
        if done and now > self._began[name]:
            self._logged[name] = now
            out.log(int(done), {"progress.share": done / total if total else 1.0,
                                f"progress.{unit.replace(' ', '_')}_per_s": done / (now - self._began[name])})

    def ended(self, out: StepContext, status: str, facts: dict, error: str | None) -> str | None:
        name = out.step.name
        took = time.monotonic() - self._began[name]
        self.board.end(name, status.upper(), took, error or headline(facts))
        ui = join(out.path, "ui")
        return self.tracker.end_step(self._handles.pop(name), ENDS[status], facts, ui if exists(ui) else None)

    def finished(self, name: str, artifact: Artifact) -> None:
        """A step's artifact is there, just made or made before; keeps the index current."""
        run_id = artifact.record.get("run_id")
        if not next(r for r in self.rows if r.step.name == name).run:
            self.tracker.link_step(name, run_id)
        figures = {metric: artifact.facts.get(fact) for metric, (step, fact) in HEADLINES.items() if step == name}
        figures[f"{name}.loss"] = artifact.facts.get("val.loss")  # of every training step
        self.tracker.headline({metric: value for metric, value in figures.items() if value is not None})
        if name == "manifest":
            sources = [getattr(s, "root", None) or s.uri for s in self.cfg.corpus.sources]
            self.tracker.uses_dataset(self.cfg.corpus.name, artifact.facts.get("listing", ""), sources)
        self._index[name] = {"path": artifact.path, "build": artifact.build, "run_id": run_id}
        if name == "samples":
            self._made_with = artifact.record["inputs"]
        order = [r.step.name for r in self.rows]
        before = (get_json(index_path(self.cfg)) or {}).get("steps", {})
        known = {n: e for n, e in {**before, **self._index}.items() if n in order}
        write_index(self.cfg, {n: known[n] for n in order if n in known})

    def close(self, status: str, seconds: float) -> None:
        """Ends the tracker's run and prints where everything is."""
        heard = {name: build for name, build in self._made_with.items() if name in SYSTEM}
        if status == "FINISHED" and heard and all(self._index.get(n, {}).get("build") == b for n, b in heard.items()):
            self.tracker.serves(index_path(self.cfg), {name: self._index[name]["path"] for name in heard})
        self.tracker.finish(status)
        if status != "FINISHED":
            return
        done = "all" if len(self._index) == len(self.rows) else f"{len(self._index)} of"
        self.say(f"{done} {len(self.rows)} steps done, in {duration(seconds)}")
        for label, step, path in (("sound", "samples", "wav"), ("report", "report", "ui/report.html")):
            if step in self._index:
                self.say(f"{label + ':':8}{join(self._index[step]['path'], path)}")
        self.say(f"{'index:':8}{index_path(self.cfg)}")
        if url := self.tracker.url():
            self.say(f"{'UI:':8}{url}")


def headline(facts: dict) -> str:
    """A finished step's facts in a line: the `summary` it gave, or its first few numbers and its `notes`."""
    if "summary" in facts:
        return facts["summary"]
    numbers = [(k, v) for k, v in facts.items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return "; ".join([", ".join(f"{k} {v:.4g}" for k, v in numbers[:4]), *facts.get("notes", ())])
