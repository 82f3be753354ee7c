"""The command line's error wrapper: one line, an exit status, no traceback."""

from __future__ import annotations

import pytest

from audiolm.config.base import ConfigError
from audiolm.dag.execute import StepFailed
from audiolm.pipeline.cli import run_command


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
