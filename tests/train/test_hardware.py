"""micro_batch: auto, as far as a machine without a GPU can tell."""

from __future__ import annotations

import pytest
import torch

from audiolm.train.engine import make_engine
from audiolm.train.hardware import largest, micro_batch
from audiolm.train.objectives.base import Context
from tests.worlds.training import TinyLM, settings

CPU = Context(0, 1, torch.device("cpu"), seed=1)


class Small(TinyLM):
    """An LM on a device that holds so many rows."""

    def train_step(self, engines, batches, step):
        result = super().train_step(engines, batches, step)  # by then gradients are there
        if max(len(b) for b in batches) > self.holds:
            raise torch.OutOfMemoryError("out of memory")
        return result


def small(holds):
    objective = Small({}, {}, CPU)
    objective.holds = holds
    return objective


@pytest.mark.parametrize(("holds", "rows"), [(100, 8), (8, 8), (7, 4), (2, 2), (1, 1)])
def test_rows_are_halved_until_they_fit_and_nothing_else_changes(holds, rows):
    objective, fresh = small(holds), small(holds)
    assert largest(settings(), objective, CPU, 8) == rows
    for a, b in zip(objective.modules["model"].parameters(), fresh.modules["model"].parameters(), strict=True):
        assert torch.equal(a, b) and a.grad is None
    step = []
    for each in (objective, fresh):
        each.holds = 100
        engine = make_engine(each.modules["model"], settings(), CPU)
        torch.manual_seed(0)
        step.append(each.train_step({"model": engine}, [each.load(0, range(8))], 0)["loss"])
    assert step[0] == step[1]


def test_one_row_too_many_names_what_to_change():
    with pytest.raises(torch.OutOfMemoryError, match="one row does not fit.*crop_s"):
        largest(settings(), small(0), CPU, 8)


def test_without_a_gpu_auto_is_the_share():
    two = Context(1, 2, torch.device("cpu"), seed=1)
    assert [micro_batch(settings(micro_batch=m), small(1), two) for m in ("auto", None, 3, 64)] == [4, 4, 3, 4]
