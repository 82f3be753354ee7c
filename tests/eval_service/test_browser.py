"""Asking in a real browser: the tag set by clicking on the version's page, the answer read there, the sound played."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.worlds.basics import ROOT
from tests.worlds.browser import PLAYED
from tests.worlds.registry import NAME
from tests.worlds.servers import MLflowServer
from tests.worlds.tiny_run import finish, tell


def test_a_person_asks_and_hears_the_answer(browser, world, encoded, tmp_path):
    server, folder, watcher = MLflowServer(tmp_path), str(tmp_path / "store"), None
    _, build = finish(world, folder)
    try:
        server.start()
        tell(server.url, folder, build)
        watcher = subprocess.Popen(
            [sys.executable, str(ROOT / "workflows/evaluate.py"), "watch", "--inline", "--work", str(tmp_path / "work"),
             "--tracking", server.url, "--store", folder, "--every", "1"], env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL)
        page = browser.new_context(viewport={"width": 1300, "height": 1800}).new_page()
        page.set_default_timeout(120_000)
        page.goto(f"{server.url}/#/models/{NAME}/versions/2", wait_until="commit")
        page.get_by_text("set the tag").wait_for()
        page.get_by_placeholder("Name").last.fill("evaluate")
        page.get_by_placeholder("Value").last.fill("requested")
        page.get_by_test_id("add-tag-button").click()
        link = page.get_by_role("link", name="report with sound and plots")
        for _ in range(60):
            page.wait_for_timeout(2000)
            page.reload(wait_until="commit")
            page.get_by_test_id("add-tag-button").wait_for()
            page.wait_for_timeout(500)
            if link.count():
                break
        page.screenshot(path=tmp_path / "version.png")
        assert "semantic stage" in page.get_by_role("table").first.inner_text()
        with page.expect_popup() as opened:
            link.click()
        report = opened.value
        report.locator("iframe").wait_for()
        inside = report.frame_locator("iframe")
        inside.locator("audio").first.wait_for()
        played = inside.locator("audio").evaluate_all(PLAYED)  # of the ladder and of the tables
        assert len(played) > 12 and all(played)
        assert all(inside.locator("img").evaluate_all("images => images.map(i => i.naturalWidth > 0)"))
        report.screenshot(path=tmp_path / "report.png")

        page.goto(f"{server.url}/#/models/{NAME}/versions/1", wait_until="commit")
        page.get_by_text("it can be neither loaded nor evaluated").wait_for()
        page.screenshot(path=tmp_path / "pruned.png")
    finally:
        if watcher:
            watcher.kill()
            watcher.wait()
        server.kill()
