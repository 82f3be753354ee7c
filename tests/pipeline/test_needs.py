"""A box with torch and little more: a language model trains there, and what an option lacks is said before anything runs."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from dataclasses import replace

import pytest

from audiolm.config.base import ConfigError
from audiolm.config.installed import PACKAGES
from audiolm.config.load import load_config
from audiolm.dag.execute import run_step
from audiolm.dag.plan import toposort
from audiolm.pipeline.needs import DEEPSPEED, check_installed
from audiolm.store import copy
from tests.golden import freeze
from tests.worlds.basics import ROOT
from workflows.full_pipeline import graph

STAGES = ("lm_semantic", "lm_coarse")
SHORT = [f"lm.{stage}.train.{field}" for stage in ("semantic", "coarse")
         for field in ("steps=2", "warmup_steps=0", "decay_steps=0", "eval_every=2")]
# The finder of installed modules passes over some, so that importing or looking for them goes as where they are missing.
BARE = """
import runpy, sys
from importlib.machinery import PathFinder
class Bare:
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in {missing!r} else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def bare(missing, *arguments):
    """The pipeline's command where these modules are missing."""
    code = BARE.format(missing=missing, argv=["workflows/full_pipeline.py", *arguments])
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The tiny pipeline up to its token stores; tokenizers are empty builds."""
    folder = str(tmp_path_factory.mktemp("store"))
    planted, built = freeze.planted_tokens(folder), {}

    def fn(config, inputs, out):
        if artifact := planted.get(out.step.name):
            copy(artifact.path, out.path)
            return artifact.facts

    steps = {s.name: s for s in graph(load_config(freeze.TINY, SHORT))}
    for step in toposort([u for name in STAGES for u in steps[name].inputs]):
        built[step.name] = run_step(replace(step, fn=fn), folder, {s.name: built[s.name] for s in step.inputs}, inline=True)
    return folder


def test_language_models_train_with_torch_alone(store):
    done = bare(("ray", "mlflow", "deepspeed", "soundfile", "soxr", "transformers", "matplotlib", "pesq"), freeze.TINY,
                "--inline", "--only", ",".join(STAGES), f"store={store}", "corpus.changed=ignore", *SHORT)
    assert done.returncode == 0 and "steps done" in done.stdout, done.stdout + done.stderr


def test_a_missing_module_ends_the_run_before_it_starts(store):
    done = bare(("einops", "hjson"), freeze.TINY, "--inline", "--only", "lm_fine", f"store={store}",
                "lm.fine.train.engine=deepspeed")
    assert done.returncode == 2
    assert done.stderr == ("error: engine: deepspeed (train of lm_fine) needs the modules einops, hjson, which are not "
                           "installed: pip install einops hjson, or set engine: torch there\n")


@pytest.mark.parametrize(("module", "override", "names", "line"), [
    ("ray", "", ["lm_fine"], "a run on Ray needs the module ray, which is not installed: pip install "
                             "'ray[default,train]==2.60.0', or add --inline"),
    ("mlflow", "tracking=sqlite", [], "tracking: sqlite needs the module mlflow"),
    ("soxr", "", ["manifest", "lm_fine"], "sound (of manifest) needs the module soxr"),
    ("deepspeed", "lm.fine.train.engine=deepspeed", ["lm_fine"], "pip install deepspeed==0.19.8, or set")])
def test_every_library_is_named_with_its_option(module, override, names, line, monkeypatch):
    cfg = load_config(freeze.TINY, [override] if override else [])
    steps = [s for s in graph(cfg) if s.name in names]
    check_installed(cfg, steps, inline=False)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(ConfigError, match=re.escape(line)):
        check_installed(cfg, steps, inline=False)


def test_what_pip_is_told_is_what_the_package_declares():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = ("pretrained", "demo", "filters")
    declared = {*project["dependencies"], *(p for n in extras for p in project["optional-dependencies"][n])}
    assert declared >= set(PACKAGES.values())


def test_deepspeed_imports_what_is_looked_for():
    code = f"import sys, deepspeed; sys.exit(not set({DEEPSPEED!r}) <= set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
