"""HuBERT's iterations as steps, layer and K chosen by ABX: the whole semantic side on the quickstart's audio, inline."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from audiolm.config.base import ConfigError
from audiolm.config.load import load_config
from audiolm.config.semantic import IterationConfig
from audiolm.data.clips import read_clips
from audiolm.tokenizers.semantic import load_extractor, load_semantic
from audiolm.train.objectives.base import Context
from audiolm.train.objectives.masked import masked_objective
from tests.worlds.basics import ROOT

STEPS = "manifest,masked_model,layers_2,targets_2,masked_model_2,layers,kmeans"
MODEL = ("{objective: hubert, dim: 16, layers: 2, heads: 2, ff: 24, targets_k: 8, crop_s: 2.0, mask_share: 0.55, "
         "train: {steps: 4, batch: 2, lr: 1.0e-3, eval_every: 2, save_every: 2, engine: torch}}")
AGAIN = ("[{layer: auto, k: 6, start: previous, "
         "train: {steps: 3, batch: 2, lr: 1.0e-3, eval_every: 3, save_every: 3, engine: torch}}]")


@pytest.fixture(scope="module")
def items(tmp_path_factory) -> str:
    """Every 0.2 s of each file is an item of one of four phones, whatever is said: no score is asserted."""
    path = tmp_path_factory.mktemp("items") / "quickstart.item"
    lines = ["#file onset offset #phone prev-phone next-phone speaker"]
    for file in sorted((ROOT / "workflows/quickstart/flac").rglob("*.flac")):
        speaker = file.stem.split("-")[0]
        lines += [f"{file.stem} {i * 0.2:.2f} {i * 0.2 + 0.2:.2f} {'ABCD'[i % 4]} x y {speaker}" for i in range(10)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def run(store: Path, items: str, *more: str, check: bool = True) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "workflows/full_pipeline.py", "workflows/scratch.yaml", "--inline", f"store={store}",
         "tracking=none",
         f"semantic.model={MODEL}", f"semantic.iterations={AGAIN}", "semantic.kmeans={layer: auto, k: auto, restarts: 1}",
         "semantic.sweep={k: [4, 6], top: 1, frames: 500, iterations: 5}",
         f"semantic.abx={{items: {items}, audio: [workflows/quickstart/flac]}}",
         "corpus.hold_out={dev: ['9007', '9008']}", *more],
        cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def built(items, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    run(store, items, "--only", STEPS)
    steps = json.loads((store / "runs" / "scratch.json").read_text())["steps"]
    return store, {name: Path(step["path"]) for name, step in steps.items()}


def facts(path: Path) -> dict:
    return json.loads((path.parent / "done.json").read_text())["facts"]


def test_every_iteration_is_a_step_and_the_choice_is_what_kmeans_uses(built):
    _, paths = built
    chosen, fitted = facts(paths["layers"]), facts(paths["kmeans"])
    assert (fitted["layer"], fitted["k"]) == (chosen["layer"], chosen["k"]) and chosen["k"] in (4, 6)
    first, targets = facts(paths["layers_2"]), facts(paths["targets_2"])
    assert targets["layer"] == first["layer"] in (1, 2) and targets["k"] == first["k"] == 6
    table = json.loads((paths["layers"] / "ui" / "layers.json").read_text())
    rows = [(row["layer"], row["k"]) for row in table["rows"]]
    assert rows[:3] == [(None, None), (1, None), (2, None)] and {k for _, k in rows[3:]} == {4, 6} and len(rows) == 5
    best = min(table["rows"][3:], key=lambda row: row["within"] + row["across"])
    assert table["choice"] == {"layer": best["layer"], "k": best["k"]}
    assert all(row["interval_within"][0] <= row["within"] <= row["interval_within"][1] for row in table["rows"])
    assert (paths["layers"] / "ui" / "layers.png").stat().st_size > 5000
    assert load_semantic(str(paths["kmeans"])).spec.vocab == chosen["k"]


def test_the_choice_is_made_on_speakers_that_nothing_was_trained_on(built):
    _, paths = built
    judged = set(json.loads((paths["layers"] / "ui" / "layers.json").read_text())["speakers"])
    trained = {c.speaker for c in read_clips(str(paths["manifest"]), "train")}
    assert judged and not judged & trained


def test_a_second_iteration_starts_where_the_first_ended_and_learns_its_own_targets(built):
    _, paths = built
    cfg = load_config(str(ROOT / "workflows" / "scratch.yaml"), [f"semantic.model={MODEL}", "semantic.kmeans.layer=1"])
    again = IterationConfig(start="previous", k=6)
    inputs = {name: str(paths[name]) for name in ("manifest", "masked_model", "targets_2")}
    begun = masked_objective({"model": cfg.semantic.model, "train": cfg.semantic.model.train, "iteration": again,
                              "where": cfg.semantic.where, "corpus": cfg.corpus, "seed": 0}, inputs,
                             Context(0, 1, torch.device("cpu"), 0))
    before = load_extractor(str(paths["masked_model"])).state()
    assert all(torch.equal(w, before[name]) for name, w in begun.model.encoder.state_dict().items())
    config = json.loads((paths["masked_model_2"] / "export" / "config.json").read_text())
    assert config["targets_k"] == 6 and facts(paths["masked_model_2"])["val.target_entropy"] > 0.2
    lines = [json.loads(line) for f in sorted(paths["masked_model_2"].parent.glob("metrics-*.jsonl")) for line in f.open()]
    assert any("val.alarm/constant_targets" in row["metrics"] for row in lines)


def test_what_is_done_is_not_done_again_and_one_step_can_be_forced(built, items):
    store, _ = built
    assert "0 of 19 steps to run" in run(store, items, "--only", STEPS).stdout
    plan = run(store, items, "--dry-run", "--force", "masked_model_2").stdout.splitlines()
    todo = [line.split()[1] for line in plan if line.startswith("run")]
    assert "masked_model_2" in todo and "layers" in todo and not {"masked_model", "layers_2", "targets_2"} & set(todo)


def test_abx_of_every_checkpoint_by_command(built, items, tmp_path):
    """The curve over the training; its end is the model that was left."""
    _, paths = built
    line = [sys.executable, "workflows/evaluate.py", "abx", "--items", items, "--audio", "workflows/quickstart/flac",
            "--features", "layer", "--model", str(paths["masked_model"]), "--json", str(tmp_path / "out.json")]

    def rows(*more: str) -> list[dict]:
        subprocess.run([*line, "--layer", "2", *more], cwd=ROOT, check=True, capture_output=True, timeout=120)
        return json.loads((tmp_path / "out.json").read_text())

    curve, (last,) = rows("--checkpoints", "--plot", str(tmp_path / "curve.png")), rows()
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert [row["name"] for row in curve] == ["layer 2, step 2", "layer 2, step 4"]
    assert curve[0]["within"] != curve[1]["within"] == last["within"]
    wrong = subprocess.run([*line, "--checkpoints"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2 and "--layer N" in wrong.stderr


def test_tuning_the_last_kmeans_leaves_the_iterations_alone(items, tmp_path):
    def prints(*more: str) -> dict[str, str]:
        return {line.split()[1]: line.split()[3] for line in run(tmp_path, items, "--dry-run", *more).stdout.splitlines()
                if line.startswith("run ")}

    before, after = prints(), prints("semantic.sweep.k=[4, 5, 6]", "semantic.kmeans.restarts=2", "tokens.dtype=bfloat16")
    changed = {name for name in before if before[name] != after[name]}
    assert {"layers", "kmeans", "semantic_tokens"} <= changed
    assert not changed & {"layers_2", "targets_2", "masked_model_2", "acoustic_tokens"}


def test_the_items_bytes_and_not_their_place_are_the_identity(items, tmp_path):
    def prints(path) -> list[str]:
        done = run(tmp_path / "none", str(path), "--dry-run")
        return [line.split()[3] for line in done.stdout.splitlines() if " layers" in line]

    moved, changed = tmp_path / "moved.item", tmp_path / "changed.item"
    moved.write_bytes(Path(items).read_bytes())
    changed.write_bytes(Path(items).read_bytes()[:-1])
    assert prints(items) == prints(moved) != prints(changed)


def test_what_cannot_be_chosen_is_refused_at_once(items, tmp_path):
    quick = str(ROOT / "workflows" / "scratch.yaml")
    for wrong, text in (("semantic.kmeans.layer=auto", "give semantic.abx.items"),
                        ("semantic.kmeans.layer=9", "layer 9 is not"), ("semantic.kmeans.k=auto", "at least two values"),
                        ("semantic.iterations=[{layer: 7}]", r"iterations.0: layer 7 is not one of model.layers \(4\)")):
        with pytest.raises(ConfigError, match=text):
            load_config(quick, [wrong])
    assert "semantic.abx.items" in run(tmp_path, str(tmp_path / "no.item"), "--dry-run", check=False).stderr
