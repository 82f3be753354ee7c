"""The manifests have the fields that Kubernetes and KubeRay know, are locked down, and fit together."""

from __future__ import annotations

import copy
import re

import jsonschema
import pytest

from tests.infra.kubernetes import KUBERAY, SCHEMA, container, crd, documents, find, pods, rendered
from tests.worlds.basics import ROOT


@pytest.fixture
def job() -> dict:
    return copy.deepcopy(find("RayJob", "audiolm"))


def groups(job: dict) -> dict[str, dict]:
    return {g["groupName"]: g for g in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]}


def test_the_run_fits_the_schema(job):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(job, SCHEMA, cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize("where, field", [
    ("spec", "shutdownAfterJobFinish"), ("spec.rayClusterSpec", "rayversion"),
    ("spec.rayClusterSpec.headGroupSpec", "replicas"), ("spec.rayClusterSpec.workerGroupSpecs.1", "replica"),
    ("spec.rayClusterSpec.autoscalerOptions", "idleTimeout"), ("spec.deletionStrategy.deletionRules.0", "ttlSeconds"),
    ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec", "container"),
    ("spec.submitterPodTemplate.spec.containers.0", "environment")])
def test_an_unknown_field_is_refused(job, where, field):
    node = job
    for name in where.split("."):
        node = node[int(name) if name.isdigit() else name]
    node[field] = "x"
    with pytest.raises(jsonschema.ValidationError, match=field):
        jsonschema.validate(job, SCHEMA, cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize("folder", ["kuberay", "kueue"])
def test_kuberays_own_schema_takes_the_run(folder):
    run, = (d for d in rendered(folder) if d["kind"] == "RayJob")
    jsonschema.validate(run, crd(), cls=jsonschema.Draft7Validator)


def test_kubernetes_own_schemas_take_the_rest():
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for document in documents():
        if document["kind"] != "RayJob":
            kubernetes_validate.validate(document, "1.34", strict=True)


def test_the_run_scales_from_nothing_and_keeps_failures(job):
    spec = job["spec"]
    assert spec["rayClusterSpec"]["enableInTreeAutoscaling"] and spec["rayClusterSpec"]["autoscalerOptions"]["version"] == "v2"
    assert all(g["replicas"] == g["minReplicas"] == 0 < g["maxReplicas"] for g in groups(job).values())
    kept = {next(v for k, v in rule["condition"].items() if k != "ttlSeconds"): rule["condition"]["ttlSeconds"]
            for rule in spec["deletionStrategy"]["deletionRules"]}
    assert kept["FAILED"] == kept["Failed"] > kept["SUCCEEDED"] and "shutdownAfterJobFinishes" not in spec
    assert spec["activeDeadlineSeconds"] > 0 and spec["backoffLimit"] >= 1
    limits = {name: g["template"]["spec"]["containers"][0]["resources"]["limits"] for name, g in groups(job).items()}
    assert "nvidia.com/gpu" in limits["gpu"] and "nvidia.com/gpu" not in limits["cpu"]
    assert {t["key"] for t in groups(job)["gpu"]["template"]["spec"]["tolerations"]} > {"nvidia.com/gpu"}


def test_the_queued_run_is_one_that_kueue_admits():
    """Kueue wants the cluster deleted by shutdownAfterJobFinishes, which KubeRay refuses beside deletion rules."""
    run, = (d for d in rendered("kueue") if d["kind"] == "RayJob")
    assert run["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert run["metadata"]["annotations"]["kueue.x-k8s.io/elastic-job"] == "true"  # else it may not scale
    assert run["spec"]["shutdownAfterJobFinishes"] and "deletionStrategy" not in run["spec"]
    assert run["spec"]["ttlSecondsAfterFinished"] > 0


def test_the_head_may_scale_its_cluster_and_no_other_pod_has_an_account(job):
    head, *others = pods(job)
    account = head["serviceAccountName"]
    rules = {(r["resources"][0], v) for r in find("Role", account)["rules"] for v in r["verbs"]}
    assert {("pods", "list"), ("pods", "watch"), ("rayclusters", "get"), ("rayclusters", "patch")} <= rules
    binding = find("RoleBinding", account)
    assert binding["subjects"][0]["name"] == binding["roleRef"]["name"] == find("ServiceAccount", account)["metadata"]["name"]
    others += [p for d in documents() if d["kind"] != "RayJob" for p in pods(d)]
    assert len(others) == 6 and all(p["automountServiceAccountToken"] is False for p in others)


def test_every_pod_is_restricted_and_bounded():
    assert find("Namespace", "audiolm")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    user = int(re.findall(r"^USER (\d+)$", (ROOT / "infra" / "Dockerfile").read_text(), re.M)[-1])
    for document in documents():
        for pod in pods(document):
            for c in pod["containers"]:
                assert c["resources"]["limits"] and c["resources"]["requests"]
                assert c["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                                                "capabilities": {"drop": ["ALL"]}}
                assert {m["name"] for m in c["volumeMounts"]} <= {
                    v["name"] for v in pod["volumes"] + document["spec"].get("volumeClaimTemplates", [])
                    for v in [v.get("metadata", v)]}
            context = pod["securityContext"]
            assert context["runAsNonRoot"] and context["seccompProfile"] == {"type": "RuntimeDefault"}
            assert context["runAsUser"] == (999 if c["image"] == "postgres" else user)


def test_secrets_are_named_and_never_written():
    wanted = {"audiolm-s3", "audiolm-mlflow"}
    text = "".join(path.read_text() for path in KUBERAY.iterdir())
    assert not re.search(r"(?i)(secret_access_key|password|auth_token)\s*[:=]\s*\S|PASSWORD, value", text)
    found = set(re.findall(r"(?:secretRef|secretKeyRef): \{name: ([\w-]+)", text))
    assert found == wanted and "Secret" not in {d["kind"] for d in documents()}
    readme = (ROOT / "infra" / "README.md").read_text()
    assert all(f"create secret generic {name}" in readme for name in wanted)


def test_nobody_reaches_a_pod_but_those_that_must():
    policies = {d["metadata"]["name"]: d["spec"] for d in documents() if d["kind"] == "NetworkPolicy"}
    assert policies["deny"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    for name in ("mlflow", "postgres"):
        port, = (p["port"] for p in policies[name]["ingress"][0]["ports"])
        assert port == container("Deployment" if name == "mlflow" else "StatefulSet", name)["ports"][0]["containerPort"]
        assert find("Service", name)["spec"]["selector"] == policies[name]["podSelector"]["matchLabels"]
