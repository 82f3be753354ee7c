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
        s3 = s.s3()
        s.postgres()
        s.healthy("s3", s3)
        s.healthy("mlflow", s.start("mlflow"))
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


def test_the_watcher_answers_on_a_cluster_of_two_nodes(services, client):
    services.healthy("ray-head", services.ray("ray-head"))
    services.ray("ray-worker")
    watcher = services.start("watcher")
    client.create_registered_model("nothing")
    client.create_model_version("nothing", "s3://audiolm/store/nothing")
    client.set_model_version_tag("nothing", "1", "evaluate", "requested")
    until = time.monotonic() + 400
    while (tags := client.get_model_version("nothing", "1").tags)["evaluate"] != "failed":
        assert time.monotonic() < until and watcher.poll() is None, (tags, (services.folder / "watcher.log").read_text())
        time.sleep(0.5)
    assert "checkpoint" in tags["evaluate.reason"]
    assert services.status("ray-head", "8265", "/api/version") == 401  # without the token
