"""Results of many tasks are folded as they come, so that the driver's memory does not grow with them."""

from __future__ import annotations

import weakref

from audiolm.config.run import ClusterConfig
from audiolm.data.parallel import Workers, parallel_each


class Result:
    def __init__(self, k: int):
        self.k = k


def test_no_result_is_kept_and_progress_goes_on_from_what_was_done():
    alive, seen, taken, most = weakref.WeakSet(), [], [], []

    def task(k: int) -> Result:
        alive.add(result := Result(k))
        return result

    def take(i: int, result: Result) -> None:
        taken.append((i, result.k))
        most.append(len(alive))

    out = Workers(True, "step", lambda done, total, unit, note="": seen.append((done, total)))
    parallel_each(task, [(10 * k,) for k in range(30)], take, out=out, cluster=ClusterConfig(), unit="s", sizes=[2.0] * 30,
                  before=40.0)
    assert taken == [(k, 10 * k) for k in range(30)] and max(most) <= 2
    assert seen[0] == (40.0, 100.0) and seen[-1] == (100.0, 100.0)
