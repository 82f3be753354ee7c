"""Builds that belong together: an index never pairs a build with what was made of another, and no command loads such a pair."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from audiolm import store
from audiolm.config.base import ConfigError
from audiolm.config.load import load_config
from audiolm.dag.ancestry import check_one_run
from audiolm.dag.execute import execute
from audiolm.dag.plan import plan, toposort
from audiolm.dag.run_index import left_out, steps_of, write_index
from audiolm.dag.step import Step
from audiolm.eval.suites.tokens import find_builds
from audiolm.generate.load import load, system_steps
from audiolm.tokenizers.codec_lookup import codec_folder
from audiolm.tokenizers.start import all_started
from audiolm.tracking.target import _with_checkpoint, _with_system, resolve
from tests.worlds.basics import ROOT

E2E = str(ROOT / "tests" / "e2e.yaml")


def work(config, inputs, out):
    store.put_json(store.join(out.path, "export", "config.json"), {})


def graph(codec_steps: int = 1) -> list[Step]:
    """A system's steps with their real names and inputs, which do nothing."""
    def step(name, *inputs, **config):
        return Step(name, work, config, inputs)

    manifest, kmeans, codec = (step("manifest"), step("kmeans"), step("codec", steps=codec_steps))
    z, y = step("semantic_tokens", manifest, kmeans), step("acoustic_tokens", manifest, codec)
    stages = [step("lm_semantic", manifest, z), step("lm_coarse", manifest, z, y), step("lm_fine", manifest, y)]
    return toposort([step("samples", manifest, kmeans, codec, z, y, *stages)])


def go(folder: str, steps: list[Step], **options) -> str:
    """Runs steps and writes the run's index as the driver does; returns its path."""
    cfg = load_config(E2E, [f"store={folder}", "tracking=none"])
    built = execute(plan(steps, folder, **options), folder, inline=True, force=options.get("force", ()))
    entries = {name: {"path": a.path, "build": a.build, "run_id": None} for name, a in built.items()}
    return write_index(cfg, entries, [s.name for s in steps])


@pytest.fixture
def mixed(tmp_path):
    """(index, old codec, new codec) of a run whose codec was made anew under the same name, and nothing that follows."""
    folder = str(tmp_path / "store")
    old = steps_of(go(folder, graph()))["codec"]
    index = go(folder, graph(codec_steps=2), only=["codec"])
    return index, old, steps_of(index)["codec"]


def ids(path: str) -> str:
    return ".".join(path.split("/")[-3:-1])


def test_an_index_leaves_out_what_was_made_of_another_build(mixed):
    index, old, new = mixed
    assert set(steps_of(index)) == {"manifest", "kmeans", "codec", "semantic_tokens", "lm_semantic"} and old != new
    assert set(left_out(index)) == {"acoustic_tokens", "lm_coarse", "lm_fine", "samples"}
    for reason in left_out(index).values():
        assert f"was made of codec {ids(old)}, not of {ids(new)}" in reason


def test_the_first_config_again_finds_its_own_builds_in_the_index(mixed):
    index, old, _ = mixed
    folder = index.removesuffix("/runs/e2e.json")
    assert go(folder, graph(), only=["codec"]) == index
    assert steps_of(index)["codec"] == old and set(steps_of(index)) == {s.name for s in graph()} and not left_out(index)


def test_every_command_names_both_builds(mixed):
    index, old, new = mixed
    both = rf"lm_coarse.*made of codec {re.escape(ids(old))}, not of {re.escape(ids(new))}"
    with pytest.raises(ValueError, match=both):  # generate, demo, publish, listening
        system_steps(index)
    with pytest.raises(ConfigError, match=both.replace("lm_coarse", "acoustic_tokens")):
        all_started(load_config(E2E, [f"start={index}"]))
    target = resolve(index, index.removesuffix("/runs/e2e.json"))
    assert "lm_coarse" not in target.steps and re.search(both, target.left_out["lm_coarse"])
    assert codec_folder(index) == new and find_builds(dict.fromkeys(("codec", "tokenizer", "residual", "vocoder")), index)


@pytest.mark.parametrize("read", [
    steps_of, system_steps, codec_folder, lambda i: all_started(load_config(E2E, [f"start={i}"])),
    lambda i: load({n: e["path"] for n, e in store.get_json(i)["steps"].items() if n != "acoustic_tokens"}, mean_run=1.0)])
