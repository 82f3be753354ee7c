"""Shared fixtures: stores on a local disk and on a real S3 server, and where the optional speech data lie."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from tests.worlds.basics import RecordingOut
from tests.worlds.browser import browser  # noqa: F401
from tests.worlds.encoded_corpus import encoded, world  # noqa: F401
from tests.worlds.servers import seaweedfs
from tests.worlds.whole_run import head  # noqa: F401

# Small products on busy cores are far slower on two threads: here, and in every process that a test starts.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


LONGEST = ("pipeline/test_pipeline.py", "train/test_hardware.py", "objectives/test_codec_training.py", "bench/test_gpu.py",
           "eval_service/test_requests.py", "data/test_ray_tasks.py", "tests/test_golden.py", "eval_service/test_ray_jobs.py",
           "pipeline/test_stop.py", "tokenizers/test_iterations.py", "pipeline/test_parallel.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take minutes begin first, so that no worker waits for one of them at the end."""
    items.sort(key=lambda item: next((n for n, name in enumerate(LONGEST) if str(item.path).endswith(name)), len(LONGEST)))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """SeaweedFS, a real S3 server whose conditional writes are atomic; its endpoint and keys stand in the environment."""
    with seaweedfs(tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path):
    """A store URI, on a local disk and on S3 in turn."""
    if request.param == "local":
        return str(tmp_path / "store")
    request.getfixturevalue("s3_server")
    return f"s3://tests/{tmp_path.name}-{time.time_ns()}"


@pytest.fixture
def recording_out(tmp_path):
    return RecordingOut(tmp_path / "out")


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> str:
    """A codec build of the smallest width."""
    from tests.worlds.tiny_codec import built_codec

    return built_codec(str(tmp_path_factory.mktemp("codec")))


@pytest.fixture(scope="session")
def codec(built):
    """Its tokenizer."""
    from audiolm.tokenizers.acoustic import load_codec

    return load_codec(built)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory) -> Path:
    """MLflow takes seconds to lay out a database: once, then copied."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def ready(tmp_path, empty_database) -> Path:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return tmp_path
