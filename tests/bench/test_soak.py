"""The parts of the soak and of the scaling bench that cost no minutes: the comparison, the table, stand-ins for Ray."""

from __future__ import annotations

import sys

from tests.bench import scaling
from tests.bench.soak.outcome import differences
from tests.bench.soak.run import table


def test_what_is_lost_and_what_is_doubled_is_told_apart():
    calm = {("file", "a", "x"): [1, "d"], ("row", "a", 1, "loss"): 0.5, ("builds", "a"): 1}
    assert differences(dict(calm), calm) == ([], [])
    ours = {("file", "a", "x"): [1, "e"], ("file", "a", "y"): [1, "d"], ("builds", "a"): 2}
    assert differences(ours, calm) == ([("file", "a", "x"), ("row", "a", 1, "loss")], [("file", "a", "y"), ("builds", "a")])
    records = [{"round": 1, "fault": "disk full", "continue_s": s} for s in (1.0, 3.0, 9.0)]
    records.append({"round": 1, "end": "done", "lost": 2, "doubled": 1})
    assert "| disk full | 3 | 1 | 2 | 1 | 3 s (9 s) |" in table(records)


def test_stand_ins_take_what_the_scheduler_gives_to_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", scaling.stand_in(4))
    assert list(scaling.parallel_map(divmod, [(n, 3) for n in range(9)], out=scaling.WORKERS, cluster=scaling.ClusterConfig(),
                                     unit="tasks")) == [divmod(n, 3) for n in range(9)]
