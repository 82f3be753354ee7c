"""--gc: lists, and with --yes removes, outputs of a store that nothing refers to any more.

Kept is what a named run (STORE/runs/NAME.json) names, its unfinished steps, what its config starts from, what a registered
version or a note for MLflow names, what this command's config would skip or continue, whatever was written or used in the last
days, and of all these what they were made of and the trunks that they share (dag/stored_builds.py).
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

from audiolm.config.pipeline import Pipeline
from audiolm.dag.plan import PlanRow
from audiolm.dag.step import Step
from audiolm.dag.stored_builds import Key, StoredBuild, references, remove_build, stored_builds, with_relatives
from audiolm.pipeline.progress import short
from audiolm.store import QUIET_S, at_once, get_json, hide_credentials, join, modified, names, put, remove
from audiolm.tracking.registered import registered
from audiolm.train.commits import path_of

DAY_S = 24 * 3600.0


class Part(NamedTuple):
    """A part of a kept build that is of no use: a folder of outputs or a checkpoint."""

    build: StoredBuild
    name: str
    why: str


def collect(cfg: Pipeline, rows: list[PlanRow], graph: Callable[[Pipeline], list[Step]], days: float, yes: bool,
            say: Callable[[str], None] = print) -> int:
    """Lists the garbage of the config's store and, with `yes`, removes it; the exit status. `rows`: the config's plan."""
    before = _clock(cfg.store) - max(days * DAY_S, QUIET_S)  # below QUIET_S a writer that is silent may be alive
    builds = stored_builds(cfg.store)
    roots, attempts, remarks = _roots(cfg, rows, graph, builds, before)
    kept = with_relatives(roots, builds)
    garbage = [b for key, b in builds.items() if key not in kept]
    # A step that has begun reads the outputs that were published then.
    read = {(step, *made.split(".")) for key in kept if not builds[key].done
            for step, made in builds[key].record.get("inputs", {}).items()}
    parts = [p for key in kept if key not in read for p in _useless(builds[key], attempts, before)]
    removed = 0
    for b in garbage:
        state = "finished" if b.done else b.attempt.get("state", "not begun")
        fate = _removed(yes, lambda b=b: remove_build(b, before))
        removed += fate != "in use now"
        say(_line(fate, b.id, b.size, b.written, state))
    for b, name, why in parts:
        fate = _removed(yes, lambda b=b, name=name: remove(join(b.folder, name)) or True)
        removed += 1
        say(_line(fate, f"{b.id}/{name}", *b.parts[name], why))
    for text in remarks:
        say(text)
    size = sum(b.size for b in garbage) + sum(b.parts[name][0] for b, name, _ in parts)
    say(f"{len(garbage) + len(parts)} outputs, {short(size)}B, that nothing refers to and no run used for {days:g} days; "
        f"{len(kept)} builds are kept, {short(sum(builds[k].size for k in kept))}B" + _by_versions(kept, builds))
    if removed and not yes:
        say("nothing is removed yet: the same command with --yes removes them")
    return 0


def _clock(store: str) -> float:
    """The time by the store's own clock."""
    probe = join(store, ".probe", uuid.uuid4().hex)
    try:
        put(probe, b"1")
        return modified(probe)
    finally:
        remove(probe)


def _roots(cfg: Pipeline, rows: list[PlanRow], graph: Callable[[Pipeline], list[Step]], builds: dict[Key, StoredBuild],
           before: float) -> tuple[dict[Key, str], set[tuple[Key, str]], list[str]]:
    """({build: why it is kept}, attempts that are named, remarks). The first reason counts."""
    roots: dict[Key, str] = {}
    attempts: set[tuple[Key, str]] = set()
    runs = {name.removesuffix(".json"): get_json(join(cfg.store, "runs", name))
            for name in names(join(cfg.store, "runs")) if name.endswith(".json")}
    planned, remarks = _planned(runs, cfg, graph)
    for reason, text in _texts(cfg, rows, runs):
        for key, attempt in references(text):
            roots.setdefault(key, reason)
            attempts |= {(key, attempt)} if attempt else set()
    own = {(r.step.name, r.step.fingerprint) for r in rows}
    for key, b in builds.items():
        if b.written >= before or b.at_work:
            roots.setdefault(key, "in use")
        elif b.done is None and b.record and (planned is None or key[:2] in planned | own):
            roots.setdefault(key, "to be continued")
    return roots, attempts, remarks


