"""The whole pipeline as its users run it: a Ray job, submitted again; killed and continued; forced.

One Ray cluster and one whole run per session serve all of these.
"""

from __future__ import annotations

import ast
import glob
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from audiolm.dag.lease import Lease, is_dead
from audiolm.dag.plan import plan
from audiolm.metrics_log import read_build
from audiolm.store import get_json
from audiolm.tracking.lookup import index_of
from audiolm.train.rank import TrainJob
from tests.worlds.basics import ROOT
from tests.worlds.dying_worker import SETTINGS, graph, mortal
from tests.worlds.page_commands import ours
from tests.worlds.servers import MLflowServer, faulty_s3
from tests.worlds.training import train_on_two
from tests.worlds.whole_run import ENV, PIPELINE, STEPS, submit
from workflows import codec, evaluate, generate


def cli(*args, cwd=ROOT, check=True):
    done = subprocess.run([sys.executable, "workflows/full_pipeline.py", "tests/e2e.yaml", *args], cwd=cwd, env=ENV,
                          capture_output=True, text=True, timeout=420)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def index(store):
    return json.loads(Path(store, "runs", "e2e.json").read_text())["steps"]


def attempts(store) -> dict[Path, int]:
    """Every attempt at a build and when its record was last written."""
    return {p: p.stat().st_mtime_ns for p in Path(store).glob("*/*/*/attempts/*.json")}


def test_a_submitted_job_ends_with_sound_report_and_every_step_done(job):
    assert set(index(job)) == set(STEPS)
    samples = index(job)["samples"]["path"]
    entries = json.loads(Path(samples, "samples.json").read_text())
    assert len(entries) >= 6 and {e["mode"] for e in entries} == {"unconditional", "acoustic", "continuation", "resynthesis"}
    for e in entries:
        wav, rate = soundfile.read(io.BytesIO(Path(samples, e["file"]).read_bytes()))
        assert rate == 16_000 and len(wav) == round(e["seconds"] * rate)
        assert np.isfinite(wav).all() and np.abs(wav).max() > 1e-3
    continued = [e for e in entries if e["mode"] == "continuation"]  # a prompt of 3 s and 2 s more, or less by EOS
    assert len(continued) == 2 and all(e["prompt_s"] == 3.0 and (e["seconds"] == 5.0 or e["ended"]) for e in continued)
    report = Path(index(job)["report"]["path"], "ui", "report.html").read_text()
    assert report.count("<audio") >= 6 and "src=\"http" not in report
    rows = {(r["table"], r["item"]): r for r in
            json.loads(Path(index(job)["tables"]["path"], "rows.json").read_text())}
    assert "Table II: what is said" in report and rows["II", "original"]["value"] < 30  # WER of synthetic readers
    assert rows["detector", "original or continuation"]["value"] is not None and rows["IV", "stage 1"]["value"] is None


def test_the_same_job_with_an_edited_comment_skips_every_step(job, head, checkout):
    edited = checkout / "audiolm" / "models" / "rvq.py"
    edited.write_text(edited.read_text() + "\n# an edited comment\n")
    before = attempts(job)
    done = submit(head, checkout, *PIPELINE, f"store={job}")
    assert done.returncode == 0 and f"0 of {len(STEPS)} steps to run" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
    assert len(before) == len(STEPS) and attempts(job) == before  # no step was as much as begun


def test_a_relative_store_in_a_job_is_refused_with_the_fix(job, head, checkout):
    done = submit(head, checkout, *PIPELINE, "store=outputs")
    assert done.returncode != 0 and "give an absolute path" in done.stdout + done.stderr


