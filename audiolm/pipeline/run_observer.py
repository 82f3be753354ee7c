"""The observer of one run: progress on the terminal, runs in the tracker, the run's index and the closing lines.

Implements the Observer of dag/step.py; knows steps and paths, not audio.
"""

from __future__ import annotations

import time

from audiolm.config.base import flatten
from audiolm.config.pipeline import Pipeline
from audiolm.dag.plan import PlanRow
from audiolm.dag.run_index import GENERATION_STEPS, steps_of, write_index
from audiolm.dag.step import Artifact, StepContext
from audiolm.pipeline.progress import ProgressBoard, duration
from audiolm.store import exists, join
from audiolm.tracking.tracker import Tracker

PROGRESS_S = 5.0  # how often a data step's progress becomes a metric
HEADLINES = {"codec.pesq": ("codec_figures", "pesq"), "abx.within": ("semantic_figures", "abx_within"),
             "abx.across": ("semantic_figures", "abx_across"),
             "wer.acoustic": ("tables", "II/acoustic generation/WER %")}  # the run's own metrics: (step, its fact)
MLFLOW_STATUS = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


class RunObserver:
    """Passes the steps' events to terminal and tracker. The steps' threads call it at once."""

    def __init__(self, cfg: Pipeline, rows: list[PlanRow], git: dict[str, str]):
        self.cfg, self.rows, self.git = cfg, rows, git
        self.board = ProgressBoard()
        self.tracker = Tracker(cfg.tracking, cfg.store, cfg.run.experiment, cfg.run.name, self.board.say)
        self._handles: dict[str, object] = {}  # running steps' runs in the tracker
        self._began: dict[str, float] = {}
        self._logged: dict[str, float] = {}  # when a step's progress last became a metric
        self._index: dict[str, dict] = {}
        self._unwritten: dict[str, dict] = {}  # of the index
        self._index_path = ""
        self._sampled_from: dict[str, str] = {}  # the builds that the samples come from, by step
        self.tracker.start(flatten(cfg), {**git, "store": cfg.store, "corpus": cfg.corpus.name})

    def say(self, text: str) -> None:
        self.board.say(text)

    def began(self, out: StepContext) -> None:
        name = out.step.name
        self._began[name] = time.monotonic()
        self.board.start(name)
        handle = self.tracker.begin_step(
            name, join(out.build, "attempts", f"{out.attempt:04d}.json"), flatten(out.step.recipe["config"]),
            {**self.git, "fingerprint": out.step.fingerprint, "build": out.build.rsplit("/", 1)[1],
             "attempt": str(out.attempt), "path": out.path})
        self.tracker.ship(handle, out.metrics_path, out.build if out.step.trains else None)
        self._handles[name] = handle

    def progress(self, out: StepContext, done: float, total: float, unit: str, note: str) -> None:
        name = out.step.name
        self.board.update(name, done, total, unit, note)
        now = time.monotonic()
        if out.step.trains or (done < total and now - self._logged.get(name, 0.0) < PROGRESS_S):
            return  # a training step's workers log their own
        if done and now > (began := self._began[name]):
            self._logged[name] = now
            out.log(int(done), {"progress.share": done / total if total else 1.0,
                                f"progress.{unit.replace(' ', '_')}_per_s": done / (now - began)})

    def run_id(self, out: StepContext) -> str | None:
        return self.tracker.run_id(self._handles[out.step.name])

    def ended(self, out: StepContext, status: str, facts: dict, error: str | None) -> None:
        name = out.step.name
        took = time.monotonic() - self._began[name]
        self.board.end(name, status.upper(), took, error or headline(facts))
        ui = join(out.path, "ui")
        self.tracker.end_step(self._handles.pop(name), MLFLOW_STATUS[status], facts, ui if exists(ui) else None)

    def finished(self, name: str, artifact: Artifact) -> None:
        """Adds a step's artifact, just built or skipped, to the index. Called by the scheduler's thread alone."""
        run_id = artifact.record.get("run_id")
        if not next(r for r in self.rows if r.step.name == name).run:
            self.tracker.link_step(name, run_id)
        figures = {metric: artifact.facts.get(fact) for metric, (step, fact) in HEADLINES.items() if step == name}
        figures[f"{name}.loss"] = artifact.facts.get("val.loss")  # of every training step
        self.tracker.headline({metric: value for metric, value in figures.items() if value is not None})
        if name == "manifest":
            sources = [getattr(s, "root", None) or s.uri for s in self.cfg.corpus.sources]
            self.tracker.uses_dataset(self.cfg.corpus.name, artifact.facts.get("listing", ""), sources)
        self._index[name] = self._unwritten[name] = {"path": artifact.path, "build": artifact.build, "run_id": run_id}
        if name == "samples":
            self._sampled_from = artifact.record["inputs"]
        if all(r.run or not r.state.artifact or r.step.name in self._index for r in self.rows):  # skipped steps come first
            self._index_path = write_index(self.cfg, self._unwritten, [r.step.name for r in self.rows])
            self._unwritten = {}

    def close(self, status: str, seconds: float) -> None:
        """Ends the tracker's run; after success registers the system and prints where sound, report and UI are."""
        # Only a system whose sound exists becomes a registered model: the builds of the samples must be the current ones.
        system = {name: build for name, build in self._sampled_from.items() if name in GENERATION_STEPS}
        if status == "FINISHED" and system and all(self._index.get(n, {}).get("build") == b for n, b in system.items()):
            self.tracker.serves(self._index_path, {name: self._index[name]["path"] for name in system})
        self.tracker.finish(status, 5.0 if status == "KILLED" else 30.0)  # who stops a run waits for its end
        if status != "FINISHED":
            return
        named = steps_of(self._index_path)  # without those that this config's new builds have left behind
        steps = {name: entry["path"] for name, entry in self._index.items() if named.get(name) == entry["path"]}
        done = "all" if len(steps) == len(self.rows) else f"{len(steps)} of"
        self.say(f"{done} {len(self.rows)} steps done, in {duration(seconds)}")
        for label, step, path in (("sound", "samples", "wav"), ("report", "report", "ui/report.html")):
            if step in steps:
                self.say(f"{label + ':':8}{join(steps[step], path)}")
        self.say(f"{'index:':8}{self._index_path}")
        if url := self.tracker.url():
            self.say(f"{'UI:':8}{url}")


def headline(facts: dict) -> str:
    """A finished step's facts in one line: its `summary`, or its first four numbers and its `notes`."""
    if "summary" in facts:
        return facts["summary"]
    numbers = [(k, v) for k, v in facts.items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return "; ".join([", ".join(f"{k} {v:.4g}" for k, v in numbers[:4]), *facts.get("notes", ())])
