"""Compiled code is kept in a folder of the user's own, found there by later processes, and a torn entry is no error."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import pytest

from audiolm.models.compiled import FOLDER, keep_compiled
from tests.worlds.basics import ROOT

# Hits and misses of a process that compiles one product and uses it.
CODE = """
import torch
from audiolm.models.compiled import keep_compiled
keep_compiled()
from torch._dynamo.utils import counters
x = torch.arange(6.0)
assert torch.equal(torch.compile(lambda x: x * 2 + 1)(x), x * 2 + 1)
print([sum(counters[c][f"{kind}_cache_{what}"] for c, kind in (("inductor", "fxgraph"), ("aot_autograd", "autograd")))
       for what in ("hit", "miss")])
"""


def compile_once(home):
    env = {k: v for k, v in os.environ.items() if k not in (FOLDER, "XDG_CACHE_HOME")}
    done = subprocess.run([sys.executable, "-c", CODE], env={**env, "HOME": str(home), "PYTHONPATH": str(ROOT)}, cwd=home,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    hits, misses = json.loads(done.stdout)
    return bool(hits), bool(misses)


def test_a_later_process_compiles_nothing_and_a_torn_entry_is_compiled_anew(tmp_path):
    assert compile_once(tmp_path) == (False, True)
    assert compile_once(tmp_path) == (True, False)
    folder = tmp_path / ".cache/audiolm/inductor"
    entries = [p for kind in ("fxgraph", "aotautograd") for p in (folder / kind).rglob("*") if p.is_file()]
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:20])
    assert entries and compile_once(tmp_path) == (False, True)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("given", [True, False])
def test_a_folder_that_is_given_stays_and_one_that_cannot_be_written_is_not_taken(given, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ("cache" if given else "file")))
    monkeypatch.delenv(FOLDER, raising=False)
    if given:
        monkeypatch.setenv(FOLDER, "/mine")
    keep_compiled()
    assert os.environ.get(FOLDER) == ("/mine" if given else None)
