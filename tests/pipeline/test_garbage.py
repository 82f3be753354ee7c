"""--gc: what nothing refers to goes, and never what is in use, shared, or being taken into use."""

from __future__ import annotations

import json

import pytest

from audiolm.config.load import load_config
from audiolm.dag import stored_builds
from audiolm.dag.execute import StepFailed, _claim, execute
from audiolm.dag.lease import LeaseLost, owner
from audiolm.dag.plan import plan
from audiolm.dag.run_index import write_index
from audiolm.dag.step import Step
from audiolm.pipeline import garbage
from audiolm.store import exists, files, get_json, join, put, put_json
from tests.worlds.basics import ROOT

TRUNK = {"recipe": "0" * 12, "forced": 0}


def config(store, *overrides):
    return load_config(str(ROOT / "tests" / "e2e.yaml"), [f"store={store}", "tracking=none", *overrides])


def graph(cfg) -> list[Step]:
    """Two steps whose outputs are a file each, of the config's seed."""
    def write(config, inputs, out):
        put(join(out.path, "x.bin"), bytes(1000))

    first = Step("first", write, {"seed": cfg.run.seed})
    return [first, Step("second", write, {}, (first,))]


def go(cfg, **options):
    """Runs the graph and writes the run's index, as the driver does; {step: build's folder}."""
    steps = graph(cfg)
    built = execute(plan(steps, cfg.store, **options), cfg.store, inline=True, force=options.get("force", ()))
    write_index(cfg, {n: {"path": a.path, "build": a.build, "run_id": None} for n, a in built.items()}, [s.name for s in steps])
    return {name: a.folder for name, a in built.items()}


def plant(store, step, digit, inputs=None, done=True, attempt=None, **record) -> str:
    """A build of another config; its folder."""
    fingerprint = digit * 12
    build = join(store, step, fingerprint, "0001")
    put_json(join(store, step, fingerprint, "recipe.json"), {})
    put_json(join(build, "build.json"), {"inputs": inputs or {}, "time": 0, **record})
    put_json(join(build, "attempts", "0001.json"), {**owner(), "state": "done", "beat": 0, **(attempt or {})})
    put(join(build, "0001", "x.bin"), bytes(1000))
    if done:
        put_json(join(build, "done.json"), {"inputs": inputs or {}, "attempt": 1, "facts": {}, "seconds": 1})
    return build


def collect(cfg, yes=False, days=-1.0):
    said = []
    garbage.collect(cfg, plan(graph(cfg), cfg.store), graph, days, yes, said.append)
    return said


@pytest.fixture
def no_margin(monkeypatch):
    monkeypatch.setattr(garbage, "QUIET_S", -5.0)  # S3 counts whole seconds


def test_what_nothing_refers_to_goes_and_the_run_skips_all_steps(store, no_margin):
    cfg = config(store)
    dropped = go(config(store, "run.seed=1"))  # of the same run's earlier config
    replaced = go(cfg)["second"]
    kept = list(go(cfg, force=["second"]).values())
    put(join(kept[0], "0009", "x.bin"), bytes(1000))  # of an attempt that died
    put(join(kept[0], "checkpoints", "00000003-0001", "x"), bytes(10))

    dead, alive = {"state": "running", "pid": 2**22 + 1}, {"state": "running"}
    half = plant(store, "second", "a", done=False, attempt=dead)
    kept += [plant(store, "first", "b"), plant(store, "second", "c", {"first": "b" * 12 + ".0001"}, done=False, attempt=alive)]
    kept += [plant(store, "tiny", d, trunk=TRUNK) for d in "de"]
    orphan = plant(store, "tiny", "f", trunk=TRUNK | {"forced": 1})
    kept += [plant(store, "codec", "9")]
    for build in (*kept[-3:-1], orphan):
        put(join(build, "checkpoints", "00000008-0001", "model.safetensors"), bytes(10))
        put_json(join(build, "commits", "00000008.json"), {"step": 8, "folder": "00000008-0001"})
    other = config(store, "run.name=other", f"codec.start.uri={kept[-1]}")
    write_index(other, {"tiny": {"path": join(kept[-3], "0001"), "build": "d" * 12 + ".0001", "run_id": None}}, ["tiny"])

    gone = {dropped["first"], dropped["second"], replaced, half, orphan}
    parts = {join(kept[0], "0009"), join(kept[0], "checkpoints", "00000003-0001")}
    said = collect(cfg)
    found = {join(store, line.split()[4]) for line in said if line.startswith("would remove")}
    assert found == gone | parts and "--yes" in said[-1] and "7 outputs" in said[-2], said
    assert all(exists(join(b, "build.json")) for b in gone)
    collect(cfg, yes=True)
    assert not any(files(path) for path in gone | parts) and all(exists(join(b, "build.json")) for b in kept)
    assert not files(join(store, "tiny", "f" * 12))
    assert collect(cfg, yes=True)[0].startswith("0 outputs")
    rows = plan(graph(cfg), store)
    assert not any(r.run for r in rows) and set(execute(rows, store, inline=True)) == {"first", "second"}


