"""A Ray job that trains TinyLM on two workers; the second one is killed by SIGKILL in the middle, once at each STEP.

    python tests/worlds/dying_worker.py STORE STEP ...
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a submitted job runs the code that was submitted

from audiolm.config.run import ClusterConfig  # noqa: E402
from audiolm.config.training import TrainConfig  # noqa: E402
from audiolm.dag.execute import execute  # noqa: E402
from audiolm.dag.plan import plan  # noqa: E402
from audiolm.dag.step import Step  # noqa: E402
from audiolm.train.commits import steps_kept  # noqa: E402
from audiolm.train.loop import train  # noqa: E402
from tests.worlds.training import TinyLM  # noqa: E402

SETTINGS = TrainConfig(steps=12, batch=8, lr=3e-3, warmup_steps=2, decay_steps=4, eval_every=5, save_every=3, log_every=1)


class Mortal(TinyLM):
    def train_step(self, engines, batches, step):
        died = Path(f"{self.died}-{step}")
        if step in self.deaths and self.ctx.rank == 1 and not died.exists():
            died.touch()
            last = f"tiny/*/0001/commits/{step // SETTINGS.save_every * SETTINGS.save_every:08d}.json"
            while not list(died.parent.glob(last)):  # a thread writes the checkpoint
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train_step(engines, batches, step)


def mortal(config, inputs, ctx):
    objective = Mortal(config, inputs, ctx)
    objective.died, objective.deaths = config["died"], config["deaths"]
    return objective


def graph(died: str, deaths: tuple[int, ...]) -> list[Step]:
    def fn(config, inputs, out):
        own, cluster = {"died": died, "deaths": deaths, "seed": 0}, ClusterConfig(threads=1, device="cpu", train_workers=2)
        return train(mortal, own, SETTINGS, inputs, out, cluster=cluster)

    return [Step("tiny", fn, {"train": SETTINGS}, trains=SETTINGS)]


if __name__ == "__main__":
    import ray

    from audiolm.pipeline.ray_cluster import worker_died

    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"  # else it looks every 2 s whether a training has ended
    ray.init()
    rows = plan(graph(sys.argv[1] + "/died", tuple(map(int, sys.argv[2:]))), sys.argv[1])
    execute(rows, sys.argv[1], retries=1, may_retry=worker_died, kept=steps_kept)