def test_mlflow_holds_the_run(job):
    """A parent run and a nested one for each step, with params, metrics by step, tags and sound."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{job}/mlflow.db")
    experiment = client.get_experiment_by_name("audiolm")
    runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id], max_results=100)}
    assert set(STEPS) <= set(runs) and runs["e2e"].data.params["codec.n_q"] == "3"
    coarse = runs["lm_coarse"]
    assert coarse.info.status == "FINISHED" and coarse.data.params["lm.train.lr"] == "0.002"
    assert coarse.data.tags["mlflow.parentRunId"] == runs["e2e"].info.run_id
    assert {"fingerprint", "build", "path"} <= set(coarse.data.tags)
    assert len({m.step for m in client.get_metric_history(coarse.info.run_id, "loss")}) == 8
    names = [a.path for a in client.list_artifacts(runs["samples"].info.run_id, "wav")] or \
        [a.path for a in client.list_artifacts(runs["samples"].info.run_id)]
    assert any(n.endswith(".wav") for n in names), names
    assert "report.html" in [a.path for a in client.list_artifacts(runs["report"].info.run_id)]
    (version,) = client.search_model_versions("name = 'e2e'")  # of the whole run, and none of those that skipped all
    (answer,) = mlflow.pyfunc.load_model(version.source).predict([{"mode": "unconditional", "seconds": 0.5}])
    assert 0 < answer["seconds"] <= 0.5
    assert index_of(coarse.info.run_id, f"sqlite:///{job}/mlflow.db") == f"{job}/runs/e2e.json"


SMALL = {"generate.py": ["--seconds", "0.5", "--prompt-s", "0.5", "--samples", "1"], "evaluate.py": ["--suites", "stages"],
         "evaluate.py listening": ["--pairs", "1", "--prompt-s", "1", "--seconds", "1"],
         "codec.py evaluate": ["--clips", "1", "--seconds", "1", "--levels", "1"]}


@pytest.mark.parametrize(("page", "command"), [*ours("codec.py"), *ours("generate.py"), *ours("evaluate.py")])
def test_commands_run_on_the_end_to_end_run(page, command, desk, monkeypatch, capsys):
    command = command.split("python workflows/")[1].replace("models:/quickstart", "models:/e2e")
    program, *argv = shlex.split(command, comments=True)
    script = {"codec.py": codec, "generate.py": generate, "evaluate.py": evaluate}[program]
    plain = program != "evaluate.py" or argv[0] not in evaluate.COMMANDS
    small = SMALL.get(f"{program} {argv[0]}") or (SMALL.get(program, []) if plain else [])
    monkeypatch.chdir(desk)
    if "--score" in argv:  # a rater's answers to the page of the command before, under a name that the shell finds
        key = json.loads(Path("test", "key.json").read_text())
        Path("answers-1.json").write_text(json.dumps({"test": key["test"], "answers": dict.fromkeys(key["pairs"], "a")}))
        argv = [name for word in argv for name in sorted(glob.glob(word)) or [word]]
    assert script.main([*argv, *small]) == 0, capsys.readouterr()


@pytest.mark.parametrize("deaths", [(8,), pytest.param((4, 7, 10), marks=pytest.mark.long)])  # with checkpoints in between
def test_a_training_worker_that_was_killed_ends_with_the_losses_of_one_that_was_not(head, checkout, tmp_path, deaths):
    """kill -9 of one of Ray Train's two workers: the step is launched again and resumes; the same bits as undisturbed, without
    Ray."""
    store, calm = tmp_path / "store", str(tmp_path / "calm")
    done = submit(head, checkout, "tests/worlds/dying_worker.py", str(store), *map(str, deaths))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    lease = Lease(calm)
    train_on_two(TrainJob(mortal, {"died": "", "deaths": (), "seed": 0}, SETTINGS, {}, calm, lease.attempt, calm,
                          f"{calm}/metrics-0001.jsonl", 0, "cpu", 1, 16, False))
    lease.close("done")
    ours = plan(graph("", ()), str(store))[0].state.artifact
    assert len(list(store.glob("died-*"))) == len(deaths) == len(list(Path(ours.folder, "attempts").iterdir())) - 1
    assert ours.facts == get_json(f"{calm}/final.json")
    losses = [[(r["step"], r["metrics"]["loss"]) for r in read_build(folder) if "loss" in r["metrics"]]
              for folder in (ours.folder, calm)]
    assert losses[0] == losses[1] and len(losses[0]) == 12


HOLDER = """
import ray, sys
from ray.util import placement_group

class Holder:
    def hold(self):
        self.group = placement_group([{"CPU": 0.01}])
        ray.get(self.group.ready())
        return "group " + self.group.id.hex()

ray.init(namespace="held", log_to_driver=False)
holder = ray.remote(num_cpus=0)(Holder).options(lifetime="detached", name=sys.argv[1]).remote()
print(ray.get(holder.hold.remote()))
"""
JOINER = """
import ray, sys
from ray.util import placement_group_table
from audiolm.config.run import ClusterConfig
from audiolm.pipeline.ray_cluster import start_ray

start_ray(ClusterConfig(address="auto"), "", print)
print({name: group["state"] for name, group in placement_group_table().items()})
for name in sys.argv[1:]:
    ray.kill(ray.get_actor(name, "held"))
