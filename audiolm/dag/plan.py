"""The plan of a run: which steps would run, in which order, and why (dag/step.py says what a step is)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from audiolm.config.base import flatten
from audiolm.dag.step import Status, Step, StepState, inspect, trunk_siblings
from audiolm.store import at_once, get_json, join, names


def toposort(targets: Iterable[Step]) -> list[Step]:
    """The targets and all steps above them, inputs first. Raises ValueError for two steps of one name."""
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
    """A step of a plan; for a training step `builds` are the folders it may continue, its own (or None) first."""

    step: Step
    state: StepState
    run: bool
    reason: str
    builds: tuple[str | None, ...] = ()


def plan(steps: list[Step], store: str, *, only: Iterable[str] = (), from_: Iterable[str] = (),
         force: Iterable[str] = ()) -> list[PlanRow]:
    """The rows of a plan, in order. Reads the store, writes nothing.

    Raises ValueError for unknown and unbuilt names, and for a step whose inputs would be of different builds of one step.
    """
    known = [s.name for s in steps]
    for option, given in (("--only", only), ("--from", from_), ("--force", force)):
        if unknown := set(given) - set(known):
            raise ValueError(f"{option}: no step named {', '.join(sorted(unknown))}; the steps are {', '.join(known)}")
    chosen = set(only) | set(from_) or set(known)
    builds: dict[str, str | None] = {}
    rows, will_run, renewed, outdated = [], set(), set(), {}  # outdated: {step that stays as it is: why it no longer fits}
    for s in steps:
        if from_ and any(u.name in chosen for u in s.inputs):  # --from takes what follows
            chosen.add(s.name)
        inputs = {u.name: builds[u.name] for u in s.inputs}
        state = inspect(s, store, inputs)

        # A step runs when it is not done, when it is forced, or when an input is about to get a newer build.
        rebuilt = [u.name for u in s.inputs if u.name in renewed]
        run = s.name in chosen and (s.name in force or bool(rebuilt) or state.status is not Status.DONE)
        if run and (missing := [u.name for u in s.inputs if builds[u.name] is None and u.name not in will_run]):
            raise ValueError(f"{s.name} needs {', '.join(missing)}, not built and not selected: "
                             f"add --only {','.join([*missing, s.name])} or run without --only/--from")
        if run:
            _check_inputs(s, outdated, chosen)
        elif why := _outdated(s, state, builds, renewed, outdated):
            outdated[s.name] = why
        opens_build = run and (state.build is None or bool(rebuilt) or (s.name in force and state.status is Status.DONE))
        will_run |= {s.name} if run else set()
        renewed |= {s.name} if opens_build else set()
        # A build that is gone on with keeps its id: what was made of it before a repair stays done.
        builds[s.name] = (f"{s.fingerprint}.{state.build:04d}" if run and not opens_build
                          else state.artifact.build if state.artifact else None)

        # With new inputs a training starts from nothing; else it may continue its own build or a sibling's.
        candidates = ()
        if run and s.trains and not rebuilt:
            own = None if opens_build else join(s.root(store), f"{state.build:04d}")
            candidates = (own, *trunk_siblings(s, store, inputs, own, s.name in force)[1])
        rows.append(PlanRow(s, state, run, _reason(s, store, state, run, s.name in force, rebuilt), candidates))
    return rows


def _outdated(step: Step, state: StepState, builds: dict[str, str | None], renewed: set[str],
              outdated: dict[str, str]) -> str:
    """Why a step that stays as it is no longer fits the steps above it; '' where it does, or is not built."""
    if state.artifact is None:
        return ""
    for u in step.inputs:
        made = state.artifact.record["inputs"].get(u.name)
        if u.name in renewed or made != builds[u.name]:
            now = "a new build" if u.name in renewed else builds[u.name]
            return f"{step.name} {state.artifact.build} was made of {u.name} {made}, and {now} takes its place"
    return next((outdated[u.name] for u in step.inputs if u.name in outdated), "")


def _check_inputs(step: Step, outdated: dict[str, str], chosen: Iterable[str]) -> None:
    """Raises ValueError where a step would run on inputs of which one was made of an older build of another."""
    if wrong := [u.name for u in step.inputs if u.name in outdated]:
        names = [s.name for s in toposort([step]) if s.name in outdated or s.name in chosen]
        raise ValueError(f"{step.name} would be made of builds that do not belong together: {outdated[wrong[0]]}. Add "
                         f"--only {','.join(names)} or run without --only/--from")


def _reason(step: Step, store: str, state: StepState, run: bool, forced: bool, rebuilt: list[str]) -> str:
    if not run:
        return state.note if state.status is Status.DONE else f"{state.status}, not selected"
    if forced:
        opens_build = state.status is Status.DONE or state.build is None
        return "forced" if opens_build else f"forced, goes on with build {state.build:04d}"
    if state.status is Status.MISSING:
        return sibling_difference(step, store) or "never built"
    return state.note or (f"after {', '.join(rebuilt)}" if rebuilt else str(state.status))


def sibling_difference(step: Step, store: str) -> str:
    """The fields in which the recipe differs from the newest other one of the same step; '' where there is none."""
    roots = [join(store, step.name, name) for name in names(join(store, step.name)) if name != step.fingerprint]
    records = at_once(get_json, (join(root, "0001", "build.json") for root in roots))
    times = [record["time"] if record else 0.0 for record in records]
    newest = max(range(len(roots)), key=times.__getitem__, default=None)
    recipe = get_json(join(roots[newest], "recipe.json")) if newest is not None and times[newest] else None
    if recipe is None:
        return ""
    old, new = flatten(recipe), flatten(step.recipe)
    parts = [f"{k.removeprefix('config.')}: {old.get(k, 'absent')} -> {new.get(k, 'absent')}"
             for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and not k.startswith("inputs.")]
    ups = [k.removeprefix("inputs.") for k in new if k.startswith("inputs.") and old.get(k) != new[k]]
    return "; ".join(parts[:4] + ([f"{len(parts) - 4} more"] if len(parts) > 4 else [])) or f"other {', '.join(ups)}"
