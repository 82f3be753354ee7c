"""What a finished run left, as far as it must not depend on what happened on the way."""

from __future__ import annotations

import re
from typing import Any

from audiolm import store
from audiolm.dag.outputs import build_of
from audiolm.metrics_log import read_build

CLOCK = re.compile(r"seconds|step_s|units_per_s|x_realtime|^progress\.|^rtf/|^bytes$")  # facts and metrics that tell the time
# Files of an attempt, names that hash a path, and the times of the corpus's files, which a job has in a copy.
BY_PATH = re.compile(r"^filled-|^suites/|^scan/|^(rows|heard)\.json$|^listing\.(parquet|json)$")


def outcome(uri: str, run: str) -> dict[tuple, Any]:
    """{(kind, step, ...): value}: digests of files, facts, every metric of every row, the number of builds."""
    found: dict[tuple, Any] = {}
    for step, entry in store.get_json(store.join(uri, "runs", f"{run}.json"))["steps"].items():
        path, build = entry["path"], build_of(entry["path"])
        found["builds", step] = len([n for n in store.names(store.join(build, "..")) if n.isdigit()])
        facts = store.get_json(store.join(build, "done.json"))["facts"]
        found |= {("fact", step, k): v for k, v in facts.items() if not CLOCK.search(k)}
        for row in read_build(build):
            found |= {("row", step, row["step"], k): v if v == v else "nan" for k, v in row["metrics"].items()
                      if not CLOCK.search(k)}
        if step != "report":  # a page that shows times
            sizes = store.get_json(store.join(path, "files.json"))
            found |= {("file", step, k): v for k, v in sizes.items() if not BY_PATH.search(k)}
    return found


def differences(ours: dict[tuple, Any], calm: dict[tuple, Any]) -> tuple[list[tuple], list[tuple]]:
    """(lost, doubled): what is missing or another than in the undisturbed run, and what that one has not or once only."""
    lost = [k for k in calm if k not in ours or (ours[k] != calm[k] and k[0] != "builds")]
    doubled = [k for k in ours if k not in calm or (k[0] == "builds" and ours[k] > calm[k])]
    return lost, doubled


def made_again(uri: str) -> int:
    """Rows of metrics that more than one attempt of a build has written: updates that a death cost."""
    rows: dict[tuple, int] = {}
    for name in store.files(uri):
        if m := re.search(r"^(.*)/metrics-\d+\.jsonl$", name):
            for line in store.get(store.join(uri, name)).splitlines():
                if (step := re.match(rb'{"step": (\d+).*"loss"', line)):
                    rows[m[1], int(step[1])] = rows.get((m[1], int(step[1])), 0) + 1
    return sum(n - 1 for n in rows.values())
