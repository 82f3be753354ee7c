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

# For each line of its input a new process, which has the imports already, compiles one product and tells hits and misses.
CODE = """
import os, sys
import torch
from audiolm.models.compiled import keep_compiled
keep_compiled()
import torch._inductor.compile_fx
from torch._dynamo.utils import counters
for _ in sys.stdin:
    if os.fork() == 0:
        x = torch.arange(6.0)
        assert torch.equal(torch.compile(lambda x: x * 2 + 1)(x), x * 2 + 1)
        print([sum(counters[c][f"{kind}_cache_{what}"] for c, kind in (("inductor", "fxgraph"), ("aot_autograd", "autograd")))
               for what in ("hit", "miss")], flush=True)
        os._exit(0)
    if os.wait()[1]:
        break
"""


def compile_once(starter: subprocess.Popen) -> tuple[bool, bool]:
    starter.stdin.write("\n")
    starter.stdin.flush()
    hits, misses = json.loads(starter.stdout.readline())
    return bool(hits), bool(misses)


def test_a_later_process_compiles_nothing_and_a_torn_entry_is_compiled_anew(tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in (FOLDER, "XDG_CACHE_HOME")}
    env |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT),
            "TORCHINDUCTOR_VEC_ISA_OK": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # else programs that try the processor first
    with subprocess.Popen([sys.executable, "-c", CODE], env=env, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as starter:
        assert compile_once(starter) == (False, True)
        assert compile_once(starter) == (True, False)
        folder = tmp_path / ".cache/audiolm/inductor"
        entries = [p for kind in ("fxgraph", "aotautograd") for p in (folder / kind).rglob("*") if p.is_file()]
        for entry in entries:
            entry.write_bytes(entry.read_bytes()[:20])
        assert entries and compile_once(starter) == (False, True)
        starter.stdin.close()
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