def test_an_index_that_is_a_mixture_all_the_same_is_refused(mixed, read):
    """As another program or a copy of files may leave it. What joins the two need not be among what is loaded."""
    index, old, new = mixed
    found = store.get_json(index)
    found["steps"] |= {name: {"path": str(next(_folder(index, name).glob("*/0001/0001")))} for name in left_out(index)}
    store.put_json(index, found | {"left_out": {}})
    with pytest.raises(ValueError, match=rf"made of codec {re.escape(ids(old))}, not of {re.escape(ids(new))}"):
        read(index)


def _folder(index: str, step: str) -> Path:
    return Path(index).parents[1] / step


def test_builds_without_records_stand_as_a_published_system_does(tmp_path):
    check_one_run({"codec": f"{tmp_path}/small/codec", "lm_coarse": f"{tmp_path}/small/lm_coarse"})
    assert system_steps(str(ROOT / "audiolm" / "pretrained" / "small" / "small.json"))


def test_a_forced_build_leaves_what_followed_the_old_one_out(tmp_path):
    folder = str(tmp_path)
    go(folder, graph())
    index = go(folder, graph(), only=["kmeans"], force=["kmeans"])
    assert set(steps_of(index)) == {"manifest", "kmeans", "codec", "acoustic_tokens", "lm_fine"}
    assert "semantic_tokens" in left_out(index)["semantic_tokens"] and "0002" in left_out(index)["lm_semantic"]


def test_no_step_runs_on_a_mixture_and_the_advice_works(tmp_path):
    folder = str(tmp_path)
    go(folder, graph())
    go(folder, graph(), only=["codec"], force=["codec"])
    codec = graph()[2].fingerprint
    both = rf"samples would be made of builds .* codec {codec}.0001, and {codec}.0002 takes"
    with pytest.raises(ValueError, match=both) as e:
        plan(graph(), folder, only=["samples"], force=["samples"])
    names = re.search(r"--only (\S+)", str(e.value))[1].split(",")
    index = go(folder, graph(), only=names, force=["samples"])
    assert set(steps_of(index)) == {s.name for s in graph()} and not left_out(index)
    assert store.get_json(index)["steps"]["lm_semantic"]["build"].endswith(".0001")  # not of the codec: it stays


def test_a_step_does_not_run_beside_one_that_is_about_to_change(tmp_path):
    folder = str(tmp_path)
    go(folder, graph())
    with pytest.raises(ValueError, match="acoustic_tokens .* a new build takes its place.*--only codec,acoustic_tokens"):
        plan(graph(), folder, only=["codec", "samples"], force=["codec"])


def test_a_finished_build_for_these_inputs_is_taken_before_a_newer_one_for_others(tmp_path):
    """As when the newest codec is being repaired: the older one has its own tokens."""
    folder = str(tmp_path)
    go(folder, graph())
    go(folder, graph(), force=["codec"])
    store.remove(store.join(graph()[2].root(folder), "0002", "done.json"))
    found = {r.step.name: r.state.artifact for r in plan(graph(), folder, only=["kmeans"])}
    assert found["codec"].build.endswith("0001")
    assert found["acoustic_tokens"].record["inputs"]["codec"] == found["codec"].build


def test_a_registered_system_takes_of_its_runs_index_what_fits(mixed, tmp_path):
    index, old, _ = mixed
    system = {"index": index, "steps": {"codec": old, "lm_coarse": str(next(_folder(index, "lm_coarse").glob("*/0001/0001")))}}
    steps = _with_system(system)
    assert steps["codec"] == old and {"manifest", "kmeans", "semantic_tokens", "lm_semantic"} <= set(steps)
    go(str(_folder(index, "")), graph(2), only=["manifest"], force=["manifest"])
    assert set(_with_system(system)) == {"codec", "lm_coarse", "kmeans"}


def test_a_checkpoint_of_another_codec_is_refused(mixed):
    index, old, new = mixed
    build = next(_folder(index, "lm_coarse").glob("*/0001"))
    tags = {"audiolm.step": "lm_coarse", "audiolm.index": index, "uri": str(build / "0001"), "audiolm.build": str(build)}
    with pytest.raises(ValueError, match=f"trained on codec {ids(old)}, and .* now names {new}"):
        _with_checkpoint("models:/x/1", tags)
