"""What a run of the GPU command has found: one JSON and one table, both written whole after every figure.

Anchors are what was measured on one H100 (torch 2.11, CUDA 13): the plainest fast code that could be written beside this
project, or where `theirs` says so another project's.  They are set beside what runs at the paper's sizes on a GPU.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from tests.bench.figures import Figure, number


class Anchor(NamedTuple):
    """Someone's figure, and the goal for ours; of seconds the lower is the better one."""

    goal: float | None
    figure: float | None = None
    theirs: bool = False


ANCHORS = {
    "train semantic, torch": Anchor(350_000, 396_000),
    "train coarse, torch": Anchor(340_000, 386_000),
    "train semantic, deepspeed": Anchor(None, 380_000),
    "sample coarse, batch 1": Anchor(1_800, 1_824),
    "sample coarse, batch 16": Anchor(None, 17_686),
    "sample coarse, batch 64": Anchor(29_000, 29_441),
    "continue 7 s, batch 1": Anchor(2.5),
    "encode codec, C = 32": Anchor(8_000, 4_100, theirs=True),
    "train codec, C = 32, torch": Anchor(300, 260),
    "encode HuBERT-base": Anchor(7_000, 7_456),
}


class Report:
    """The items of a run in order, each with its figures; `out` is a folder."""

    def __init__(self, out: str | Path, machine: dict[str, str], compared: bool):
        self.out, self.machine, self.compared, self.items = Path(out), machine, compared, []
        self.out.mkdir(parents=True, exist_ok=True)

    def begin(self, part: str, name: str) -> None:
        self.items.append({"part": part, "name": name, "status": "running", "figures": []})
        self.write()

    def figure(self, figure: Figure) -> None:
        anchor = ANCHORS.get(figure.name, Anchor(None)) if self.compared else Anchor(None)
        beside = anchor.figure if anchor.figure is not None else anchor.goal
        lower = figure.unit == "s"
        ratio = beside and (beside / figure.value if lower else figure.value / beside)
        self.items[-1]["figures"].append({**figure._asdict(), "right": figure.right, "goal": anchor.goal,
                                          "anchor": anchor.figure, "theirs": anchor.theirs, "ratio": ratio})
        print(f"  {figure}", flush=True)
        self.write()

    def end(self, status: str, seconds: float, error: str | None = None) -> None:
        """Closes the newest item: done, failed (with the error), out of time or skipped (with the reason)."""
        item = self.items[-1]
        wrong = [f["name"] for f in item["figures"] if not f["right"]]
        if status == "done" and wrong:
            status, error = "wrong", f"beyond its bound: {', '.join(wrong)}"
        item |= {"status": status, "seconds": round(seconds, 2), **({"error": error} if error else {})}
        print(f"{item['part']}  {item['name']}: {status} in {seconds:.1f} s{f'  {error}' if error else ''}", flush=True)
        self.write()

    @property
    def good(self) -> bool:
        return all(item["status"] in ("done", "skipped") for item in self.items)

    def write(self) -> None:
        _whole(self.out / "gpu.json", json.dumps({"machine": self.machine, "items": self.items}, indent=1))
        _whole(self.out / "gpu.md", self.table())

    def table(self) -> str:
        """The figures as Markdown, a line each, and below them what went wrong."""
        lines = [", ".join(self.machine.values()), "",
                 "| part | what | measured | goal or bound | anchor | ratio |", "|---|---|---|---|---|---|"]
        for item in self.items:
            for f in item["figures"]:
                figure = Figure(*(f[name] for name in Figure._fields))
                goal = figure.bound or ("" if f["goal"] is None else number(f["goal"]))
                anchor = "" if f["anchor"] is None else number(f["anchor"]) + (" (others)" if f["theirs"] else "")
                measured = f"{number(figure.value)} {figure.unit}{'' if f['right'] else ' **wrong**'}".strip()
                ratio = f"{f['ratio']:.2f}" if f["ratio"] else ""
                lines.append(f"| {' | '.join((item['part'], figure.name, measured, goal, anchor, ratio))} |")
        for item in self.items:
            if item["status"] != "done":
                lines.append(f"\n{item['part']}, {item['name']}: {item['status']}. {item.get('error', '')}".rstrip())
        return "\n".join(lines) + "\n"


def _whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    aside = path.with_suffix(path.suffix + ".tmp")
    aside.write_text(text)
    os.replace(aside, path)
