"""A Ray job that trains TinyLM; its worker is killed by SIGKILL, once, in the middle.

    python tests/worlds/dying_worker.py STORE
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a submitted job runs the code that was submitted

from audiolm.config.run import ClusterConfig  # noqa: E402
from audiolm.config.training import TrainConfig  # noqa: E402
from audiolm.dag.execute import execute  # noqa: E402
from audiolm.dag.plan import plan  # noqa: E402
from audiolm.dag.step import Step  # noqa: E402
from audiolm.train.loop import train  # noqa: E402
from tests.worlds.tiny import TinyLM  # noqa: E402

SETTINGS = TrainConfig(steps=12, batch=8, lr=3e-3, warmup_steps=2, decay_steps=4, eval_every=5, save_every=3, log_every=1)


class Mortal(TinyLM):
    def train_step(self, engines, batches, step):
        if step == 8 and self.died and not Path(self.died).exists():
            Path(self.died).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train_step(engines, batches, step)


def mortal(config, inputs, ctx):
    objective = Mortal(config, inputs, ctx)
    objective.died = config["died"]
    return objective


def graph(died: str | None) -> list[Step]:
    def fn(config, inputs, out):
        return train(mortal, {"died": died, "seed": 0}, SETTINGS, inputs, out, cluster=ClusterConfig(threads=1, device="cpu"))

    return [Step("tiny", fn, {"train": SETTINGS}, trains=SETTINGS)]


if __name__ == "__main__":
    import ray

    from audiolm.pipeline.ray_cluster import worker_died

    ray.init()
    rows = plan(graph(sys.argv[1] + "/died"), sys.argv[1])
    execute(rows, sys.argv[1], retries=2, may_retry=worker_died)
