"""The commands that the pages show, and a user's folder to run them in."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from audiolm import store
from audiolm.data.audio import wav_bytes
from tests.test_docs import PAGES
from tests.worlds.basics import HEADER, ROOT

OURS = [p for p in PAGES if p.name != "RESULTS.md"]
# Programs that are not ours, and where a test runs them against a real server.
ELSEWHERE = {"pip": ".ci/run", "pytest": ".ci/run", "mlflow": "tests/tracking/test_serve.py", "ray start": "tests/pipeline",
             **dict.fromkeys(("docker", "kubectl", "stack", "(umask", "do echo", "alias"), "tests/infra"),
             "export": "", "echo": "",
             "evaluate.py watch": "tests/eval_service/test_requests.py", "evaluate.py salmon": "tests/eval/salmon",
             "evaluate.py small": "tests/eval/test_zerospeech.py", "sh for-versa/versa.sh": "tests/eval/scorers/test_versa.py",
             "ruff": ".ci/run", "freeze.py": "tests/test_golden.py",
             "bench": "tests/bench", "demo.py": "tests/demo/test_page.py",
             "tests.tokenizers.test_pretrained": "tests/tokenizers/test_pretrained.py"}


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


def ours(program: str) -> list:
    """Parameters (page, command) of a program's commands."""
    return [pytest.param(page, c) for page, c in commands()
            if f"workflows/{program}" in c and not elsewhere(c.split("workflows/")[1])]


@pytest.fixture(scope="module")
def desk(job, tmp_path_factory) -> Path:
    """A user's folder: the run as ./outputs, a few recordings under the pages' names, an item file."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "outputs").symlink_to(job)
    index = store.get_json(f"{job}/runs/e2e.json")
    for name in ("quickstart", "piano", "piano-acoustic"):
        store.put_json(f"{job}/runs/{name}.json", index)
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
