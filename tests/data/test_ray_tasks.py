"""Tasks on a real Ray: they die, are killed for memory, and fill nodes that join; GPUs that are not there are said at once.

A training of one worker is a task too.
"""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from audiolm.config.base import ConfigError
from audiolm.config.run import ClusterConfig
from audiolm.dag import execute as dag
from audiolm.dag.plan import plan
from audiolm.dag.step import Step
from audiolm.data import parallel
from audiolm.data.parallel import TaskDied, Workers, cluster_device, parallel_map
from audiolm.pipeline.private_ray import read_settings
from audiolm.pipeline.ray_cluster import worker_died
from audiolm.train.loop import train
from tests.worlds.servers import CLOSED
from tests.worlds.training import TinyLM, build, settings, training_step

NODE = {"object_store_memory": 100 << 20}


@pytest.fixture(scope="module")
def cluster():
    """A head without CPUs and a node with one."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for key, value in CLOSED.items():
            patch.setenv(key, value)
        patch.setattr(parallel, "BACKOFF_S", 0.01)
        patch.setattr(parallel, "DEATHS", 2)  # each costs seconds: a worker process starts anew
        read_settings()
        before = signal.getsignal(signal.SIGTERM)
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **NODE})
        try:
            found.one = found.add_node(num_cpus=1, **NODE)
            ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
            yield found
        finally:
            ray.shutdown()
            found.shutdown()
            signal.signal(signal.SIGTERM, before)


@pytest.fixture
def workers():
    notes = []
    return Workers(False, "step", lambda done, total, unit, note="": notes.append(note)), notes


def die(log, times: int, k: int) -> int:
    """Task 0 is killed so many times."""
    if k == 0:
        with open(log, "a") as f:
            f.write("x")
        if os.path.getsize(log) <= times:
            os.kill(os.getpid(), signal.SIGKILL)
    return k


def test_a_task_may_die_often_while_others_end_and_only_so_often_where_none_does(cluster, workers, tmp_path):
    out, notes = workers
    log = tmp_path / "log"
    times = parallel.DEATHS + 1
    found = parallel_map(die, [(log, times, k) for k in range(20)], out=out, cluster=ClusterConfig(), unit="x")
    assert found == list(range(20))
    assert log.stat().st_size == times + 1 and any("task step 0 died: " in note for note in notes)
    log.unlink()
    with pytest.raises(TaskDied, match="task step 0 died: .*; 2 times, and no task ended in between"):
        parallel_map(die, [(log, times, 0)], out=out, cluster=ClusterConfig(), unit="x")
    assert log.stat().st_size == parallel.DEATHS


def meet(folder, k: int, n: int) -> bool:
    """True once n tasks run at the same time."""
    Path(folder, f"{k}").touch()
    deadline = time.monotonic() + 120
    while len(os.listdir(folder)) < n:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_node_that_joins_is_filled(cluster, workers, tmp_path):
    with ThreadPoolExecutor(1) as pool:  # Ray adds nodes in the main thread alone
        met = pool.submit(parallel_map, meet, [(tmp_path, k, 3) for k in range(3)], out=workers[0], cluster=ClusterConfig(),
                          unit="x")
        while not os.listdir(tmp_path):
            time.sleep(0.05)
        node = cluster.add_node(num_cpus=2, **NODE)
        try:
            assert all(met.result())
        finally:
            cluster.remove_node(node)


def killed_once(config, inputs, ctx):
    if not os.path.exists(config["died"]):
        Path(config["died"]).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return TinyLM(config, inputs, ctx)


@pytest.mark.parametrize("fail_at", [None, 3])
def test_one_training_worker_is_launched_again_after_its_death_and_not_after_its_error(cluster, tmp_path, fail_at, monkeypatch):
    def fn(config, inputs, out):
        own = {"seed": 0, "died": str(tmp_path / "died"), "fail_at": fail_at}
        return train(killed_once, own, settings(), inputs, out, cluster=ClusterConfig(threads=1, device="cpu"))

    monkeypatch.setattr(dag, "BACKOFF_S", 0.01)
    store, step = str(tmp_path / "store"), Step("tiny", fn, {"train": settings()}, trains=settings())
    run = partial(dag.execute, plan([step], store), store, retries=1, may_retry=worker_died)
    if fail_at is None:
        made = run()["tiny"]
        assert made.record["attempt"] == 2 and made.facts == build(training_step(), str(tmp_path / "inline")).facts
    else:
        (tmp_path / "died").touch()
        with pytest.raises(dag.StepFailed, match="step tiny failed: ValueError: planted at step 3"):
            run()
        assert len(os.listdir(Path(step.root(store), "0001", "attempts"))) == 1


@pytest.mark.parametrize("inline", [True, False])
def test_a_gpu_that_is_not_there_is_said_at_once(cluster, inline, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    has = "this machine has no GPU" if inline else r"the cluster has 0 GPUs and \d CPUs"
    with pytest.raises(ConfigError, match=f"cluster.device is cuda.* {has}.*: set it to auto or cpu"):
        cluster_device(ClusterConfig(device="cuda"), inline)
    assert cluster_device(ClusterConfig(), inline) == "cpu"


def test_under_kuberays_autoscaler_gpus_may_come_later(cluster, monkeypatch):
    monkeypatch.setenv("RAY_enable_autoscaler_v2", "true")  # as KubeRay does in the head pod, where the driver runs
    assert cluster_device(ClusterConfig(device="cuda"), False, 16) == "cuda"
    assert cluster_device(ClusterConfig(), False) == "cpu"


def test_tasks_that_are_killed_for_memory_end_the_step_with_their_name_and_the_memory(cluster, workers):
    cluster.remove_node(cluster.one)
    cluster.add_node(num_cpus=1, **NODE, env_vars={"RAY_memory_usage_threshold": "0.001",
                                                   "RAY_memory_monitor_refresh_ms": "100"})
    with pytest.raises(TaskDied, match=r"task step 0 died: .*low on memory.*GB used / .*GB limit.*cluster\.workers"):
        parallel_map(time.sleep, [(120,)], out=workers[0], cluster=ClusterConfig(), unit="x")
