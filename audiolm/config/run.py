"""The sections of the run itself: its name and seed, and the machines."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from audiolm.config.base import Config, Runtime

NAME_BYTES = 100  # a file name holds 255, and endings are added to it


def check_run_name(name: str) -> str:
    """The name of a run, which names files in the store. Raises ValueError for one that is too long or leads elsewhere."""
    if (size := len(name.encode("utf-8", "surrogatepass"))) > NAME_BYTES:
        raise ValueError(f"a run is called {name[:20]!r}..., in {size} bytes: give a name of at most {NAME_BYTES}")
    if not name.strip() or ".." in name or name == "." or re.search(r"[/\\\x00-\x1f\x7f\ud800-\udfff]", name):
        raise ValueError(f"a run is called {name!r}, and its index is STORE/runs/NAME.json: give a name without slashes, such "
                         "as speech-2")
    return name


class RunConfig(Config):
    name: Runtime[str] = Field("quickstart", description="names the run's files in the store; without slashes")
    experiment: Runtime[str] = "audiolm"
    seed: int = 0

    @field_validator("name")
    @classmethod
    def _is_a_file_name(cls, name: str) -> str:
        return check_run_name(name)


class ClusterConfig(Config):
    """The machines and their use; no field changes what is computed."""

    address: Runtime[str | None] = Field(None, description="a Ray cluster to join; None starts a closed one here")
    workers: Runtime[int | None] = Field(None, ge=1, description="data tasks at once; None = as the cluster has CPUs")
    device: Runtime[Literal["auto", "cpu", "cuda"]] = "auto"
    gpus_a_task: Runtime[float] = Field(
        0.25, gt=0, le=1, description="share of a GPU that a task of the token steps and of kmeans' sample holds; 0.25: four "
        "tasks share one, and decode, encode and write by turns")
    train_workers: Runtime[int] = Field(1, ge=1, description="training workers (ranks) of one step")
    threads: Runtime[int | None] = Field(None, ge=1, description="torch threads a training worker; None = CPUs / ranks")
    parallel_training: Runtime[int] = Field(1, ge=1, description="training steps at once")
    retries: Runtime[int] = Field(2, ge=0, description="relaunches of a training step after a node or worker died, "
                                    "counted from its newest checkpoint")
    compile: Runtime[bool] = Field(True, description="torch.compile what trains on a GPU, where the step knows how")
    audio_cache_mb: Runtime[int] = Field(512, ge=0, description="decoded audio kept in memory by a training worker")
