"""The Ray cluster of a run: joined where one is named, else started for this run alone.

No work of a step is here: data/parallel.py and train/loop.py use the cluster.
"""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Callable

from audiolm.config.installed import require
from audiolm.config.run import ClusterConfig
from audiolm.dag.execute import StepFailed
from audiolm.store import get_json, join, put_json, remove

PIPELINE = "full_pipeline.py"  # in the commands of our jobs
MOST = 10_000  # jobs and placement groups that Ray's state API lists at a time


def in_ray_job() -> bool:
    """True in the entrypoint of a submitted Ray job, whose working folder changes with each submission."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def wants_ray(option: bool) -> bool:
    """True where a command's work goes to Ray: by its option, in a Ray job, or as RAY_ADDRESS names a cluster."""
    return option or in_ray_job() or bool(os.environ.get("RAY_ADDRESS"))


def start_ray(cluster: ClusterConfig, folder: str, say: Callable[[str], None]) -> None:
    """Joins the cluster of a job, of RAY_ADDRESS or of cluster.address; else starts one for this run alone, which nobody
    else may use. Raises StepFailed, also for a node that does not see `folder`, and ConfigError where there is no Ray."""
    require("Ray", ["ray"], "go without Ray")
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if address == "local":  # Ray's own word for a new one, which would be open
        address = None
    import ray
    from ray._private import auto_init_hook

    from audiolm.pipeline.private_ray import guarded, read_settings
    from audiolm.pipeline.ray_reaper import start_reaper

    auto_init_hook.enable_auto_connect = False  # a thread that outlives `ray.shutdown` would start another Ray, open to all
    try:
        if address:
            read_settings()
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            start_reaper()
            with guarded():
                ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
                         num_gpus=0 if cluster.device == "cpu" else None)
    except Exception as e:  # noqa: BLE001  a plain one where a busy machine takes more than 30 s to start Ray
        where = f"join the cluster at {address!r}" if address else "start Ray here"
        raise StepFailed(f"cannot {where}: {(str(e) or type(e).__name__).splitlines()[0]}; on a busy machine run the same "
                         "command again, else check cluster.address, RAY_ADDRESS and RAY_AUTH_MODE, or go without Ray") from e
    if address:
        _free_lost_groups(say)
    nodes = [n for n in ray.nodes() if n["Alive"]]
    resources = ray.cluster_resources()
    say(f"ray: {len(nodes)} node(s), {resources.get('CPU', 0):.0f} CPUs, {resources.get('GPU', 0):.0f} GPUs")
    if len(nodes) > 1:
        _every_node_sees(folder, nodes)


def _free_lost_groups(say: Callable[[str], None]) -> None:
    """Removes placement groups of pipelines that have ended.

    Ray forgets those of a driver that was stopped while Ray Train's workers started, and no training would get their CPUs.
    Groups of other programs stay: an actor that outlived its job may hold them.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group
    from ray.util.state import list_jobs, list_placement_groups

    here = {"address": ray.get_runtime_context().gcs_address, "limit": MOST}
    try:
        ended = {job.job_id for job in list_jobs(**here)
                 if job.status in ("SUCCEEDED", "FAILED", "STOPPED") and PIPELINE in job.entrypoint}
        lost = [group for group in list_placement_groups(**here, detail=True)
                if group.state != "REMOVED" and not group.is_detached and group.creator_job_id in ended]
    except Exception as e:  # noqa: BLE001  a cluster without a dashboard does not tell, in one of several ways
        logging.getLogger(__name__).debug("placement groups are not known: %s", e)
        return
    for group in lost:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group.placement_group_id))))
    if lost:
        say(f"ray: freed {len(lost)} placement group(s) that runs before left")


def _every_node_sees(store: str, nodes: list[dict]) -> None:
    """Writes a random text into the store and has every node read it back. Raises StepFailed naming the others."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nonce = uuid.uuid4().hex
    path = join(store, ".probe", nonce)
    put_json(path, nonce)
    try:
        read = ray.remote(num_cpus=0)(get_json)
        refs = {n["NodeManagerHostname"]: read.options(scheduling_strategy=NodeAffinitySchedulingStrategy(
            n["NodeID"], soft=False)).remote(path) for n in nodes}
        blind = [host for host, ref in refs.items() if ray.get(ref) != nonce]
    finally:
        remove(path)
    if blind:
        raise StepFailed(f"store {store!r} is not seen by node(s) {', '.join(blind)}: use a shared disk or s3://")


def worker_died(e: BaseException) -> bool:
    """True for a dead node, worker or actor, after which a step may run again; False for an error of the code itself."""
    if "ray" not in sys.modules:
        return False
    from ray import exceptions as ray_errors

    return (isinstance(e, (ray_errors.RayActorError, ray_errors.WorkerCrashedError, ray_errors.NodeDiedError,
                           ray_errors.ObjectLostError, ray_errors.OutOfMemoryError))
            or type(e).__name__ in ("WorkerHealthCheckFailedError", "WorkerHealthCheckTimeoutError", "ControllerError",
                                    "PreemptionError"))