def _texts(cfg: Pipeline, rows: list[PlanRow], runs: dict[str, dict | None]) -> Iterator[tuple[str, str]]:
    """(reason, text) of all that names builds by their paths."""
    for row in rows:
        yield "this config", json.dumps([row.state.artifact.path if row.state.artifact else "", *filter(None, row.builds)])
    yield "this config", cfg.model_dump_json()
    for run, index in runs.items():
        folder = join(cfg.store, "runs", run)
        entries = at_once(get_json, (join(folder, name) for name in names(folder)))
        yield f"run {run}", json.dumps([index, entries])
    for run in names(join(cfg.store, ".tracking")):
        folder = join(cfg.store, ".tracking", run)
        yield "a note for MLflow", json.dumps(at_once(get_json, (join(folder, name) for name in names(folder))))
    servers = {(index or {}).get("config", {}).get("tracking", "none") for index in runs.values()} | {cfg.tracking}
    # An index has its credentials masked: this config's own server is asked by the URI that has them.
    servers = {cfg.tracking if server == hide_credentials(cfg.tracking) else server for server in servers}
    for server in sorted(servers):
        yield from registered(server, cfg.store)


def _planned(runs: dict[str, dict | None], cfg: Pipeline, graph: Callable[[Pipeline], list[Step]]
             ) -> tuple[set[tuple[str, str]] | None, list[str]]:
    """((step, fingerprint) of the steps of the named runs, remarks); None where the config of one cannot be planned."""
    found, remarks = set(), []
    for run, index in runs.items():
        try:
            steps = graph(Pipeline.model_validate({**(index or {})["config"], "store": cfg.store}))
            found |= {(s.name, s.fingerprint) for s in steps}
        except (KeyError, ValueError) as e:
            first = str(e).strip().split("\n")[0]
            remarks.append(f"run {run} cannot be planned ({first}): every unfinished build is kept, as it may be that run's")
    return None if remarks else found, remarks


def _useless(build: StoredBuild, attempts: set[tuple[Key, str]], before: float) -> Iterator[Part]:
    """Parts of a finished build that no one reads: outputs of other attempts than the published one, and checkpoints of dead
    attempts."""
    if not build.done or build.done.get("time", 0) >= before:
        return
    folders = [name for name in build.parts if name.startswith("checkpoints/")]
    commits = at_once(get_json, (path_of(build.folder, int(name[12:20])) for name in folders))
    committed = {c["folder"] for c in commits if c and not c.get("pruned")}
    for name, (_, written) in build.parts.items():
        if written >= before:
            continue
        if name in folders and name[12:] not in committed:
            yield Part(build, name, "no commit names it")
        if name.isdigit() and int(name) != build.done["attempt"] and (build.key, name) not in attempts:
            yield Part(build, name, f"replaced by attempt {build.done['attempt']}")


def _removed(yes: bool, call: Callable[[], bool]) -> str:
    return "would remove" if not yes else "removed" if call() else "in use now"


def _line(fate: str, name: str, size: int, written: float, note: str) -> str:
    return f"{fate:12}  {short(size):>6}B  {time.strftime('%Y-%m-%d', time.gmtime(written))}  {name}  {note}"


def _by_versions(kept: dict[Key, str], builds: dict[Key, StoredBuild]) -> str:
    alone = [k for k, reason in kept.items() if reason.startswith("models:/")]
    return (f", {short(sum(builds[k].size for k in alone))}B of them for registered versions alone: delete those in MLflow to "
            "free it") if alone else ""
