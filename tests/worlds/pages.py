"""Checks of an HTML page: every tag is closed in order; texts and addresses are gathered."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "img", "br"}


class Checker(HTMLParser):
    """Every tag closed in order; gathers text and addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.tags, self.text = [], [], [], ""

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.addresses += [v for k, v in attributes if k in ("src", "href")]
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.text += data


def read(path: Path) -> Checker:
    checker = Checker()
    checker.feed((path / "ui" / "report.html").read_text())
    checker.close()
    assert checker.open == []
    return checker
