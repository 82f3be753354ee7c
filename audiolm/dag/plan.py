"""A thin DAG of steps whose outputs are addressed by recipe (DESIGN 1.1 to 1.4).

A step is a plain function `fn(config, inputs, out) -> facts`; its outputs live at `{store}/{step}/{fingerprint}/{build}/`.
The fingerprint hashes what is computed (step name, the author's `version`, the config's identity, the inputs'
fingerprints), never where or how.  A build is opened for given inputs' builds, or by force; a resumed attempt continues
it.  Facts on disk: recipe.json, BUILD/build.json, BUILD/attempts/NNNN.json, BUILD/done.json (exclusive, last).
Status is derived from these and stored nowhere else.  This module knows nothing of audio, torch, Ray or MLflow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from audiolm.config.base import flatten
from audiolm.dag.step import Status, Step, StepState, inspect, trunk_siblings
from audiolm.store import get_json, join, names


def toposort(targets: Iterable[Step]) -> list[Step]:
    order: dict[str, Step] = {}

    def visit(s: Step) -> None:
        if s.name in order:
            if order[s.name].fingerprint != s.fingerprint:
                raise ValueError(f"two different steps are named {s.name!r}")
            return
        for up in s.inputs:
            visit(up)
        order[s.name] = s

    for t in targets:
        visit(t)
    return list(order.values())


@dataclass(frozen=True, eq=False)
class PlanRow:
    """One step of a plan: will it run, and why; for training, the builds it may go on from, its own first."""

    step: Step
    view: StepState
    run: bool
    reason: str
    builds: tuple[str | None, ...] = ()


def plan(steps: list[Step], store: str, *, only: Iterable[str] = (), from_: Iterable[str] = (),
         force: Iterable[str] = ()) -> list[PlanRow]:
    """What would run, in order. Reads the store, writes nothing. Raises ValueError for unknown or unbuilt names."""
    known = [s.name for s in steps]
    for option, given in (("--only", only), ("--from", from_), ("--force", force)):
        if unknown := set(given) - set(known):
            raise ValueError(f"{option}: no step named {', '.join(sorted(unknown))}; the steps are {', '.join(known)}")
    chosen = set(only) | set(from_) or set(known)
    builds: dict[str, str | None] = {}
    rows, will_run = [], set()
    for s in steps:
        if from_ and any(u.name in chosen for u in s.inputs):
            chosen.add(s.name)
        inputs = {u.name: builds[u.name] for u in s.inputs}
        view = inspect(s, store, inputs)
        builds[s.name] = view.artifact.build if view.artifact else None
        above = [u.name for u in s.inputs if u.name in will_run]
        run = s.name in chosen and (s.name in force or bool(above) or view.status is not Status.DONE)
        if run and (missing := [u.name for u in s.inputs if builds[u.name] is None and u.name not in will_run]):
            raise ValueError(f"{s.name} needs {', '.join(missing)}, not built and not selected: "
                             f"add --only {','.join([*missing, s.name])} or run without --only/--from")
        will_run |= {s.name} if run else set()
        before = ()
        if run and s.trains and not above:
            again = view.build is None or (s.name in force and view.status is Status.DONE)
            own = None if again else join(s.root(store), f"{view.build:04d}")
            before = (own, *trunk_siblings(s, store, inputs, own, s.name in force)[1])
        rows.append(PlanRow(s, view, run, _reason(s, store, view, run, s.name in force, above), before))
    return rows


def _reason(step: Step, store: str, view: StepState, run: bool, forced: bool, above: list[str]) -> str:
    if not run:
        return view.note if view.status is Status.DONE else f"{view.status}, not selected"
    if forced:
        return "forced" if view.status is Status.DONE or view.build is None else f"forced, goes on with build {view.build:04d}"
    if view.status is Status.MISSING:
        return sibling_difference(step, store) or "never built"
    return view.note or (f"after {', '.join(above)}" if above else str(view.status))


def sibling_difference(step: Step, store: str) -> str:
    """How the recipe differs from the newest one of the same step, or '' where there is none."""
    newest, recipe = 0.0, None
    for name in names(join(store, step.name)):
        root = join(store, step.name, name)
        if name != step.fingerprint and (first := get_json(join(root, "0001", "build.json"))) and first["time"] > newest:
            newest, recipe = first["time"], get_json(join(root, "recipe.json"))
    if recipe is None:
        return ""
    old, new = flatten(recipe), flatten(step.recipe)
    parts = [f"{k.removeprefix('config.')}: {old.get(k, 'absent')} -> {new.get(k, 'absent')}"
             for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and not k.startswith("inputs.")]
    ups = [k.removeprefix("inputs.") for k in new if k.startswith("inputs.") and old.get(k) != new[k]]
    return "; ".join(parts[:4] + ([f"{len(parts) - 4} more"] if len(parts) > 4 else [])) or f"other {', '.join(ups)}"
