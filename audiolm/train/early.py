"""When a training ends before its `steps`: `patience` validations in a row that were no better than the best so far.

The answer follows from the steps alone, which every checkpoint's record holds and all ranks know alike: it needs no state
of its own, and a resumed run stops where an uninterrupted one does.
"""

from __future__ import annotations

from audiolm.config import Train


def stops(train: Train, done: int, best_step: int | None) -> bool:
    """True when the training ends after `done` steps, the best validation so far being that of `best_step`."""
    return train.patience is not None and best_step is not None and done - best_step >= train.patience * train.eval_every


def facts(train: Train, done: int, best_step: int | None) -> dict:
    """What final.json says of a training that ended before its steps; nothing of one that did not."""
    if done == train.steps:
        return {}
    return {"stopped_at": done, "notes": [f"stopped at step {done} of {train.steps}: {train.patience} validations were no "
                                          f"better than step {best_step}'s"]}
