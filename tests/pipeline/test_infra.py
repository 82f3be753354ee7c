"""The manifest has the fields KubeRay knows, the image is pinned and nobody's root."""

from __future__ import annotations

import copy
import json
import re
import tomllib

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement

from tests.worlds.basics import ROOT

SCHEMA = json.loads((ROOT / "tests" / "schemas" / "rayjob.json").read_text())


@pytest.fixture
def job() -> dict:
    return copy.deepcopy(yaml.safe_load((ROOT / "infra" / "rayjob.yaml").read_text()))


def pods(job: dict) -> list[dict]:
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [g["template"]["spec"] for g in groups] + [job["spec"]["submitterPodTemplate"]["spec"]]


def constraints() -> dict[str, str]:
    lines = [x for x in (ROOT / "infra" / "constraints.txt").read_text().splitlines() if x and not x.startswith("#")]
    return dict(line.split("==") for line in lines)


def test_the_manifest_fits_the_schema(job):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(job, SCHEMA, cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize("where, field", [
    ("spec", "shutdownAfterJobFinish"), ("spec.rayClusterSpec", "rayversion"),
    ("spec.rayClusterSpec.headGroupSpec", "replicas"), ("spec.rayClusterSpec.workerGroupSpecs.1", "replica"),
    ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec", "container"),
    ("spec.submitterPodTemplate.spec.containers.0", "environment")])
def test_an_unknown_field_is_refused(job, where, field):
    node = job
    for name in where.split("."):
        node = node[int(name) if name.isdigit() else name]
    node[field] = "x"
    with pytest.raises(jsonschema.ValidationError, match=field):
        jsonschema.validate(job, SCHEMA, cls=jsonschema.Draft202012Validator)


def test_it_runs_the_pipeline_with_the_papers_config_and_cleans_up(job):
    spec = job["spec"]
    command = spec["entrypoint"].split()
    assert command[:3] == ["python", "/app/workflows/full_pipeline.py", "/app/workflows/paper.yaml"]
    overrides = dict(x.split("=", 1) for x in command[3:])
    assert overrides["store"].startswith("s3://") and overrides["tracking"].startswith("http")
    assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0 and spec["backoffLimit"] >= 1
    assert "WORKDIR /app" in (ROOT / "infra" / "Dockerfile").read_text()
    groups = {g["groupName"]: g["template"]["spec"]["containers"][0] for g in spec["rayClusterSpec"]["workerGroupSpecs"]}
    assert "nvidia.com/gpu" in groups["gpu"]["resources"]["limits"] and groups["gpu"]["image"].endswith("-cuda")
    assert "nvidia.com/gpu" not in groups["cpu"]["resources"]["limits"]


def test_no_pod_runs_as_root_and_no_secret_stands_in_the_files(job):
    user = re.findall(r"^USER (\d+)$", (ROOT / "infra" / "Dockerfile").read_text(), re.M)[-1]
    for pod in pods(job):
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] == int(user) > 0
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert "env" not in container, "credentials come from the Secret"
    for pod in pods(job)[:-1]:
        assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "audiolm-s3"}}]
    for name in ("Dockerfile", "rayjob.yaml"):
        assert not re.search(r"(?i)(secret_access_key|password|auth_token)\s*[:=]\s*\S", (ROOT / "infra" / name).read_text())


def test_ray_is_one_version_everywhere(job):
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == constraints()["ray"]


def test_the_image_pins_what_it_installs_and_ends_as_a_user():
    text = (ROOT / "infra" / "Dockerfile").read_text()
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    base = re.search(r"^ARG BASE=(\S+)$", code, re.M).group(1)
    assert re.fullmatch(r"[\w./-]+:\d[\w.-]+", base), f"{base} has no version"
    assert re.search(r"^FROM \$\{BASE\}$", code, re.M)
    torch = re.search(r"^ARG TORCH_VERSION=(\d+\.\d+\.\d+)$", code, re.M).group(1)
    steps = [s for s in re.split(r"\n(?=[A-Z]+ )", code) if "pip install" in s]
    assert '"torch==${TORCH_VERSION}"' in steps[0] and "--constraint infra/constraints.txt" in steps[-1]
    for word in re.findall(r"pip install ([\w=. ]+?)(?= \\|\n|$)", steps[0]):
        assert all("==" in w for w in word.split()), f"{word} is not pinned"
    assert code.rindex("\nUSER ") < code.rindex("\nCMD ") and not re.search(r"^USER (root|0)\b", code, re.M)

    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pins = {**constraints(), "torch": torch}
    for requirement in map(Requirement, wanted):
        assert requirement.name in pins, f"{requirement.name} is not pinned in infra/constraints.txt"
        assert requirement.specifier.contains(pins[requirement.name]), f"{requirement} against {pins[requirement.name]}"
