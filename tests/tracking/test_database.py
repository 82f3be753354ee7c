"""MLflow's SQLite database in its first seconds: several drivers, one of which is killed; one that is broken already."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest

from audiolm.tracking.client import connect, database_path
from audiolm.tracking.lookup import default_tracking
from audiolm.tracking.outbox import resolve
from tests.worlds.basics import ROOT

WAIT_S = 240.0


def _process(code):
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _tables(path) -> set[str]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=0.01)) as database:
        return {name for name, in database.execute("select name from sqlite_master")}


def _half_laid_out(folder) -> bool:
    """True while a database in a folder, whatever its name, is within one of its steps."""
    for path in folder.glob("mlflow.db*"):
        with contextlib.suppress(sqlite3.Error):  # locked, or a journal
            if any(name.startswith("_alembic_tmp") for name in _tables(path)):
                return True
    return False


def _kill_within_a_step(folder, do) -> None:
    """Kills a process that lays out a database in `folder` by the code `do` as it is within one of the steps."""
    process, until = _process(do), time.monotonic() + WAIT_S
    while not _half_laid_out(folder):
        assert time.monotonic() < until and process.poll() is None
    process.kill()
    process.communicate()


def test_drivers_that_begin_at_once_share_one_whole_database_though_one_was_killed(tmp_path):
    ours = f"from audiolm.tracking.client import connect\nprint(connect('sqlite:///{tmp_path}/mlflow.db').search_experiments())"
    _kill_within_a_step(tmp_path, ours)
    other = _process(ours)
    assert [e.name for e in connect(f"sqlite:///{tmp_path}/mlflow.db").search_experiments()] == ["Default"]
    said = other.communicate(timeout=WAIT_S)[0]
    assert other.returncode == 0 and "name='Default'" in said, said
    assert "runs" in (tables := _tables(tmp_path / "mlflow.db")) and not any("_alembic_tmp" in name for name in tables)


def test_a_database_that_mlflow_itself_laid_out_by_half_is_named_with_the_fix(tmp_path):
    path = tmp_path / "mlflow.db"
    _kill_within_a_step(tmp_path, f"from mlflow import MlflowClient\nMlflowClient('sqlite:///{path}').search_experiments()")
    with pytest.raises(ValueError, match=rf"{path} is laid out by half.*mv {path} {path}.broken"):
        connect(f"sqlite:///{path}")


def test_a_folder_in_the_databases_place_is_named_at_once(tmp_path):
    (tmp_path / "mlflow.db").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}/mlflow.db is no file: move it away"):
        connect(f"sqlite:///{tmp_path}/mlflow.db")


def test_a_store_below_a_folder_of_any_name_has_its_database_within(tmp_path, empty_database):
    for name in ("a?b", "p%41", "50%", "a#1", "x;y", "a::b", "[x]", "ü é", "a%3Fb"):
        folder = tmp_path / name / "out"
        uri, artifacts = resolve("sqlite", str(folder))
        assert database_path(uri) == f"{folder}/mlflow.db" and default_tracking(str(folder), None) == uri
        assert artifacts == (folder / "mlflow").as_uri()
        shutil.copy(empty_database, folder / "mlflow.db")
        client = connect(uri)
        client.create_experiment("e", artifact_location=artifacts)
        assert {row[0] for row in _rows(folder / "mlflow.db", "select name from experiments")} == {"Default", "e"}
        assert os.listdir(tmp_path) == [name]
        shutil.rmtree(tmp_path / name)


def _rows(path, query) -> list[tuple]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute(query).fetchall()
