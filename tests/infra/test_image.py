"""The image is pinned to the last package, and nobody's root."""

from __future__ import annotations

import re
import tomllib

from packaging.requirements import Requirement

from tests.infra.kubernetes import find
from tests.worlds.basics import ROOT

DOCKERFILE = (ROOT / "infra" / "Dockerfile").read_text()
CODE = "\n".join(line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked() -> dict[str, str]:
    lines = [x for x in (ROOT / "infra" / "constraints.txt").read_text().splitlines() if x and not x.startswith("#")]
    return dict(line.split("==") for line in lines)


def test_the_base_has_a_digest_and_the_image_ends_as_a_user():
    assert re.search(r"^ARG BASE=[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}\nFROM \$\{BASE\}$", CODE, re.M)
    assert CODE.rindex("\nUSER ") < CODE.rindex("\nCMD ") and not re.search(r"^USER (root|0)\b", CODE, re.M)
    assert not re.search(r"(?i)(secret_access_key|password|auth_token)\s*[:=]\s*\S", DOCKERFILE)


def test_all_that_pip_installs_is_locked():
    pins, steps = locked(), [s for s in re.split(r"\n(?=[A-Z]+ )", CODE) if "pip install" in s]
    assert '"$(grep \'^torch==\' infra/constraints.txt)"' in steps[0] and "--constraint infra/constraints.txt" in steps[-1]
    for word in re.findall(r"pip install ([\w=. ]+?)(?= \\|\n|$)", steps[0]):
        assert all("==" in w for w in word.split()), f"{word} is not pinned"
    extras = re.search(r"\[([\w,]+)\]", steps[-1])[1].split(",")
    for text in [*PROJECT["dependencies"], *(r for e in extras for r in PROJECT["optional-dependencies"][e])]:
        requirement = Requirement(text)
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in pins, f"{name} is not locked in infra/constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{requirement} against {pins[name]}"


def test_ray_is_one_version_everywhere():
    assert find("RayJob", "audiolm")["spec"]["rayClusterSpec"]["rayVersion"] == locked()["ray"]
