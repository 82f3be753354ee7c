"""The house rules as tests: imports point down, heavy libraries stay behind their doors, rooms and files stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.worlds.basics import ROOT

PACKAGE = ROOT / "audiolm"
# Rooms from the ground up: a file imports from its own floor and from floors below. A room within a room has its own floor.
FLOORS = [["rng", "local_disk", "store", "places", "metrics_log", "pretrained"], ["config"], ["dag"], ["render"], ["models"],
          ["data"], ["tokenizers"], ["lm"], ["eval.metrics", "eval.models"], ["generate"], ["train"], ["eval"],
          ["report", "demo"], ["tracking"], ["pipeline"],
          ["eval_service"]]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
DOORS = {"mlflow": {"tracking"}, "deepspeed": {"train/engine.py"},
         "ray": {"data/parallel.py", "train/loop.py", "pipeline/ray_cluster.py", "pipeline/private_ray.py", "pipeline/cli.py",
                 "eval_service/launcher.py"}}
SOURCES = sorted(PACKAGE.rglob("*.py"))
OURS = [*SOURCES, *sorted((ROOT / "workflows").glob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def imported(path: Path) -> set[str]:
    """Every module or name that a file imports, lazily or not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return found


def own_modules(path: Path) -> set[str]:
    """The modules of this package that a file imports; `import audiolm` alone gives the version and is no edge."""
    names = {n if n in MODULES else n.rsplit(".", 1)[0] for n in imported(path) if n.startswith("audiolm.")}
    return names & MODULES.keys() - {"audiolm"}


def floor_of(module: str) -> int:
    parts = module.split(".")[1:]
    return next(FLOOR[".".join(parts[:n])] for n in (2, 1) if ".".join(parts[:n]) in FLOOR)


def test_imports_point_down():
    upward = [f"{module} imports {other}" for module, path in MODULES.items() if module != "audiolm"
              for other in own_modules(path) if floor_of(other) > floor_of(module)]
    assert not upward


def test_no_circle_of_imports():
    try:
        TopologicalSorter({module: own_modules(path) for module, path in MODULES.items()}).prepare()
    except CycleError as e:
        pytest.fail(f"files import each other: {' -> '.join(e.args[1])}")


def test_models_import_torch_only():
    for path in (PACKAGE / "models").rglob("*.py"):
        for name in imported(path):
            own = name.startswith(("audiolm.models", "audiolm.rng"))
            assert own or name.split(".")[0] in {"torch", "numpy", *sys.stdlib_module_names}, f"{path.name} imports {name}"


def test_heavy_libraries_stay_behind_their_doors():
    for path in SOURCES:
        here = path.relative_to(PACKAGE)
        for name in imported(path):
            doors = DOORS.get(name.split(".")[0])
            assert doors is None or {str(here), here.parts[0]} & doors, f"{here} imports {name}"


def test_rooms_and_files_stay_small():
    folders = {p.parent for p in OURS}
    assert not {str(f.relative_to(ROOT)): n for f in folders if (n := len([*f.glob("*.py")])) > 20}
    assert len([*PACKAGE.glob("*.py")]) <= 6
    assert not {str(p.relative_to(ROOT)): n for p in OURS if (n := len(p.read_text().splitlines())) > 350}


def test_functions_stay_short():
    long = {f"{path.relative_to(ROOT)}:{node.name}": n for path in OURS for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef) and (n := node.end_lineno - node.lineno + 1) > 60}
    assert not long


def test_a_plan_needs_neither_torch_nor_ray():
    code = ("import sys, runpy; sys.argv = ['full_pipeline.py', '--dry-run', 'store=/nonexistent/audiolm']; "
            "runpy.run_path('workflows/full_pipeline.py', run_name='__main__'); "
            "print([m for m in ('torch', 'ray', 'mlflow', 'deepspeed') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]"), done.stdout
