"""The job of a requested evaluation: runs it and writes the results back onto the model version.

Metrics go to the version's model and a Markdown table into its description.  report.html and the tables go to an MLflow
run below the one that made the version; the description links to it.  An error ends the request as failed, with the
reason.  A job waits for an MLflow that is down; sending again adds nothing.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable
from typing import Any, TypeVar

from audiolm import store
from audiolm.eval.results import Result
from audiolm.eval.suites.base import SuiteReport
from audiolm.eval_service.request import DONE, FAILED, RESULT, Request, end_request, mark_running, read_request, runs_of
from audiolm.report.results_page import markdown
from audiolm.store import hide_credentials
from audiolm.tracking import client as mlflow_client
from audiolm.tracking.outbox import first_line, key, now_ms
from audiolm.tracking.registry import ASK, MODEL

MARK = "<!-- evaluation -->"  # in a description: what follows is the newest evaluation's
DESCRIPTION_CHARS = 5000  # MLflow's column
PATIENCE_S = 3600.0  # for an MLflow that does not answer

T = TypeVar("T")


def answer(client: Any, name: str, version: str, number: int, evaluate: Callable[[], SuiteReport]) -> bool:
    """Runs `evaluate` for request `number` of a version and writes the end onto it; False where it failed or has ended."""
    request = _patient(lambda: read_request(client, name, version))
    if request.number != number:
        return False  # the watcher ended it as lost
    _patient(lambda: mark_running(client, request))
    run_id = _patient(lambda: _open(client, request))
    try:
        report, at_ms = evaluate(), now_ms()
        _patient(lambda: _publish(client, request, run_id, report, at_ms))
        _end(client, request, run_id, "FINISHED", DONE, "")
        return True
    except BaseException as e:  # a job that is stopped (SystemExit) ends its request too
        status = "FAILED" if isinstance(e, Exception) else "KILLED"
        # a ValueError names its fix; of others the type says more than the text
        reason = f"{e}" if isinstance(e, ValueError) else "it was stopped" if status == "KILLED" else first_line(e)
        _end(client, request, run_id, status, FAILED, reason)
        if not isinstance(e, ValueError):
            raise
        return False


def _patient(fn: Callable[[], T]) -> T:
    """Calls MLflow, again and again where it does not answer: the results took hours, the server may take minutes."""
    until, wait = time.monotonic() + PATIENCE_S, 1.0
    while True:
        try:
            return fn()
        except Exception as e:  # noqa: BLE001  what its client raises depends on what fails
            if time.monotonic() > until or mlflow_client.refused(e):
                raise
            time.sleep(wait)
            wait = min(2 * wait, 30.0)


def _open(client: Any, request: Request) -> str:
    """The MLflow run of the job, found where an earlier try created it."""
    if found := runs_of(client, request):
        return found[0].info.run_id
    made_by = client.get_run(client.get_model_version(request.name, request.version).run_id).info
    tags = {"audiolm.evaluation": request.job, "model": request.uri, "mlflow.parentRunId": made_by.run_id}
    return client.create_run(made_by.experiment_id, tags=tags, run_name=request.job).info.run_id


def _end(client: Any, request: Request, run_id: str, status: str, state: str, reason: str) -> None:
    _patient(lambda: client.set_terminated(run_id, status))
    _patient(lambda: end_request(client, request, state, reason))


def _publish(client: Any, request: Request, run_id: str, report: SuiteReport, at_ms: int) -> None:
    """Sends metrics, files, the result's tag and the description. `at_ms`: one time stamp for every try, so that metrics
    which are sent again are one point."""
    version = client.get_model_version(request.name, request.version)
    step = int(request.tags["step"]) if request.tags.get("step", "").isdecimal() else 0
    results = {_key(r): r.value for r in report.rows if r.value is not None}
    for part in mlflow_client.metric_batches((k, v, at_ms, step, version.tags.get(MODEL)) for k, v in results.items()):
        client.log_batch(run_id, part)
    for file in ("report.html", "rows.json"):
        client.log_text(run_id, hide_credentials(store.get(store.join(report.folder, file)).decode()), file)
    client.log_text(run_id, hide_credentials(_csv(report.rows)), "rows.csv")
    client.set_model_version_tag(request.name, request.version, RESULT, run_id)
    experiment = client.get_run(run_id).info.experiment_id
    text = _described(version.description or "", request.number, f"#/experiments/{experiment}/runs/{run_id}", report.rows)
    client.update_model_version(request.name, request.version, text)


def _key(r: Result) -> str:
    return key(f"eval/{r.table}/{r.item}/{r.metric}".replace("%", "percent"))


def _csv(rows: list[Result]) -> str:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, list(rows[0].to_json()))
    writer.writeheader()
    writer.writerows(r.to_json() for r in rows)
    return sink.getvalue()


def _described(before: str, number: int, where: str, rows: list[Result]) -> str:
    """The description with the newest evaluation in place of an older one."""
    head = before.split(MARK)[0].replace(ASK, "").strip()
    links = f"**Evaluated** (request {number}): [report with sound and plots]({where}/artifacts/report.html), [run]({where})"
    start = f"{head}\n\n{MARK}\n{links}\n\n"
    # 100 characters to spare: masked credentials may be longer than the text they replace
    return hide_credentials(start + markdown(rows, DESCRIPTION_CHARS - len(start) - 100))[:DESCRIPTION_CHARS]
