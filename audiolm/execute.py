"""Runs a plan: every step as soon as its inputs exist, each coordinated by a thread of this process (DESIGN 1.4).

Independent branches overlap; at most `slots` training steps run at once, the others wait without a lease.  The first
error stops new launches and is raised after the running steps have ended.  `inline` runs all in this thread.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable

from audiolm.dag import Artifact, Observer, Row, run_step


class StepFailed(RuntimeError):
    """A step ended with an error; the text names it."""


def execute(rows: list[Row], store: str, *, force: Iterable[str] = (), inline: bool = False, slots: int = 1,
            observer: Observer | None = None, retries: int = 0, may_retry: Callable[[BaseException], bool] = lambda e: False,
            finished: Callable[[str, Artifact], None] = lambda name, artifact: None) -> dict[str, Artifact]:
    """Returns every step's artifact (skipped ones too). Raises StepFailed, from the first error."""
    built = {r.step.name: r.view.artifact for r in rows if not r.run and r.view.artifact}
    for name, artifact in built.items():
        finished(name, artifact)
    todo, running, results, stopping = [r for r in rows if r.run], set(), queue.Queue(), threading.Event()
    errors: list[tuple[str, BaseException]] = []

    def work(row: Row, inputs: dict[str, Artifact]) -> None:
        for left in range(retries, -1, -1):
            try:
                results.put((row, run_step(row.step, store, inputs, force=row.step.name in force, inline=inline,
                                           observer=observer, stop=stopping.is_set)))
                return
            except BaseException as e:  # noqa: BLE001  reported once, by execute
                if inline and isinstance(e, KeyboardInterrupt):
                    raise
                if left == 0 or not may_retry(e) or stopping.is_set():
                    results.put((row, e))
                    return

    def launch() -> None:
        for row in list(todo):
            inputs = {u.name: built[u.name] for u in row.step.inputs if u.name in built}
            busy = sum(bool(r.step.trains) for r in running) >= slots
            if len(inputs) < len(row.step.inputs) or (row.step.trains and busy) or (inline and running):
                continue
            todo.remove(row)
            running.add(row)
            if inline:
                work(row, inputs)
            else:
                threading.Thread(target=work, args=(row, inputs), name=row.step.name, daemon=True).start()

    try:
        launch()
        while running:
            row, result = results.get()
            running.discard(row)
            if isinstance(result, BaseException):
                errors.append((row.step.name, result))
                stopping.set()
            else:
                built[row.step.name] = result
                finished(row.step.name, result)
            if not errors:
                launch()
    except KeyboardInterrupt:
        stopping.set()
        raise
    if errors:
        name, error = errors[0]
        raise StepFailed(f"step {name} failed: {type(error).__name__}: {error}") from error
    return built
