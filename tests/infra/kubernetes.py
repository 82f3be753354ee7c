"""The manifests of infra/kuberay as they are applied, and checks of them against Kubernetes' and KubeRay's schemas."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest
import yaml

from tests.worlds.basics import ROOT

KUBERAY = ROOT / "infra" / "kuberay"
SCHEMA = json.loads((ROOT / "tests" / "schemas" / "rayjob.json").read_text())


@functools.cache
def documents() -> list[dict]:
    """All of the folder's manifests, before kustomize; nobody may change them."""
    files = [f for f in sorted(KUBERAY.glob("*.yaml")) if f.name != "kustomization.yaml"]
    return [d for f in files for d in yaml.safe_load_all(f.read_text())]


def find(kind: str, name: str) -> dict:
    return next(d for d in documents() if d["kind"] == kind and d["metadata"]["name"] == name)


def container(kind: str, name: str) -> dict:
    """The first container of a Deployment or StatefulSet."""
    return find(kind, name)["spec"]["template"]["spec"]["containers"][0]


def pods(document: dict) -> Iterator[dict]:
    """Specs of the pods that a manifest makes."""
    spec = document.get("spec", {})
    if document["kind"] in ("Deployment", "StatefulSet"):
        yield spec["template"]["spec"]
    if document["kind"] == "RayJob":
        cluster = spec["rayClusterSpec"]
        yield from (g["template"]["spec"] for g in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]])
        yield spec["submitterPodTemplate"]["spec"]


@functools.cache
def rendered(folder: str) -> list[dict]:
    """What `kubectl apply -k` would send; skips the test where there is no kubectl."""
    if not shutil.which("kubectl"):
        pytest.skip("no kubectl here")
    done = subprocess.run(["kubectl", "kustomize", str(ROOT / "infra" / folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@functools.cache
def crd() -> dict:
    """KubeRay's own schema of a RayJob, strict; skips the test where AUDIOLM_RAYJOB_CRD does not name it."""
    path = os.environ.get("AUDIOLM_RAYJOB_CRD")
    if not path:
        pytest.skip("AUDIOLM_RAYJOB_CRD names no file of KubeRay's RayJob CRD")
    with open(path) as f:
        versions = yaml.load(f, getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
    schema = next(v for v in versions if v["name"] == "v1")["schema"]["openAPIV3Schema"]
    _refuse_unknown(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def _refuse_unknown(node) -> None:
    """Makes a Kubernetes schema, which drops unknown fields, refuse them."""
    if isinstance(node, dict):
        if node.get("x-kubernetes-int-or-string"):
            node.pop("type", None)
        if isinstance(node.get("properties"), dict) and not node.get("x-kubernetes-preserve-unknown-fields"):
            node.setdefault("additionalProperties", False)
        for child in node.values():
            _refuse_unknown(child)
    elif isinstance(node, list):
        for child in node:
            _refuse_unknown(child)
