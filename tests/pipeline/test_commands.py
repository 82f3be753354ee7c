"""Every command that a page shows is run: the pipeline's with --dry-run, the others on the end-to-end run of this session."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from audiolm import store
from audiolm.data.audio import wav_bytes
from audiolm.pipeline import cli
from tests.test_docs import PAGES
from tests.worlds.basics import HEADER, ROOT
from workflows import codec, evaluate, full_pipeline, generate

OURS = [p for p in PAGES if p.name != "RESULTS.md"]
SMALL = {"generate.py": ["--seconds", "0.5", "--prompt-s", "0.5", "--samples", "1"], "evaluate.py": ["--suites", "stages"],
         "codec.py evaluate": ["--clips", "1", "--seconds", "1", "--levels", "1"]}
# Programs that are not ours, and where a test runs them against a real server.
ELSEWHERE = {"pip": ".ci/run", "pytest": ".ci/run", "mlflow": "tests/tracking/test_serve.py", "ray start": "tests/pipeline",
             "docker": "tests/pipeline/test_infra.py", "kubectl": "tests/pipeline/test_infra.py", "export": "", "echo": "",
             "evaluate.py watch": "tests/eval_service/test_requests.py", "ruff": ".ci/run", "freeze.py": "tests/test_golden.py",
             "bench": "tests/bench"}


def commands() -> list[tuple[str, str]]:
    """(page, command) of every bash block; continued lines are one, && parts two."""
    found = []
    for page in OURS:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                found += [(str(page.relative_to(ROOT)), part.strip()) for part in line.split("&&")]
    return [(page, command) for page, command in found if shlex.split(command, comments=True)]


def elsewhere(command: str) -> bool:
    return any(f" {start} " in f" {command} " or command.startswith(start) or f"/{start}" in command for start in ELSEWHERE)


def ours(program: str) -> list[tuple[str, str]]:
    return [(page, c) for page, c in commands() if f"workflows/{program}" in c and not elsewhere(c.split("workflows/")[1])]


def test_every_command_is_run_here_or_elsewhere():
    known = ("python workflows/full_pipeline.py", "python workflows/generate.py", "python workflows/codec.py",
             "python workflows/evaluate.py", "ray job submit")
    assert not [(page, c) for page, c in commands() if not c.startswith(known) and not elsewhere(c)]
    assert all((ROOT / place).exists() for place in ELSEWHERE.values())
    files = [name for _, c in commands() for name in re.findall(r"(?:build|apply) -f (\S+)", c)]
    assert files and all((ROOT / name).exists() for name in files)


@pytest.mark.parametrize(("page", "command"), ours("full_pipeline.py"))
def test_pipeline_commands_plan(page, command, tmp_path, monkeypatch, capsys):
    argv = shlex.split(command, comments=True)
    argv = argv[next(i for i, a in enumerate(argv) if a.endswith("full_pipeline.py")) + 1:]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["full_pipeline.py", *argv, "--dry-run", f"store={tmp_path}", "tracking=none"])
    cli.main(full_pipeline.graph, default=ROOT / "workflows" / "quickstart.yaml")
    assert re.search(r"\d+ of \d+ steps to run", capsys.readouterr().out)


@pytest.fixture(scope="module")
def desk(job, tmp_path_factory) -> Path:
    """A user's folder: the run as ./outputs, a few recordings under the pages' names, an item file."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "outputs").symlink_to(job)
    index = store.get_json(f"{job}/runs/e2e.json")
    store.put_json(f"{job}/runs/quickstart.json", index)
    draw, rows = np.random.default_rng(0), []
    for speaker in range(2):
        tones = []
        for n, (phone, _) in enumerate(itertools.product("ab", range(3))):
            hz = {"a": 300, "b": 2500}[phone] * (1 + 0.03 * speaker)
            tones.append(0.3 * np.sin(2 * np.pi * hz * np.arange(4000) / 16_000) + 0.01 * draw.standard_normal(4000))
            rows.append(f"f{speaker} {n * 0.25:.2f} {n * 0.25 + 0.2:.2f} {phone} x y s{speaker}\n")
        for place in (f"LibriSpeech/dev-clean/f{speaker}.wav", f"recordings/{speaker}.wav", "a.wav", "clip.wav"):
            store.put(str(folder / place), wav_bytes(np.concatenate(tones)))
    (folder / "dev-clean.item").write_text(HEADER + "".join(rows))
    return folder


@pytest.mark.parametrize(("page", "command"), [*ours("codec.py"), *ours("generate.py"), *ours("evaluate.py")])
def test_commands_run_on_the_end_to_end_run(page, command, desk, monkeypatch, capsys):
    command = command.split("python workflows/")[1].replace("models:/quickstart", "models:/e2e")
    program, *argv = shlex.split(command, comments=True)
    script = {"codec.py": codec, "generate.py": generate, "evaluate.py": evaluate}[program]
    plain = program != "evaluate.py" or argv[0] not in evaluate.COMMANDS
    small = SMALL.get(f"{program} {argv[0]}") or (SMALL.get(program, []) if plain else [])
    monkeypatch.chdir(desk)
    assert script.main([*argv, *small]) == 0, capsys.readouterr()
