"""A real browser, and a script that plays what a page holds."""

from __future__ import annotations

import os
import shutil

import pytest

PLAYED = """async players => {
    for (const a of players) { a.muted = true; await a.play(); }
    await new Promise(done => setTimeout(done, 400));
    return players.map(a => a.currentTime > 0 && a.error === null);
}"""


@pytest.fixture
def browser():
    """Chromium: CHROMIUM names it, or it is playwright's own or on the PATH."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    with playwright.sync_playwright() as p:
        places = [os.environ.get("CHROMIUM"), p.chromium.executable_path,
                  *map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))]
        found = next((place for place in places if place and os.path.exists(place)), None)
        if found is None:
            pytest.skip("no Chromium: playwright install chromium, or name one by CHROMIUM=/path")
        b = p.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu",
                                                           "--autoplay-policy=no-user-gesture-required"])
        yield b
        b.close()
