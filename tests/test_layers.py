"""Imports point down only (DESIGN 2), heavy libraries stay behind their doors, files stay short."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYERS = [["rng", "store", "identity"], ["config_train"], ["config_semantic", "config_vocoder", "config_figures"],
          ["config", "lease", "metrics", "progress", "outbox", "mlflow_client"],
          ["configfile", "models", "tracked_runs"], ["data"], ["tokenizers"], ["lm"],
          ["train"], ["eval"], ["dag"], ["tracked_versions"], ["tracked_checkpoints", "tracked_systems"],
          ["tracking", "execute"], ["steps"], ["cli", "run"], ["serve", "ask"]]
RANK = {name: i for i, names in enumerate(LAYERS) for name in names}
# mlflow: mlflow_client makes every client; tracking and tracked_systems send its entities; tracked_runs and
# tracked_versions read its errors;
# serve.py is run by MLflow alone, as the model
DOORS = {"mlflow": {"mlflow_client.py", "tracking.py", "tracked_systems.py", "tracked_runs.py", "serve.py",
                    "tracked_versions.py"},
         "deepspeed": {"train/engine.py", "train/checkpoint.py"},
         "ray": {"data/shards.py", "train/loop.py", "cli.py", "ask/launch.py"}}
SOURCES = sorted((ROOT / "audiolm").rglob("*.py"))


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{a.name}" for a in node.names)


def test_imports_point_down():
    wrong = []
    for path in SOURCES:
        own = path.relative_to(ROOT / "audiolm").parts[0].removesuffix(".py")
        for name in imported(ast.parse(path.read_text())):
            parts = name.split(".")
            if parts[0] == "audiolm" and len(parts) > 1 and parts[1] in RANK and own in RANK and RANK[parts[1]] > RANK[own]:
                wrong.append(f"{path.name} imports {name}")
    assert not wrong


def test_models_import_torch_only():
    for path in (ROOT / "audiolm" / "models").glob("*.py"):
        for name in imported(ast.parse(path.read_text())):
            top = name.split(".")[0]
            own = name.startswith(("audiolm.models", "audiolm.rng"))
            assert own or top in {"torch", "numpy", *sys.stdlib_module_names}, f"{path.name} imports {name}"


def test_heavy_libraries_stay_behind_their_doors():
    for path in SOURCES:
        here = str(path.relative_to(ROOT / "audiolm"))
        for name in imported(ast.parse(path.read_text())):
            doors = DOORS.get(name.split(".")[0])
            assert doors is None or here in doors, f"{here} imports {name}"


def test_files_are_short():
    files = [*SOURCES, *(ROOT / "workflows").glob("*.py"), *(ROOT / "tests").rglob("*.py")]
    long = {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text().splitlines())) > 350}
    assert not long


def test_a_plan_needs_neither_torch_nor_ray():
    code = ("import sys, runpy; sys.argv = ['full_pipeline.py', '--dry-run', 'store=/nonexistent/audiolm']; "
            "runpy.run_path('workflows/full_pipeline.py', run_name='__main__'); "
            "print([m for m in ('torch', 'ray', 'mlflow', 'deepspeed') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]"), done.stdout
