"""The commands of infra/compose.yaml, run here: S3, PostgreSQL, MLflow with passwords, Ray of two nodes, the watcher."""

from __future__ import annotations

import base64
import shutil
import time

import pytest

from tests.infra.services import INFRA, SECRETS, Services, postgres_bin

pytestmark = pytest.mark.long  # minutes on two busy cores
if not postgres_bin():
    pytest.skip("no PostgreSQL here: apt-get install postgresql", allow_module_level=True)
pytest.importorskip("psycopg2", reason="psycopg2 is missing: pip install 'audiolm[postgres]'")
pytest.importorskip("flask_wtf", reason="Flask-WTF is missing: pip install 'audiolm[postgres]'")


@pytest.fixture(scope="module")
def services(tmp_path_factory):
    """Everything but Ray and the watcher."""
    folder = tmp_path_factory.mktemp("services")
    (folder / "data").mkdir()
    s = Services(folder)
    try:
        ini = (INFRA / "kuberay" / "basic_auth.ini").read_text()
        (folder / "basic_auth.ini").write_text(s.here(ini, "mlflow"))
        s.s3()
        s.postgres()
        s.healthy("s3")
        s.start("mlflow")
        s.healthy("mlflow")
        yield s
    finally:
        s.stop()


@pytest.fixture
def client(services, monkeypatch):
    """MLflow's, with the variables that the file gives to Ray and the watcher."""
    from mlflow import MlflowClient

    for name, value in services.environment("watcher").items():
        monkeypatch.setenv(name, value)
    return MlflowClient(services.url("mlflow", "5000"))


def test_mlflow_asks_for_a_password_and_knows_its_names(services):
    path = "/api/2.0/mlflow/registered-models/search"
    basic = "Basic " + base64.b64encode(f"admin:{SECRETS['MLFLOW_ADMIN_PASSWORD']}".encode()).decode()
    ask = lambda path, **headers: services.status("mlflow", "5000", path, **headers)  # noqa: E731
    assert ask(path) == 401 and ask(path, Authorization="Basic " + base64.b64encode(b"admin:password1234").decode()) == 401
    assert ask(path, Authorization=basic) == 200 and ask(path, Authorization=basic, Host="evil.example") == 403
    assert ask("/health", Host="10.1.2.3:5000") == 200  # a probe of Kubernetes names the pod's address


def test_files_pass_through_mlflow_to_s3(services, client, tmp_path):
    import boto3

    (tmp_path / "note.txt").write_text("here")
    run = client.create_run(client.create_experiment("files")).info
    client.log_artifact(run.run_id, str(tmp_path / "note.txt"))
    assert run.artifact_uri.startswith("mlflow-artifacts:")
    shutil.rmtree(tmp_path)
    assert open(client.download_artifacts(run.run_id, "note.txt")).read() == "here"
    stored = [o["Key"] for o in boto3.client("s3").list_objects_v2(Bucket="audiolm")["Contents"]]
    assert [k for k in stored if k.startswith("mlflow/") and k.endswith(f"{run.run_id}/artifacts/note.txt")]


@pytest.fixture(scope="module")
def cluster(services):
    """A head without CPUs and a worker; yields the services."""
    services.ray("ray-head")
    services.healthy("ray-head")
    services.ray("ray-worker")
    return services


def answer(services, client, model: str, watcher) -> dict[str, str]:
    """Asks for an evaluation of version 1 as the UI does; its tags once the watcher or its job has ended it."""
    client.set_model_version_tag(model, "1", "evaluate", "requested")
    until = time.monotonic() + 1200
    while (tags := client.get_model_version(model, "1").tags)["evaluate"] not in ("failed", "done"):
        assert time.monotonic() < until and watcher.poll() is None, (tags, (services.folder / "watcher.log").read_text())
        time.sleep(0.5)
    return tags


@pytest.mark.timeout(3000)
def test_a_run_is_submitted_tracked_and_evaluated(cluster, client):
    assert cluster.status("ray-head", "8265", "/api/version") == 401  # without the token
    job = cluster.start("ray-head", command="ray job submit --address http://127.0.0.1:8265 -- python /app/workflows/"
                        "full_pipeline.py /app/tests/e2e.yaml store=s3://audiolm/store tracking=http://mlflow:5000")
    assert job.wait(timeout=1800) == 0, (cluster.folder / "ray-head.log").read_text()[-6000:]
    assert "2 node(s), 2 CPUs" in (cluster.folder / "ray-head.log").read_text()
    assert client.get_model_version_by_alias("e2e-lm_semantic", "best").version

    watcher = cluster.start("watcher")
    client.create_registered_model("nothing")
    client.create_model_version("nothing", "s3://audiolm/store/nothing")
    assert "checkpoint" in answer(cluster, client, "nothing", watcher)["evaluate.reason"]
    client.set_model_version_tag("e2e-lm_semantic", "1", "evaluate.suites", "stages")
    tags = answer(cluster, client, "e2e-lm_semantic", watcher)
    assert tags["evaluate"] == "done" and client.get_run(tags["evaluate.run"]).data.metrics, tags
