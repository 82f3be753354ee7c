"""Evaluations by hand: a run, a checkpoint in its run's system, two side by side; kept figures; what is refused."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from audiolm import store
from audiolm.config.load import load_config
from audiolm.dag.run_index import GENERATION_STEPS
from audiolm.eval import generated
from audiolm.eval.results import Result
from audiolm.eval.suites.run import digest
from audiolm.report.results_page import build, markdown
from audiolm.tokenizers.artifact import write_export
from audiolm.tracking.tracker import Tracker
from tests.worlds.basics import ROOT
from tests.worlds.tiny_run import finish, tell

SCRIPT = str(ROOT / "workflows" / "evaluate.py")


@pytest.fixture(scope="module")
def made(request, tmp_path_factory, empty_database):
    """(folder, its tracking URI, build of lm_semantic) of a run that MLflow knows."""
    request.getfixturevalue("encoded")
    folder = tmp_path_factory.mktemp("store")
    (folder / "mlflow.db").write_bytes(empty_database.read_bytes())
    _, its = finish(request.getfixturevalue("world"), str(folder))
    tracker = tell("sqlite", str(folder), its)
    return str(folder), tracker.uri, its


def evaluate(capsys, *args) -> tuple[int, str]:
    main = runpy.run_path(SCRIPT)["main"]
    before = sys.argv
    try:
        code = main(list(args))
    finally:
        sys.argv = before
    said = capsys.readouterr()
    return code, said.out + said.err


def rows_of(folder: str) -> dict[tuple[str, str], Result]:
    return {(r["table"], r["item"]): Result(**r) for r in store.get_json(f"{folder}/rows.json")}


def test_a_run_is_evaluated_and_what_was_measured_is_kept(made, capsys, tmp_path):
    folder, _, _ = made
    some = ("--suites", "stages,ladder")
    code, said = evaluate(capsys, "tiny", "--store", folder, "--out", str(tmp_path / "a"), *some)
    assert code == 0, said
    rows = rows_of(tmp_path / "a")
    assert rows["losses", "semantic stage"].value > 0 and rows["levels", "fine stage, level 3"].value > 0
    assert rows["losses", "semantic stage: Kneser-Ney 2"].role == "baseline" and rows["conditioning", "coarse stage"].value > 0
    assert rows["ladder", "codec, 3 levels"].role == "ceiling" and rows["ladder", "continuation"].n == 2
    page = (tmp_path / "a" / "report.html").read_text()
    assert page.count("<audio ") == 12 and "Stage ladder" in page and "http" not in page.replace("http://www.w3", "")
    files = sorted(Path(folder, "evaluations", "cache").rglob("*.wav"))
    stamps = [f.stat().st_mtime_ns for f in files]
    assert evaluate(capsys, "tiny", "--store", folder, "--out", str(tmp_path / "b"), *some)[0] == 0
    assert rows_of(tmp_path / "b") == rows and [f.stat().st_mtime_ns for f in files] == stamps
    fewer = ("--out", str(tmp_path / "c"), "--suites", "ladder", "evaluate.clips=1")
    assert evaluate(capsys, "tiny", "--store", folder, *fewer)[0] == 0
    assert rows_of(tmp_path / "c")["ladder", "continuation"].n == 1


def test_a_published_folder_with_other_weights_is_measured_anew(tmp_path):
    steps, wavs = {"codec": str(tmp_path / "codec")}, {"clip": np.zeros(16, np.float32)}
    config = load_config(str(ROOT / "workflows" / "scratch.yaml"))
    spec = generated.SampleSpec("clip", "reader", None, "resynthesis", 0, 0)

    def keys(weight: float) -> tuple[str, str]:
        write_export(steps["codec"], {"weight": torch.full((1,), weight)}, {})
        return digest("wer", steps, config), generated._file_names(steps, wavs, 0, None)(spec)

    before, same, other = keys(0.0), keys(0.0), keys(1.0)
    assert before == same and not set(before) & set(other)


def test_a_checkpoint_is_evaluated_within_its_runs_system(made, capsys, tmp_path):
    folder, uri, its = made
    of = "models:/tiny-lm_semantic@"
    for name, target in (("run", "tiny"), ("best", f"{of}best"), ("latest", f"{of}latest")):
        code, said = evaluate(capsys, target, "--store", folder, "--tracking", uri, "--out", str(tmp_path / name),
                              "--suites", "stages")
        assert code == 0, said
    run, best, latest = (rows_of(tmp_path / name) for name in ("run", "best", "latest"))
    item = "losses", "semantic stage"
    assert best[item].value == run[item].value != latest[item].value  # the export is the checkpoint of step 2
    assert best["losses", "coarse stage"].value == latest["losses", "coarse stage"].value


def test_a_registered_system_is_evaluated(made, capsys, tmp_path):
    folder, uri, _ = made
    index = f"{folder}/runs/tiny.json"
    t = Tracker("sqlite", folder, "tests", "tiny")
    t.start({"run.name": "tiny"}, {"store": folder})
    t.serves(index, {n: e["path"] for n, e in store.get_json(index)["steps"].items() if n in GENERATION_STEPS})
    t.finish("FINISHED")
    code, said = evaluate(capsys, "models:/tiny/1", "--store", os.path.dirname(folder), "--tracking", uri, "--out",
                          str(tmp_path), "--suites", "stages")
    assert code == 0 and rows_of(tmp_path)["losses", "semantic stage"].value > 0, said


def test_two_checkpoints_stand_side_by_side(made, capsys, tmp_path):
    folder, uri, _ = made
    code, said = evaluate(capsys, "--compare", "models:/tiny-lm_semantic/2", "models:/tiny-lm_semantic/3", "--store", folder,
                          "--tracking", uri, "--out", str(tmp_path), "--suites", "ladder")
    assert code == 0, said
    page = (tmp_path / "report.html").read_text()
    assert page.count("<audio ") == 24 and "difference" in page
    for label, step in (("A", 2), ("B", 3)):
        assert f"{label}: tiny-lm_semantic, version {step} (lm_semantic at step {step})" in page
        assert f"a/test-0: {label}" in page


def test_what_cannot_be_evaluated_is_refused_with_the_reason(made, capsys):
    folder, uri, its = made
    for args, reason in (
            (["models:/tiny-lm_semantic/1"], "models:/tiny-lm_semantic/1: it was pruned: its weights are gone"),
            (["models:/tiny-lm_semantic/9"], "MLflow has no models:/tiny-lm_semantic/9"),
            (["models:/tiny-lm_semantic"], "give models:/NAME/VERSION"),
            (["tiny", "--suites", "stages,wer2"], "no suite wer2: there are stages, ladder"),
            (["nope"], "there is no run index"), ([], "one MODEL_URI_OR_RUN")):
        code, said = evaluate(capsys, *args, "--store", folder, "--tracking", uri)
        assert code == 2 and reason in said and "Traceback" not in said, said
    store.put_json(f"{its}/build.json", {"inputs": {"semantic_tokens": "other.0002"}})
    code, said = evaluate(capsys, "models:/tiny-lm_semantic/2", "--store", folder, "--tracking", uri)
    store.remove(f"{its}/build.json")
    assert code == 2 and "it was trained on semantic_tokens other.0002" in said


def test_a_suite_that_cannot_be_measured_stays_visible(made, capsys, tmp_path):
    folder, _, _ = made
    index = store.get_json(f"{folder}/runs/tiny.json")
    steps = {n: e for n, e in index["steps"].items() if n not in ("lm_coarse", "lm_fine")}
    store.put_json(f"{folder}/runs/young.json", {**index, "steps": steps})
    code, said = evaluate(capsys, "young", "--store", folder, "--out", str(tmp_path))
    assert code == 0 and "not measured: wer, wer: the run has not finished lm_coarse yet" in said
    rows = rows_of(tmp_path)
    assert rows["losses", "semantic stage"].value > 0
    assert rows["wer", "wer"].value is None and "not finished lm_coarse yet" in rows["wer", "wer"].note
    assert rows["ladder", "stage ladder"].value is None and "not finished lm_coarse yet" in rows["ladder", "stage ladder"].note
    code, said = evaluate(capsys, "young", "--store", folder, "--out", str(tmp_path / "x"), "--suites", "ladder")
    assert code == 2 and "nothing could be measured: the run has not finished lm_coarse yet" in said


def test_every_table_of_a_run_has_its_rows(made, capsys, tmp_path):
    folder, _, _ = made
    few = ("tables.utterances=2", "tables.n_speaker_train=1", "tables.n_speaker_test=1", "tables.n_continuations=4",
           "tables.net_steps=3", "tables.temperatures=[0.8]")
    code, said = evaluate(capsys, "tiny", "--store", folder, "--out", str(tmp_path), *few)
    assert code == 0, said
    rows = [Result(**r) for r in store.get_json(f"{tmp_path}/rows.json")]
    assert {r.table for r in rows} >= {"losses", "ladder", "I", "IV", "stage 2's attention", "temperatures"}
    notes = {r.table: r.note for r in rows if r.value is None}
    assert "semantic.abx=" in notes["I"] and "tables.probes=" in notes["IV"]
    assert all(r.seconds > 0 and r.n > 0 for r in rows if r.value is not None and r.table == "temperatures")
    page = (tmp_path / "report.html").read_text()
    assert "not measured" in page and "What stage 2 looks at" in page


def test_optional_suites_are_named(made, capsys, tmp_path, monkeypatch):
    folder, _, _ = made
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "speechmos" else find(name, *a))
    code, said = evaluate(capsys, "tiny", "--store", folder, "--out", str(tmp_path), "--suites", "ladder,dnsmos,mos,text,notes",
                          "tables.n_continuations=2", "samples.prompt_s=0.2")
    assert code == 0, said
    rows = [Result(**r) for r in store.get_json(f"{tmp_path}/rows.json")]
    notes = {r.table: r.note for r in rows if r.value is None}
    assert {r.table for r in rows} == {"ladder", "DNSMOS", "MOS", "Text", "Notes"} and "audiolm[eval]" in notes["DNSMOS"]
    assert "tables.mos_model=" in notes["MOS"]
    assert any("tables.text_model=" in r.note for r in rows) or "audiolm[eval]" in notes["Text"]
    page = (tmp_path / "report.html").read_text()
    assert "What continuations say" in page and "Piano: the notes" in page


def test_a_page_and_a_description_say_it_all():
    rows = [Result("II", "original | <b>", "WER %", 2.5, 2.0, 3.0, 40, role="ceiling", paper=2.5),
            Result("II", "ours", "WER %", None, paper=6.0, note="pip install 'audiolm[eval]'")]
    page = build("x <y>", [("ours", rows, [])])
    for said in ("2.500 [2.000, 3.000]", "original | &lt;b&gt; (ceiling)", "not measured", "6.0", "x &lt;y&gt;"):
        assert said in page
    text = markdown(rows, 4000)
    assert "| II: original \\| <b> (ceiling) | WER % | 2.500 [2.000, 3.000] | 2.5 | 40 clips |" in text
    assert "not measured: pip install" in text
    many = [Result("I", f"item {i}", "x", 1.0) for i in range(500)]
    assert len(markdown(many, 4000)) <= 4000 and "more rows in the report" in markdown(many, 4000)


def test_a_run_is_exported_for_versa(made, capsys, tmp_path):
    folder, _, _ = made
    few = ("--store", folder, "tables.n_continuations=2", "tables.utterances=2", "samples.prompt_s=0.2")
    call = ("export", "tiny", "--versa", str(tmp_path / "a"), *few)
    code, said = evaluate(capsys, *call)
    assert code == 0 and "continued/continuation: 2 sounds, pseudo_mos, speaker" in said, said
    files = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"continued", "utterances", "export.json", "versa.sh"}
    lost, edited = (next(p for p in files if p.suffix == end) for end in (".wav", ".yaml"))
    lost.unlink()
    edited.write_bytes(b"- name: pesq\n")
    assert evaluate(capsys, *call)[0] == 0
    assert edited.read_bytes() == b"- name: pesq\n"
    assert all(p.read_bytes() == data for p, (_, data) in files.items() if p != edited)  # whole again, and the same
    assert all(p.stat().st_mtime_ns == at for p, (at, _) in files.items() if p.suffix == ".wav" and p != lost)
    index = store.get_json(f"{folder}/runs/tiny.json")
    steps = {n: e for n, e in index["steps"].items() if n != "manifest"}
    store.put_json(f"{folder}/runs/bare.json", {**index, "steps": steps})
    for args, reason in (((*call, "tables.utterances=1"), "holds another export, of run tiny"),
                         (("export", "--versa", "b", *few), "one MODEL_URI_OR_RUN, got none"),
                         (("export", "bare", "--versa", "b", *few), "the run has not finished manifest")):
        code, said = evaluate(capsys, *args)
        assert code == 2 and reason in said and "Traceback" not in said, said


def test_a_run_is_exported_for_zerospeech(made, world, capsys, tmp_path):
    folder, _, _ = made
    call, sets = ("export", "tiny", "--zerospeech", str(tmp_path / "submission"), "--store", folder), tmp_path / "dev"
    wavs = sorted((world.root / "audio").iterdir())[:2]
    lines = [f"1,{wav.stem},v,3,{int(wav == wavs[0])}" for wav in wavs]
    for wav in wavs:
        store.put(str(sets / wav.name), wav.read_bytes())
    store.put(str(sets / "gold.csv"), "\n".join(["id,filename,voice,frequency,correct", *lines]).encode())
    index, probes = store.get_json(f"{folder}/runs/tiny.json"), f"tables.probes={{words: {sets}}}"
    steps = {n: e for n, e in index["steps"].items() if n != "lm_semantic"}
    store.put_json(f"{folder}/runs/mute.json", {**index, "steps": steps})
    for args, reason in ((call, "add tables.probes={"), ((*call, f"tables.probes={{a: {tmp_path}}}"), "neither gold.csv"),
                         (("export", "mute", *call[2:], probes), "cannot be scored: it has no lm_semantic")):
        code, said = evaluate(capsys, *args)
        assert code == 2 and reason in said and not (tmp_path / "submission").exists(), said
    code, said = evaluate(capsys, *call, probes)
    assert code == 0 and f"{tmp_path}/submission/sum/lexical/dev.txt" in said, said
    scores = (tmp_path / "submission/per-token/lexical/dev.txt").read_text().split()
    assert scores[::2] == [wav.stem for wav in wavs] and all(float(score) < 0 for score in scores[1::2])
