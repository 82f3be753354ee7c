"""The pages keep their promises: links and paths exist, the front page is short, the reading order is a short walk."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.worlds.basics import ROOT

PAGES = sorted(p for p in ROOT.rglob("*.md") if not {".ci-venv", ".venv", "outputs", ".pytest_cache"} & set(p.parts))
ENDINGS = ("py", "md", "yaml", "toml", "txt", "sh", "Dockerfile")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_paths_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    links = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    missing = [target for target in links if target and not (page.parent / target).exists()]
    for name in re.findall(r"`([\w./-]+)`", text):
        if name.endswith(ENDINGS) and not name.startswith("/") and not any(
                (folder / name).exists() for folder in (page.parent, ROOT, ROOT / "audiolm", ROOT / "workflows")):
            missing.append(name)
    assert not missing


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 9 * 1024


def test_the_reading_order_is_a_short_walk():
    page = (ROOT / "audiolm" / "README.md").read_text()
    section = page.split("## Read in this order")[1].split("\n## ")[0]
    files = [Path(name) for name in re.findall(r"^\d+\. `([\w/]+\.py)`", section, re.M)]
    assert 3 <= len(files) <= 6
    assert sum(len((ROOT / "audiolm" / f).read_text().splitlines()) for f in files) <= 1200