def test_nothing_goes_that_was_written_or_used_within_the_margin(tmp_path):
    cfg = config(tmp_path)
    go(config(tmp_path, "run.seed=1"))
    go(cfg)
    assert collect(cfg, yes=True)[0].startswith("0 outputs")


def test_a_run_that_begins_meanwhile_and_a_removal_see_each_other(store, monkeypatch):
    cfg = config(store)
    folders = go(cfg)
    build = stored_builds.stored_builds(store)["first", *folders["first"].split("/")[-2:]]
    later = build.written + 5
    rows = plan(graph(cfg), store)
    with monkeypatch.context() as m:  # the run comes between the two looks of a removal
        m.setattr(stored_builds, "listing", lambda f, listing=stored_builds.listing: {
            n: (s, later if n == "used.json" else at) for n, (s, at) in listing(f).items()})
        stored_builds.take_into_use([folders["first"]])
        assert not stored_builds.remove_build(build, later)
    assert get_json(join(folders["first"], "done.json")) == build.done and not plan(graph(cfg), store)[0].run
    put(join(folders["first"], "removed.json"), b"{}")  # of a number that is being removed no other build is made
    assert plan(graph(cfg), store)[0].state.newest_build == 1
    assert stored_builds.remove_build(build, later)
    with pytest.raises(StepFailed, match=f"{folders['first']} was removed by --gc.*the same command again"):
        execute(rows, store, inline=True)
    assert [r.run for r in plan(graph(cfg), store)] == [True, True]
    with pytest.raises(LeaseLost, match="removed by --gc meanwhile"):  # it was found unfinished, and claimed too late
        _claim(graph(cfg)[0], folders["first"], lambda: False, 0.1, print)


def test_what_a_registered_version_names_is_kept_until_it_is_deleted(ready, no_margin):
    from mlflow import MlflowClient

    cfg = config(ready).model_copy(update={"tracking": "sqlite"})
    go(cfg)
    made, build = plant(str(ready), "first", "a"), plant(str(ready), "lm_coarse", "b", {"first": "a" * 12 + ".0001"})
    client = MlflowClient(f"sqlite:///{ready}/mlflow.db")
    client.create_registered_model("e2e-lm_coarse")
    tags = {"uri": f"/elsewhere/lm_coarse/{'b' * 12}/0001/checkpoints/00000008-0001", "audiolm.step": "lm_coarse"}
    client.create_model_version("e2e-lm_coarse", str(ready), tags=tags)
    said = collect(cfg, yes=True)
    assert "0 outputs" in said[0] and "for registered versions alone" in said[0] and exists(made) and exists(build)
    client.set_model_version_tag("e2e-lm_coarse", "1", "pruned", "true")
    collect(cfg, yes=True)
    assert not exists(made) and not exists(build)
    broken = cfg.model_copy(update={"tracking": "http://127.0.0.1:9"})
    with pytest.raises(ValueError, match="http://127.0.0.1:9 must say which versions are registered"):
        collect(broken)


def test_a_run_whose_config_cannot_be_planned_keeps_what_is_unfinished(tmp_path, no_margin):
    cfg, store = config(tmp_path), str(tmp_path)
    go(cfg)
    half = plant(store, "second", "a", done=False, attempt={"state": "failed"})
    index = json.loads((tmp_path / "runs" / "e2e.json").read_text())
    put_json(join(store, "runs", "old.json"), index | {"run": "old", "config": {"unknown": 1}})
    said = collect(cfg, yes=True)
    assert exists(half) and any(line.startswith("run old cannot be planned") for line in said)
