"""The quickstart as a job on a cluster of two nodes; the node that trains is killed on the way and joins again.

    python tests/bench/two_nodes.py                                    the whole of workflows/quickstart.yaml
    python tests/bench/two_nodes.py lm.decoder.train.steps=20          with overrides
    python tests/bench/two_nodes.py --compare --out /tmp/two           and a run without Ray, whose outputs must be the same

Two `ray start` on this machine, closed by a token; the job comes by `ray job submit`.  The store and MLflow's artifacts lie on
SeaweedFS, MLflow's rows in PostgreSQL (Debian's `postgresql`, psycopg2-binary; without them in SQLite, which is said).  It
prints when the killed step went on, when the new node worked, and what MLflow holds.  Exit status 1 where something is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from audiolm import store  # noqa: E402
from tests.bench.ray_node import Node, environment, listens, until  # noqa: E402
from tests.bench.soak.outcome import differences, outcome  # noqa: E402
from tests.worlds.basics import free_port  # noqa: E402
from tests.worlds.servers import MLflowServer, seaweedfs  # noqa: E402
from tests.worlds.whole_run import BIN  # noqa: E402

STORE, CONFIG = "s3://tests/store", "workflows/quickstart.yaml"
TRAININGS = ("masked_model", "codec", "lm_semantic", "lm_coarse", "lm_decoder")
JOB_S = 3 * 3600.0  # of a job on a busy machine
WORKED_S = 10.0  # of the training before its node is killed


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str | None]:
    """The URI of a new PostgreSQL; None, with the reason printed, where there is none on this machine."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    lacks = "" if programs else "apt-get install postgresql"
    lacks = lacks or ("" if find_spec("psycopg2") else "pip install psycopg2-binary")
    if lacks:
        print(f"MLflow on SQLite, as PostgreSQL is missing: {lacks}", flush=True)
        yield None
        return
    password, port, data = secrets.token_hex(16), free_port(), folder / "postgres"
    data.mkdir()
    (folder / "password").write_text(password)
    as_user = []
    if os.getuid() == 0:  # PostgreSQL refuses root
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        folder.chmod(0o755)
        for path in (data, folder / "password"):
            shutil.chown(path, "postgres", "postgres")
    subprocess.run([*as_user, f"{programs[-1]}/initdb", "-D", str(data), "-U", "audiolm", "-A", "scram-sha-256",
                    f"--pwfile={folder / 'password'}"], check=True, stdout=subprocess.DEVNULL, cwd=data)
    server = subprocess.Popen([*as_user, f"{programs[-1]}/postgres", "-D", str(data), "-p", str(port), "-h", "127.0.0.1", "-k",
                               str(data)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=data)
    try:
        until(lambda: listens(port), "PostgreSQL")
        yield f"postgresql+psycopg2://audiolm:{password}@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)  # without waiting for clients
        server.wait()


def work_of(step: str) -> set:
    """What a step has written to the store, without heartbeats and marks of its start."""
    return {(n, size) for n, size in store.files(f"{STORE}/{step}").items() if "attempts/" not in n and "filled-" not in n}


def kill_and_join(job: subprocess.Popen, head: Node, node: Node, folder: Path, env: dict[str, str]) -> Node:
    """Kills the second node while it trains, and starts it again; prints the times. Returns the new node."""
    def training() -> str | None:
        assert job.poll() is None, "the job ended before a training ran on the second node"
        return next((t.split(" ")[0] for t in node.tasks() if t.split(" ")[0] in TRAININGS), None)

    step = until(training, "a training on the second node", JOB_S)
    time.sleep(WORKED_S)
    others, before = head.tasks(), work_of(step)
    node.kill()
    killed = time.monotonic()
    print(f"killed the node that trains {step}, with {len(before)} files; the other node runs {', '.join(others) or 'nothing'}",
          flush=True)

    def join() -> Node:
        found = Node(folder, "second", env, 1, head.address)
        print(f"it joined again after {time.monotonic() - killed:.0f} s", flush=True)
        return found

    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(join)
        until(lambda: any(n.endswith("attempts/0002.json") for n in store.files(f"{STORE}/{step}")), f"{step} again", JOB_S)
        print(f"{step} was launched again {time.monotonic() - killed:.0f} s after its node was killed", flush=True)
        until(lambda: work_of(step) - before, f"{step} goes on", JOB_S)
        print(f"{step} wrote on {time.monotonic() - killed:.0f} s after its node was killed, once it had a CPU", flush=True)
        again = joining.result()
    until(lambda: again.tasks() or job.poll() is not None, "a task on the new node", JOB_S)
    print(f"the new node worked {time.monotonic() - killed:.0f} s after the other was killed: {again.tasks()}", flush=True)
    return again


def in_mlflow(url: str) -> tuple[int, int, int]:
    """(finished runs, unfinished runs, rows of metrics) that the server has."""
    import mlflow

    client = mlflow.MlflowClient(url)
    experiment = client.get_experiment_by_name("audiolm")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    finished = [r for r in runs if r.info.status == "FINISHED"]
    rows = sum(len(client.get_metric_history(r.info.run_id, k)) for r in finished for k in r.data.metrics)
    return len(finished), len(runs) - len(finished), rows


def run(folder: Path, out: Path, overrides: list[str], compare: bool) -> int:
    """The exit status of the job, or 1 where its outputs differ."""
    with seaweedfs(folder), postgres(folder) as backend:
        env = environment()
        server = MLflowServer(folder, backend, "s3://tests/mlflow")
        nodes = []
        try:
            server.start()
            nodes.append(head := Node(folder, "first", env, 1))
            nodes.append(second := Node(folder, "second", env, 1, head.address))
            began = time.monotonic()
            command = [sys.executable, "workflows/full_pipeline.py", CONFIG, f"store={STORE}", f"tracking={server.url}"]
            with (out / "job.log").open("wb") as log:
                job = subprocess.Popen([f"{BIN}/ray", "job", "submit", "--address", head.dashboard, "--working-dir", str(ROOT),
                                        "--", *command, *overrides], env=env, stdout=log, stderr=subprocess.STDOUT)
                nodes.append(kill_and_join(job, head, second, folder, env))
                status = job.wait(JOB_S)
            print(f"the job ended with {status} after {time.monotonic() - began:.0f} s", flush=True)
            finished, unfinished, rows = in_mlflow(server.url)
            print(f"MLflow on {'PostgreSQL' if backend else 'SQLite'}: {finished} runs finished, {unfinished} not; {rows} rows",
                  flush=True)
        finally:
            for node in nodes:
                node.kill()
            server.kill()
        return status or int(compare and not same(folder, overrides))


def same(folder: Path, overrides: list[str]) -> bool:
    """True where a run in one process, on a disk, has the same outputs."""
    uri = str(folder / "calm")
    subprocess.run([sys.executable, "workflows/full_pipeline.py", CONFIG, "--inline", f"store={uri}", "tracking=none",
                    *overrides], cwd=ROOT, env=environment(), check=True, stdout=subprocess.DEVNULL)
    calm = outcome(uri, "quickstart")
    lost, doubled = differences(outcome(STORE, "quickstart"), calm)
    print(f"of {len(calm)} files, facts and metrics of a run without faults {len(lost)} were lost and {len(doubled)} doubled: "
          f"{[*lost, *doubled][:10]}", flush=True)
    return not lost and not doubled


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("overrides", nargs="*")
    p.add_argument("--compare", action="store_true", help="with the outputs of a run without Ray")
    p.add_argument("--out", type=Path, default=Path("two_nodes"), help="the folder of the job's log")
    args = p.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends, too
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="two") as folder:  # short: the paths of Ray's sockets are bounded
        return run(Path(folder), args.out, args.overrides, args.compare)


if __name__ == "__main__":
    sys.exit(main())
