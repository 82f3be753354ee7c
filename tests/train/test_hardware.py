"""micro_batch: auto, as far as a machine without a GPU can tell: a model that really trains, with given figures of memory."""

from __future__ import annotations

import os

import pytest
import torch
import torch.multiprocessing as mp
from torch._dynamo.exc import BackendCompilerFailed

from audiolm.metrics_log import MetricsFile
from audiolm.models.compiled import FOLDER
from audiolm.train.engine import make_engine
from audiolm.train.hardware import largest, micro_batch, out_of_memory
from audiolm.train.objectives.base import Context
from audiolm.train.rank import TrainJob, Worker
from tests.worlds.basics import free_port
from tests.worlds.training import TinyLM, settings, tiny_lm

CPU = Context(0, 1, torch.device("cpu"), seed=1)
FIXED, ROW = 1000, 100  # bytes of the planted figures: weights, and each row


class Small(TinyLM):
    """An LM on a device that holds so many rows; `tries` are the rows of each."""

    def train_step(self, engines, batches, step):
        result = super().train_step(engines, batches, step)  # by then gradients are there
        self.tries.append(max(map(len, batches)))
        if self.tries[-1] > self.holds:
            raise self.error
        return result

    def peak(self, device, work):
        """Takes the place of hardware.peak_bytes: linear in the rows, plus a step where there is one."""
        work()
        return FIXED + ROW * self.tries[-1] + self.steps.get(self.tries[-1], 0)


def small(holds, ctx=CPU, steps=(), error=None):
    objective = Small({}, {}, ctx)
    objective.holds, objective.tries, objective.steps = holds, [], dict(steps)
    objective.error = error or torch.OutOfMemoryError("CUDA out of memory")
    return objective


def found(objective, share=8, rows=100, ctx=CPU):
    """The rows that are chosen where the line meets the room at so many."""
    return largest(settings(batch=share * ctx.world), objective, ctx, share, FIXED + ROW * rows, objective.peak)


@pytest.mark.parametrize(("share", "rows", "tries"), [
    (8, 100, [1, 2, 8]), (8, 8, [1, 2, 8]), (8, 7, [1, 2, 4]), (12, 7, [1, 2, 6]), (30, 11, [1, 2, 10]), (7, 3, [1, 2, 3]),
    (8, 1, [1, 2, 1]), (2, 100, [2]), (1, 100, [1])])
def test_the_line_through_one_and_two_rows_chooses_an_even_part_that_is_tried_once(share, rows, tries):
    objective = small(100)
    assert found(objective, share, rows) == tries[-1]
    assert objective.tries == tries


@pytest.mark.parametrize(("holds", "tries"), [(7, [1, 2, 8, 4]), (2, [1, 2, 8, 4, 2]), (1, [1, 2, 2, 1])])
def test_a_choice_that_fails_is_halved(holds, tries):
    """Memory that grows in a step beyond what was measured, or already at two rows."""
    objective = small(holds)
    assert found(objective) == tries[-1]
    assert objective.tries == tries


@pytest.mark.parametrize(("step", "tries"), [(2, [1, 2, 1]), (1, [1, 2, 8, 4]), (8, [1, 2, 8, 4])])
def test_a_step_costs_rows_or_a_try_but_no_training(step, tries):
    """Memory that jumps at two rows, at one (so that two take less), and at the choice."""
    objective = small(100, steps={step: 650}.items())
    assert found(objective, rows=8 if step == 8 else 7) == tries[-1]
    assert objective.tries == tries


def test_nothing_is_left_of_a_try():
    objective, fresh = small(3), small(3)
    assert found(objective) == 2
    for a, b in zip(objective.modules["model"].parameters(), fresh.modules["model"].parameters(), strict=True):
        assert torch.equal(a, b) and a.grad is None
    step = []
    for each in (objective, fresh):
        each.holds = 100
        engine = make_engine(each.modules["model"], settings(), CPU)
        torch.manual_seed(0)
        step.append(each.train_step({"model": engine}, [each.load(0, range(8))], 0)["loss"])
    assert step[0] == step[1]


def test_only_the_choice_is_compiled():
    ctx, compiled = Context(0, 1, torch.device("cpu"), seed=1, compile=True), []
    objective = small(100, ctx)

    def backend(graph, inputs):
        compiled.append(next(x.shape[0] for x in inputs if x.dtype == torch.int64))
        return graph

    objective.modules["model"].compile(backend=backend, dynamic=False)
    assert found(objective, rows=4, ctx=ctx) == 4
    assert objective.tries == [1, 2, 4] and set(compiled) == {4}


def wrapped():
    def run_out(graph, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    try:
        torch.compile(lambda x: x + 1, backend=run_out)(torch.ones(1))
    except BackendCompilerFailed as e:
        return e


def chained():
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except RuntimeError as e:
            raise RuntimeError("autotuning failed") from e
    except RuntimeError as e:
        return e


@pytest.mark.parametrize("error", [
    wrapped, chained, "CUDA driver error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"])
def test_memory_that_runs_out_has_many_names(error):
    assert found(small(3, error=RuntimeError(error) if isinstance(error, str) else error())) == 2


def test_other_errors_are_raised():
    assert not out_of_memory(RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448"))
    with pytest.raises(RuntimeError, match="device-side assert"):
        found(small(3, error=RuntimeError("CUDA error: device-side assert triggered")))


def test_one_row_too_many_names_what_to_change():
    with pytest.raises(torch.OutOfMemoryError, match="one row does not fit.*crop_s"):
        found(small(0))


def _rank(rank, port, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    ctx = Context(rank, 2, torch.device("cpu"), seed=1)
    measured, held = small(100, ctx), small((100, 3)[rank], ctx)
    results.put([found(measured, rows=(100, 4)[rank], ctx=ctx), found(held, ctx=ctx)])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_all_ranks_take_what_the_fullest_gpu_holds():
    """One rank has room for fewer rows, or runs out of memory where the other does not."""
    context, port = mp.get_context("spawn"), free_port()
    results = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(r, port, results)) for r in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert [results.get() for _ in ranks] == [[4, 2], [4, 2]]


def test_without_a_gpu_auto_is_the_share():
    two = Context(1, 2, torch.device("cpu"), seed=1)
    assert [micro_batch(settings(micro_batch=m), small(1), two) for m in ("auto", None, 3, 64)] == [4, 4, 3, 4]


@pytest.mark.parametrize("compiles", [True, False])
def test_a_worker_that_compiles_keeps_what_it_compiled(compiles, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(FOLDER, "")
    monkeypatch.delenv(FOLDER)  # both, so that it is gone again afterwards
    job = TrainJob(tiny_lm, {}, settings(), {}, str(tmp_path / "build"), 1, "", "", 1, "cpu", 1, 1, compiles)
    Worker(job, 0, 1, MetricsFile(str(tmp_path / "metrics.jsonl")), None)
    assert os.environ.get(FOLDER) == (str(tmp_path / "audiolm/inductor") if compiles else None)
