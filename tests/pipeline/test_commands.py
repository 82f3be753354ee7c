"""Every command that a page shows is run: the pipeline's here with --dry-run, the others in test_pipeline.py."""

from __future__ import annotations

import re
import shlex
import sys

import pytest

from audiolm.pipeline import cli
from tests.worlds.basics import ROOT
from tests.worlds.page_commands import ELSEWHERE, commands, elsewhere, ours
from workflows import full_pipeline


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
    argv = [a.removeprefix("/app/") for a in argv]  # the image's copy of this repository
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["full_pipeline.py", *argv, "--dry-run", f"store={tmp_path}", "tracking=none"])
    cli.main(full_pipeline.graph, default=ROOT / "workflows" / "scratch.yaml")
    assert re.search(r"\d+ of \d+ steps to run", capsys.readouterr().out)
