"""The command line's error wrapper: one line, an exit status, no traceback."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from audiolm.config.base import ConfigError
from audiolm.dag.execute import StepFailed
from audiolm.pipeline.cli import main, run_command
from tests.worlds.basics import ROOT, free_port
from workflows import codec, evaluate, full_pipeline, generate

QUICKSTART = ROOT / "workflows" / "scratch.yaml"


@pytest.mark.parametrize(("error", "code", "line"), [
    (ConfigError("codec.n_q: 0"), 2, "error: codec.n_q: 0"), (FileNotFoundError("no x"), 2, "error: no x"),
    (StepFailed("cannot start Ray"), 2, "error: cannot start Ray"), (OSError("boom"), 2, "error: OSError: boom"),
    (KeyboardInterrupt(), 130, "stopped here")])
def test_an_error_is_one_line_and_an_exit_status(error, code, line, capsys):
    def command():
        raise error

    assert run_command(command, "stopped here") == code
    assert capsys.readouterr().err.strip() == line


def test_a_command_gives_its_own_exit_status():
    assert run_command(lambda: 1) == 1


def test_the_trace_of_a_job_has_no_credentials(capsys):
    def command():
        print("reads s3://key:hunter2@bucket/x")
        raise OSError("s3://key:hunter2@bucket/x is away")

    assert run_command(command, trace=True) == 2
    out, err = capsys.readouterr()
    assert out == "reads s3://***@bucket/x\n" and err.startswith("Traceback") and "in command" in err
    assert err.endswith("error: OSError: s3://***@bucket/x is away\n") and "hunter2" not in err.replace('raise OSError("', "")


SIGNED = "me:hunter2@127.0.0.1:{port}/x?X-Amz-Credential=hunter2&X-Amz-Signature=hunter2"
RUN_ID = "0123456789abcdef" * 2


def pipeline(*argv: str) -> int:
    """The pipeline's exit status."""
    before, sys.argv = sys.argv, ["full_pipeline.py", *argv]
    try:
        main(full_pipeline.graph, default=QUICKSTART)
        return 0
    except SystemExit as e:
        return e.code
    finally:
        sys.argv = before


@pytest.mark.parametrize("command", [
    lambda uri: pipeline("--dry-run", f"corpus.sources.0.root=https://{uri}"),
    lambda uri: pipeline("--dry-run", f"store=s3://{uri}"),
    lambda uri: pipeline("--only", "manifest", "--inline", "tracking=none", "store=memory://s", "corpus.protocols=[https]",
                         f"corpus.sources=[{{kind: manifest, name: m, uri: 'https://{uri}'}}]"),
    lambda uri: generate.main(["--run", RUN_ID, "--tracking", f"http://{uri}", "--mode", "unconditional", "--out", "o"]),
    lambda uri: evaluate.main([RUN_ID, "--tracking", f"http://{uri}"]),
    lambda uri: codec.main(["encode", f"https://{uri}", "--codec", f"https://{uri}", "--out", "out"])],
    ids=["root", "store", "Parquet", "server", "evaluate", "codec"])
def test_no_command_prints_the_credentials_of_a_uri(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    status, said = command(SIGNED.format(port=free_port())), "".join(capsys.readouterr())
    assert status != 0 and "hunter2" not in said and re.search(r"://\*\*\*@127.0.0.1", said), said


TWO_STEPS = """
import sys, time
from pathlib import Path
from audiolm.dag.step import Step
from audiolm.pipeline import cli

def one(config, inputs, out):
    import torch

def two(config, inputs, out):
    while "torch" not in sys.modules:
        time.sleep(0.001)
    import audiolm.train.loop

cli.start_ray = lambda *args: None  # these steps give no work to it
cli.main(lambda cfg: [Step("one", one, {}), Step("two", two, {})], default=Path())
"""


def test_two_steps_that_are_ready_at_once_import_torch_whole(tmp_path):
    """As in a run that is continued, whose driver has not imported it yet."""
    done = subprocess.run([sys.executable, "-c", TWO_STEPS, str(QUICKSTART), f"store={tmp_path}", "tracking=none"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "all 2 steps done" in done.stdout, done.stdout + done.stderr
