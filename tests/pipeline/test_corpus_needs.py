"""What late steps need of the corpus is said once the manifest is there, before anything trains, with advice that works."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import soundfile as sf

from audiolm import store
from audiolm.config.base import ConfigError
from audiolm.config.load import load_config
from audiolm.dag.execute import StepFailed, execute
from audiolm.dag.plan import plan, toposort
from audiolm.dag.step import Step
from audiolm.data.clips import read_clips
from audiolm.data.manifest import build_manifest
from audiolm.generate import samples
from audiolm.pipeline import cli
from audiolm.pipeline.corpus_needs import check_config_needs, check_corpus_needs
from audiolm.pipeline.steps import FUNCTIONS
from tests.worlds.basics import HEADER, ROOT
from workflows.full_pipeline import graph

E2E = str(ROOT / "tests" / "e2e.yaml")


def folder(root, speakers: dict[str, int], seconds: float = 1.0, name: str = "f", **more: str) -> str:
    """Writes noise of named speakers, {name: files}; returns the source as YAML."""
    for n, (speaker, files) in enumerate(speakers.items()):
        (root / speaker).mkdir(parents=True, exist_ok=True)
        for i in range(files):
            wav = 0.1 * np.random.default_rng([n, i, len(name)]).standard_normal(int(seconds * 8000))
            sf.write(root / speaker / f"{i}.wav", wav, 8000)
    fields = {"kind": "folder", "name": name, "root": str(root), "speaker": "parent", **more}
    return "{" + ", ".join(f"{k}: {v}" for k, v in fields.items()) + "}"


@pytest.fixture
def check(recording_out):
    """check(sources, *overrides) -> (clips, remarks as one text); builds the manifest and looks at it as the driver does."""
    def run(sources: list[str], *overrides: str):
        cfg = load_config(E2E, [f"corpus.sources=[{', '.join(sources)}]", "semantic.kmeans.k=4", *overrides])
        store.remove(recording_out.path)
        build_manifest({"corpus": cfg.corpus, "seed": 0, "cluster": cfg.cluster}, {}, recording_out)
        steps = graph(cfg)
        check_config_needs(cfg, steps)
        return read_clips(recording_out.path), "\n".join(check_corpus_needs(cfg, steps, recording_out.path))

    return run


def follow(error: pytest.ExceptionInfo) -> str:
    """The override that an error says to set."""
    return re.search(r"set ([\w.]+=(\[[^]]*\]|[\w.]*\w))", str(error.value))[1]


EIGHT = dict.fromkeys("abcdefgh", 1)


def test_a_corpus_of_train_and_dev_takes_prompts_of_dev(check, tmp_path, monkeypatch):
    sources = [folder(tmp_path / "t", EIGHT, split="train"), folder(tmp_path / "d", {"x": 2}, 4.0, "d", split="dev")]
    clips, said = check(sources)
    assert {c.split for c in clips} == {"train", "dev"} and said.startswith("no test clip: prompts and what else is measured")
    assert "prompt_s" not in said
    asked = []
    monkeypatch.setattr(samples, "load", lambda *a: None)
    monkeypatch.setattr(samples, "pick_clips", lambda clips, *a: asked.append({c.split for c in clips}) or [])
    monkeypatch.setattr(samples, "read_clips", lambda path, split: [c for c in clips if c.split == split])
    cfg = load_config(E2E)
    settings = {"samples": cfg.samples, "seed": 0, "corpus": cfg.corpus}
    with pytest.raises(AttributeError):  # it has its prompts, and there is no system
        samples.make_mode("continuation", settings, {"manifest": ""}, 1, "", "cpu")
    assert asked == [{"dev"}]


def test_clips_shorter_than_a_prompt_are_said(check, tmp_path):
    clips, said = check([folder(tmp_path / "t", EIGHT)])
    assert {c.split for c in clips} == {"train", "dev", "test"}
    assert said == "no held-out clip lasts samples.prompt_s (3 s): prompts are whole clips, of at most 1 s"


@pytest.mark.parametrize("shares", [("corpus.dev=0",), ("corpus.dev=0", "corpus.test=0"), ("corpus.dev=0", "corpus.test=0.2")])
def test_no_dev_share(shares, check, tmp_path):
    source = [folder(tmp_path / "t", EIGHT)]
    with pytest.raises(ConfigError, match="semantic.where: the corpus has no dev clip, and masked_model needs some") as e:
        check(source, *shares)
    assert "dev" in {c.split for c in check(source, *shares, follow(e))[0]}


def test_one_recording(check, tmp_path):
    source = [folder(tmp_path / "t", {"a": 1}, 12.0)]
    with pytest.raises(ConfigError, match="masked_model needs some: there is one recording; set corpus.max_s=3") as e:
        check(source)
    clips, _ = check(source, follow(e))
    assert {c.split for c in clips} >= {"train", "dev"}
    with pytest.raises(ConfigError, match="one piece of audio from end to end; add recordings"):
        check([folder(tmp_path / "u", {"a": 1}, 1.0)])
    check([folder(tmp_path / "u", {"a": 2}, 1.0)])


@pytest.mark.parametrize(("field", "step"), [
    ("codec", "codec"), ("semantic", "masked_model"), ("lm.semantic", "lm_semantic"), ("lm.coarse", "lm_coarse"),
    ("lm.fine", "lm_fine")])
def test_a_filter_that_lets_no_dev_clip_through(field, step, check, tmp_path):
    sources = [folder(tmp_path / "a", {"a": 2}, 2.0, "lj"), folder(tmp_path / "b", EIGHT, 1.0, "libri")]
    with pytest.raises(ConfigError, match=rf"{field}.where: the corpus has no dev clip of lj, and {step} needs some") as e:
        check(sources, f"{field}.where.source=[lj]")
    assert follow(e) == f"{field}.where.source=[lj, libri]"
    check(sources, follow(e))


def test_a_filter_that_lets_no_train_clip_through(check, tmp_path):
    sources = [folder(tmp_path / "a", {"a": 2}, 2.0, "lj", split="dev"), folder(tmp_path / "b", EIGHT, 1.0, "libri")]
    with pytest.raises(ConfigError, match="codec.where: the corpus has no train clip of lj, and codec needs") as e:
        check(sources, "codec.where.source=[lj]")
    check(sources, follow(e))


def test_more_clusters_than_frames(check, tmp_path):
    source = [folder(tmp_path / "t", EIGHT)]
    with pytest.raises(ConfigError, match="semantic.kmeans.k is 1024, and the train clips have 150 frames.*: set it to 37"):
        check(source, "semantic.kmeans.k=1024")
    check(source, "semantic.kmeans.k=37")
    with pytest.raises(ConfigError, match=r"k in semantic.iterations \(of targets_2\) is 500"):
        check(source, "semantic.iterations=[{layer: 1, k: 500}]")


def test_samples_longer_than_a_stage_is_trained_on(check, tmp_path):
    source = [folder(tmp_path / "t", EIGHT)]
    with pytest.raises(ConfigError, match=r"prompt_s \(3\) and samples.seconds \(7\) are 10 s together, and lm.coarse is") as e:
        check(source, "samples.seconds=7")
    check(source, follow(e))


def test_a_layer_chosen_by_abx_needs_two_of_its_speakers_held_out(check, tmp_path):
    source = [folder(tmp_path / "t", EIGHT)]
    (tmp_path / "x.item").write_text(HEADER + "".join(f"{s} 0.1 0.2 a b c {s}\n" for s in "abc"))
    auto = ["semantic.kmeans.layer=auto", f"semantic.abx={{items: {tmp_path}/x.item, audio: [{tmp_path}/t]}}"]
    with pytest.raises(ConfigError, match=r"semantic.abx: .*hold at least two out with corpus.hold_out.dev=\["):
        check(source, *auto, "corpus.hold_out.dev=[a]")
    for s in "abc":
        (tmp_path / "t" / s / "0.wav").rename(tmp_path / "t" / s / f"{s}.wav")
    check(source, *auto, "corpus.hold_out.dev=[a, b]", "corpus.max_rejected=1")
    (tmp_path / "t" / "a" / "a.wav").rename(tmp_path / "t" / "a" / "gone.wav")
    with pytest.raises(ConfigError, match="semantic.abx.audio: 1 of the items' .* the first is a"):
        check(source, *auto, "corpus.hold_out.dev=[a, b]")


def test_only_what_is_going_to_run_is_asked_for(recording_out, tmp_path):
    cfg = load_config(E2E, [f"corpus.sources=[{folder(tmp_path / 't', {'a': 1}, 12.0)}]"])
    build_manifest({"corpus": cfg.corpus, "seed": 0, "cluster": cfg.cluster}, {}, recording_out)
    for name in ("manifest", "report", "semantic_tokens"):
        assert check_corpus_needs(cfg, [s for s in graph(cfg) if s.name == name], recording_out.path) == []


def test_an_error_about_an_artifact_stops_what_follows_and_keeps_it(tmp_path):
    ran = []

    def work(config, inputs, out):
        ran.append(out.step.name)

    first = Step("first", work)
    steps = toposort([Step("second", work, {}, (first,))])

    def finished(name, artifact):
        raise ConfigError("no dev clip")

    with pytest.raises(StepFailed, match="step first failed: ConfigError: no dev clip"):
        execute(plan(steps, str(tmp_path)), str(tmp_path), inline=True, finished=finished)
    assert ran == ["first"] and [str(r.state.status) for r in plan(steps, str(tmp_path))] == ["done", "missing"]


def test_the_driver_refuses_before_training_and_goes_on_after_the_fix(tmp_path, monkeypatch, capsys):
    source = folder(tmp_path / "t", {"a": 1}, 12.0)
    trained = []
    monkeypatch.setattr("audiolm.train.loop.train", lambda *a, **k: trained.append(1) or {})

    def pipeline(*more: str) -> int:
        monkeypatch.setattr(sys, "argv", ["full_pipeline.py", E2E, "--inline", "--only", "manifest,masked_model",
                                          f"store={tmp_path}/store", "tracking=none", f"corpus.sources=[{source}]", *more])
        try:
            cli.main(graph, default=ROOT / "workflows" / "scratch.yaml")
        except SystemExit as e:
            return e.code
        return 0

    for _ in range(2):  # with the manifest made, and with it there
        assert pipeline() == 1 and not trained
        assert "masked_model needs some: there is one recording; set corpus.max_s=3" in capsys.readouterr().out
    assert pipeline("corpus.max_s=3") == 0 and trained


LM = ["--only", "lm_semantic"]


@pytest.mark.parametrize(("gone", "only", "status", "line"), [
    ("unmounted", LM, 0, "'t' cannot be read .*does not exist.*; what runs now needs its tokens alone"),
    ("empty", LM, 0, "cannot be read .*no audio files under root"),
    ("removed", LM, 0, "1 files are gone; what runs now needs its tokens alone"),
    ("changed", LM, 1, "error: corpus 't' changed since its manifest was built .1 modified"),
    ("unmounted", ["--only", "lm_semantic,samples"], 1, "samples read its audio, and lm_semantic do not: .*--only lm_semantic"),
    ("unmounted", ["--only", "manifest"], 0, "nothing to do"),
    ("removed", ["--only", "samples"], 1, "changed since its manifest was built .1 removed")])
def test_a_corpus_that_is_gone_does_not_stop_the_language_models(gone, only, status, line, tmp_path, monkeypatch, capsys):
    root, ran = tmp_path / "t", []
    source = folder(root, EIGHT)
    monkeypatch.setattr("audiolm.eval.stage_gates.check_inputs", lambda *a: None)
    monkeypatch.setattr("audiolm.eval.stage_gates.check_stage", lambda *a: {})
    monkeypatch.setattr("audiolm.pipeline.steps.train_objective", lambda *a: ran.append("lm_semantic"))
    monkeypatch.setattr(sys, "argv", ["full_pipeline.py", E2E, "--inline", *only, f"store={tmp_path}/store", "tracking=none",
                                      f"corpus.sources=[{source}]", "corpus.name=t"])
    cfg = load_config(E2E, [f"corpus.sources=[{source}]"])
    manifest = Step("manifest", build_manifest, {"corpus": cfg.corpus, "seed": 0, "cluster": cfg.cluster})
    steps = [manifest, Step("lm_semantic", FUNCTIONS["train_lm"], {"stage": "lm_semantic"}, (manifest,),
                            trains=cfg.lm.semantic.train)]
    steps.append(Step("samples", lambda *a: None, {}, (manifest, steps[1]) if "lm" in only[1] else (manifest,)))
    execute(plan(steps, str(tmp_path / "store"), only=["manifest"]), str(tmp_path / "store"), inline=True)
    if gone in ("unmounted", "empty"):
        root.rename(tmp_path / "away")
    if gone == "empty":
        root.mkdir()
    if gone == "removed":
        (root / "a" / "0.wav").unlink()
    if gone == "changed":
        sf.write(root / "a" / "0.wav", np.zeros(9000), 8000)
    code = 0
    try:
        cli.main(lambda cfg: steps, default=ROOT / "workflows" / "scratch.yaml")
    except SystemExit as e:
        code = e.code
    said = "".join(capsys.readouterr())
    assert code == status and re.search(line, said), said
    assert ran == (["lm_semantic"] if status == 0 and only == LM else [])