"""


def test_cpus_that_a_stopped_run_left_reserved_are_freed_and_no_one_elses(head, checkout):
    groups = []
    for name in ("full_pipeline.py", "other.py"):  # an actor that outlives its job holds them
        done = submit(head, checkout, "-c", HOLDER, name)
        groups.append(re.search(r"group (\w+)", done.stdout)[1])
    done = submit(head, checkout, "-c", JOINER, "full_pipeline.py", "other.py")
    assert done.returncode == 0 and "freed 1 placement group(s) that runs before left" in done.stdout, done.stdout + done.stderr
    states = ast.literal_eval(re.search(r"^\{.*\}$", done.stdout, re.M)[0])
    assert [states[group] for group in groups] == ["REMOVED", "CREATED"]


def kill_when(args, ready):
    """Starts the pipeline and kills it (SIGKILL) as soon as `ready()`."""
    process = subprocess.Popen([sys.executable, "workflows/full_pipeline.py", "tests/e2e.yaml", *args], cwd=ROOT, env=ENV,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.wait()


def first_attempt(store: Path, step: str) -> dict:
    return json.loads(next(store.glob(f"{step}/*/0001/attempts/0001.json")).read_text())


def test_killed_in_a_training_and_a_data_step_it_ends_the_same(job, tmp_path):
    """kill -9 of the driver in the middle; the same command ends with the job's tokens and losses, bit for bit.

    The job ran under Ray and these runs inline: the same bits there and here.
    """
    store = tmp_path / "store"
    args = ["--inline", f"store={store}", "tracking=none", "--only", "manifest,masked_model,kmeans,semantic_tokens"]
    kill_when(args, lambda: len(list(store.glob("masked_model/*/0001/commits/*.json"))) >= 2)
    assert not list(store.glob("masked_model/*/0001/done.json"))
    assert is_dead(first_attempt(store, "masked_model"))  # known at once: nobody waits until its lease has run out
    kill_when(args, lambda: len(list(store.glob("semantic_tokens/*/0001/0001/shard-*.parquet"))) >= 1)
    assert not list(store.glob("semantic_tokens/*/0001/done.json"))
    assert is_dead(first_attempt(store, "semantic_tokens"))
    kept = min(p.stat().st_mtime_ns for p in store.glob("semantic_tokens/*/0001/0001/shard-*.parquet"))
    cli(*args)
    steps = index(store)
    for name in ("masked_model", "semantic_tokens"):
        assert len(list(Path(steps[name]["path"], "../attempts").iterdir())) == 2
    assert min(p.stat().st_mtime_ns for p in Path(steps["semantic_tokens"]["path"]).glob("shard-*")) == kept  # not made anew
    for name in ("masked_model", "kmeans"):
        ours, theirs = (json.loads(Path(i[name]["path"], "../done.json").read_text())["facts"] for i in (steps, index(job)))
        assert {k: v for k, v in ours.items() if "seconds" not in k} == {k: v for k, v in theirs.items() if "seconds" not in k}
    shards = sorted(Path(steps["semantic_tokens"]["path"]).glob("shard-*.parquet"))
    assert len(shards) > 3
    for shard in shards:
        theirs = pq.read_table(Path(index(job)["semantic_tokens"]["path"], shard.name))
        assert pq.read_table(shard).equals(theirs)
    check_repair(args, steps, shards)


def check_repair(args: list[str], steps: dict, shards: list[Path]) -> None:
    """Flipped bits in a shard and an export, a lost shard and index: named, and made again to the same bytes, nothing else."""
    store, export = Path(args[1].removeprefix("store=")), Path(steps["masked_model"]["path"], "export", "model.safetensors")
    spoiled = [export, *shards[:2], shards[0].with_name("shards.parquet")]
    right = {p: p.read_bytes() for p in (*spoiled, *shards[2:])}
    for path in spoiled[:2]:
        data = bytearray(right[path])
        data[len(data) // 2] ^= 1
        path.unlink()  # a hard link would spoil its twin
        path.write_bytes(data)
    for path in spoiled[2:]:
        path.unlink()
    assert f"0 of {len(STEPS)} steps to run" in cli(*args).stdout  # nobody looked
    said = cli(*args, "--repair", "--dry-run").stdout
    assert "export/model.safetensors" in said and all(p.name in said for p in spoiled), said
    said = cli(*args, "--repair").stdout
    assert f"2 of {len(STEPS)} steps to run: masked_model, semantic_tokens\n" in said, said
    after = index(store)
    assert {n for n in steps if steps[n]["path"] != after[n]["path"]} == {"masked_model", "semantic_tokens"}
    assert all(steps[n]["build"] == after[n]["build"] for n in steps)
    for path, data in right.items():
        name = "masked_model" if path is export else "semantic_tokens"
        fresh = Path(after[name]["path"], *path.parts[-2:] if path is export else path.parts[-1:])
        assert fresh.read_bytes() == data
        assert (fresh.stat().st_nlink > 1) == (path not in spoiled)  # the others were taken over, not made
    assert "missing or damaged" not in cli(*args, "--repair", "--dry-run").stdout


def test_force_makes_a_step_and_its_descendants_new_and_nothing_else(job):
    before = {n: e["path"] for n, e in index(job).items()}
    below = {"acoustic_tokens", "lm_coarse", "lm_fine", "samples", "evaluate", "tables", "report"}
    plan = cli(f"store={job}", "--dry-run", "--force", "acoustic_tokens").stdout.splitlines()
    assert {line.split()[1] for line in plan if line.startswith("run")} == below
    plan = cli(f"store={job}", "--dry-run", "--force", "lm_coarse").stdout.splitlines()
    after_coarse = {"lm_coarse", "samples", "evaluate", "tables", "report"}
    assert {line.split()[1] for line in plan if line.startswith("run")} == after_coarse
    cli(f"store={job}", "--inline", "tracking=none", "--force", "acoustic_tokens")
    after = {n: e["path"] for n, e in index(job).items()}
    assert {n for n in STEPS if before[n] != after[n]} == below
    for name, pattern in (("acoustic_tokens", "*/shard-*.parquet"), ("lm_fine", "checkpoints/*/*")):
        old, new = ({p.stat().st_ino for p in Path(x[name]).parent.glob(pattern)} for x in (before, after))
        assert new and not old & new
    assert f"{len(STEPS)} of {len(STEPS)} steps done" in cli(f"store={job}", "--status").stdout


def test_ctrl_c_stops_cleanly_and_the_same_command_continues(tmp_path):
    store = tmp_path / "store"
    args = ["--inline", f"store={store}", "tracking=none", "--only", "manifest,masked_model",
            "semantic.model.train.steps=100",  # long enough to be stopped in, however late this process is served
            "semantic.model.train.eval_every=100"]
    process = subprocess.Popen([sys.executable, "workflows/full_pipeline.py", "tests/e2e.yaml", *args], cwd=ROOT, env=ENV,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))  # a shell's `&` has it ignored
    while not list(store.glob("masked_model/*/0001/commits/*.json")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command continues" in text and "Traceback" not in text
    assert first_attempt(store, "masked_model")["state"] == "stopped"
    cli(*args)
    assert len(list(store.glob("masked_model/*/0001/attempts/*.json"))) == 2 and "masked_model" in index(store)


def test_corpus_store_checkpoints_and_mlflows_artifacts_may_all_lie_on_an_s3_server(s3_server, tmp_path):
    """In a bucket of a real server; the second run skips all, by requests that grow with the steps and not with the files."""
    import s3fs
    from mlflow import MlflowClient

    place, steps = f"tests/{time.time_ns()}", "manifest,masked_model,kmeans,semantic_tokens,semantic_figures,lm_semantic"
    s3fs.S3FileSystem().put(str(ROOT / "workflows" / "quickstart" / "flac"), f"{place}/corpus", recursive=True)
    asked = []
    with faulty_s3(s3_server) as proxy:
        proxy.fault = lambda method, path, headers: asked.append(f"{method} {unquote(path)}")
        mlflow = MLflowServer(tmp_path, artifacts=f"s3://{place}/artifacts")
        mlflow.start()
        command = [sys.executable, "workflows/full_pipeline.py", "tests/e2e.yaml", "--inline", "--only", steps,
                   f"store=s3://{place}/store", f"corpus.sources.0.root=s3://{place}/corpus", f"tracking={mlflow.url}"]
        env = {**ENV, **{k: v for k, v in os.environ.items() if k.startswith("AWS_")}}
        try:
            for last in ("lm_semantic      DONE", f"0 of {len(STEPS)} steps to run"):
                asked.clear()
                done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=540)
                assert done.returncode == 0 and last in done.stdout, done.stdout + done.stderr
            client = MlflowClient(mlflow.url)
            runs = {r.info.run_name: r for r in client.search_runs([client.get_experiment_by_name("audiolm").experiment_id])}
            shown = [a.path for a in client.list_artifacts(runs["semantic_figures"].info.run_id)]
        finally:
            mlflow.kill()
    fs = s3fs.S3FileSystem(use_listings_cache=False)
    assert "semantic.json" in shown and any(p.endswith("semantic.json") for p in fs.find(f"{place}/artifacts"))
    assert fs.glob(f"{place}/store/lm_semantic/*/0001/checkpoints/*/export/model.safetensors")
    lists = [a for a in asked if a.startswith("GET") and "list-type=2" in a and "/store/" in a]
    assert 0 < len(lists) <= 3 * len(STEPS) < len(fs.find(f"{place}/store")), sorted(lists)
