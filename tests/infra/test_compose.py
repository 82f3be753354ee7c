"""infra/compose.yaml is locked down, and its commands are those of the manifests and known to the programs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess

import pytest

from tests.infra.kubernetes import container, find
from tests.infra.services import INFRA, SECRETS, SERVICES, TEXT
from tests.worlds.basics import ROOT


def command(service: str) -> list[str]:
    return shlex.split(SERVICES[service]["command"])


def flags(words: list[str]) -> dict[str, str]:
    """Options of a command, whether their values are joined by `=` or are words of their own."""
    text = " ".join(words) + " "
    return dict(re.findall(r"--([\w-]+)[ =]((?!--)\S*)", text))


def test_every_service_is_locked_down_and_bounded():
    for name, s in SERVICES.items():
        assert s["read_only"] and s["cap_drop"] == ["ALL"] and not s["user"].startswith(("0", "root")), name
        assert s["deploy"]["resources"]["limits"].keys() == {"cpus", "memory"}, name
        assert all(port.startswith("127.0.0.1:") for port in s.get("ports", [])), name
        assert s["image"] == "audiolm:0.1.0" or re.fullmatch(r"[\w/]+:[\d.]+@sha256:[0-9a-f]{64}", s["image"]), name
        for other in s.get("depends_on", {}):
            assert "healthcheck" in SERVICES[other], f"{name} waits for the health of {other}"


def test_no_secret_is_written_and_the_readme_makes_them_all():
    assert not re.search(r"(?i)(password|secret\w*|token|key): (?!\$\{)\S", TEXT.replace("RAY_AUTH_MODE: token", ""))
    readme = (INFRA / "README.md").read_text()
    assert SECRETS and SECRETS.keys() == set(re.search(r"for name in ([\w ]+)\n", readme)[1].split())
    assert {name for name, value in SECRETS.items() if value in str(SERVICES["postgres"])} == {"POSTGRES_PASSWORD"}


def test_docker_compose_takes_the_file(tmp_path):
    compose = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
    if not shutil.which(compose[0]) or subprocess.run([*compose, "version"], capture_output=True).returncode:
        pytest.skip("no docker compose here: apt-get install docker-compose")

    def config(**more: str) -> subprocess.CompletedProcess:
        return subprocess.run([*compose, "-f", str(INFRA / "compose.yaml"), "config"], env=os.environ | SECRETS | more,
                              cwd=tmp_path, capture_output=True, text=True)

    done, refused = config(), config(RAY_AUTH_TOKEN="")
    assert done.returncode == 0 and done.stdout.count("@sha256:") == 2, done.stderr
    assert refused.returncode and "infra/README.md" in refused.stderr


def test_the_cluster_runs_the_commands_that_the_tests_run():
    mlflow = flags(container("Deployment", "mlflow")["args"])
    assert mlflow == flags(command("mlflow"))
    watch = flags(container("Deployment", "watcher")["args"])
    here = flags(command("watcher"))
    assert here.pop("job-server") == "http://ray-head:8265" and watch.items() >= here.items()
    run = dict(w.split("=", 1) for w in find("RayJob", "audiolm")["spec"]["entrypoint"].split() if "=" in w)
    assert run == {"store": here["store"], "tracking": here["tracking"], "cluster.device": "cuda"}
    digest = SERVICES["postgres"]["image"].split("@")[1]
    assert digest in (INFRA / "kuberay" / "kustomization.yaml").read_text()


def test_the_programs_know_these_options():
    from mlflow.cli import server
    from ray.scripts.scripts import start

    from audiolm.config.load import load_config
    from workflows import evaluate

    for words in (command("mlflow"), container("Deployment", "mlflow")["args"]):
        assert words[:2] == ["mlflow", "server"] and server.make_context("server", words[2:])
    for service in ("ray-head", "ray-worker"):
        assert command(service)[:2] == ["ray", "start"] and start.make_context("start", command(service)[2:])
    for words in (command("watcher"), container("Deployment", "watcher")["args"]):
        assert words[:2] == ["python", "/app/workflows/evaluate.py"] and evaluate.parse(words[2:]).call is evaluate.watch
    words = find("RayJob", "audiolm")["spec"]["entrypoint"].split()
    assert words[:2] == ["python", "/app/workflows/full_pipeline.py"]
    config = load_config(str(ROOT) + words[2].removeprefix("/app"), words[3:])
    assert config.cluster.device == "cuda" and config.store == "s3://audiolm/store"
