"""The configuration: what counts as identity, clear refusals, paths, and the four configs that ship."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Annotated, get_args

import pytest

from audiolm.config.base import Config, ConfigError, Later, flatten, identity
from audiolm.config.codec import CodecConfig, CodecMetricsConfig
from audiolm.config.external import AbxFilesConfig, SemanticMetricsConfig
from audiolm.config.lm import LMConfig, StageConfig
from audiolm.config.load import load_config
from audiolm.config.pipeline import Pipeline
from audiolm.config.run import ClusterConfig, RunConfig
from audiolm.config.semantic import SemanticConfig
from audiolm.config.tokens import TokensConfig
from audiolm.config.training import TrainConfig
from audiolm.dag.run_index import index_path
from audiolm.pipeline.cli import place
from audiolm.tracking.lookup import find_run
from tests.worlds.basics import ROOT

QUICKSTART = str(ROOT / "workflows" / "scratch.yaml")


def test_defaults_are_the_papers_numbers():
    codec, cfg, semantic = CodecConfig(), load_config(QUICKSTART), SemanticConfig()
    assert (codec.strides, codec.n_q, codec.vocab) == ((2, 4, 5, 8), 12, 1024)
    assert (codec.losses, codec.quantizer, codec.balance, codec.disc.stft_window) == ("soundstream", "ema", False, 1024)
    weights = codec.weights
    assert (weights.reconstruction, weights.feature, weights.adversarial, weights.waveform) == (1, 100, 1, 0)
    model, train = semantic.model, semantic.model.train
    assert (model.objective, model.dim, model.layers, model.heads, model.ff) == ("w2vbert", 1024, 24, 8, 4096)
    assert (model.augment.pitch, model.augment.noise, model.augment.reverb) == (0, 0, 0)
    assert (train.steps, train.batch, train.lr, train.warmup_steps) == (400_000, 2048, 2e-3, 25_000)
    assert (semantic.kmeans.layer, semantic.kmeans.k) == (12 + 7, 1024)
    stage = StageConfig(crop_s=30.0, train=TrainConfig(steps=1, batch=1, lr=1))
    assert (stage.layers, stage.dim, stage.heads, stage.ff) == (12, 1024, 16, 4096)
    assert (cfg.lm.semantic.crop_s, cfg.lm.coarse.crop_s, cfg.lm.fine.crop_s) == (30.0, 10.0, 3.0)
    assert (cfg.samples.temperature_semantic, cfg.samples.temperature_coarse, cfg.samples.temperature_fine) == (0.6, 0.8, 0.6)


def test_runtime_fields_leave_no_trace_and_later_ones_only_when_they_differ():
    class Old(Config):
        a: int = 1

    class New(Config):
        a: int = 1
        b: Annotated[int, Later(0)] = 0

    assert identity(New()) == identity(Old()) and identity(New(b=2)) == {"a": 1, "b": 2}
    assert identity({"cluster": ClusterConfig(workers=7), "x": 1}) == {"x": 1}
    assert "speeds" not in identity(TokensConfig()) and identity(TokensConfig(speeds=[0.9, 1.1]))["speeds"] == [0.9, 1.1]
    with pytest.raises(TypeError, match="identity of a set"):
        identity({"x": {1}})


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", ".", "", " ", "a\\\\b", "a\nb"])
def test_a_runs_name_is_one_files(name):
    for call in (lambda: RunConfig(name=name), lambda: index_path("/store", name), lambda: find_run(name, "/store")):
        with pytest.raises(ValueError, match="a run is called .* give a name without slashes"):
            call()


def test_a_runs_name_may_be_of_any_language():
    assert RunConfig(name="试验 №1 é a:b").name and index_path("/s", "it's 2.0") == "/s/runs/it's 2.0.json"


DECODER = "lm.decoder={train: {steps: 1, batch: 1, lr: 0.1}}"
DRAWN = DECODER.replace("{train", "{drawn: 1, train", 1)


@pytest.mark.parametrize(("override", "message"), [
    ("codec.nq=3", "codec.nq: Extra inputs are not permitted"),
    ("lm.coarse_levels=9", r"lm.coarse_levels \(9\) exceeds codec.n_q \(3\)"),
    ("codec.train.steps=0", "codec.train.steps: Input should be greater than or equal to 1 .*got 0"),
    ("codec.where.source=[nowhere]", "codec.where.source names .'nowhere'.; corpus.sources are .'quickstart'."),
    ("tokens.speeds=[0.9, 1]", "speeds has 1.0: give speeds from 0.5 to 2"),
    ("tokens.speeds=[0.9, 0.9]", "names one twice"),
    ("corpus.sources.3.root=x", "'3' is not one of the 1 items there"),
    ("codec", "not of the form a.b=c"),
    ("lm.fine.kind=frame", "lm.fine.kind is frame: only lm.coarse has frames as positions"),
    ("lm.coarse.replaced=0.2", "lm.coarse.replaced is 0.2, but a flat stage .*: set lm.coarse.kind=frame"),
    (f"codec.family=soundstream {DECODER}", "lm.decoder makes frames of the spectral codec"),
    (f"{DECODER} lm.lengths=false lm.conditioning=prefix", "lm.decoder hears the token of every frame"),
    (f"{DECODER} lm.ablation=acoustic", "lm.ablation makes sound without semantic tokens"),
    ("samples.guidance=2 lm.condition_dropout=0", "samples.guidance is 2, .*lm.condition_dropout is 0"),
    (f"{DRAWN} lm.coarse_levels=3", "lm.decoder.drawn needs a stage 2 that draws frames, .*lm.coarse.kind flat"),
    (f"{DRAWN} lm.coarse.kind=frame lm.coarse_levels=1", "to draw all codec.n_q=3 levels, .*is 1: set it to that"),
    ("semantic.model={spectrum: semitones, augment: {pitch: 0.5}}", "spectrum is semitones, .* and augment.pitch is for"),
    ("semantic.model={objective: hubert, spectrum: semitones, targets_cents: 300}", "and targets_cents is for the log-mels"),
    ("semantic.model={objective: w2vbert, targets_cents: 300}", "targets_cents is of HuBERT's MFCC targets, .*w2vbert"),
    ("lm.semantic.replaced=0.2", "lm.semantic.replaced is set: only lm.coarse has frames"),
    ("lm.coarse.own=0.2", "lm.coarse.own is 0.2, but a flat stage .*: set lm.coarse.kind=frame or lm.coarse.own=0"),
    ("lm.coarse.kind=frame lm.coarse.passes=2", "lm.coarse.passes is 2, and lm.coarse.own, .* is 0: set lm.coarse.own"),
    ("lm.semantic.passes=3", "lm.semantic.passes is 3, .*leave lm.semantic.passes out"),
    ("lm.coarse.kind=frame lm.coarse.own_from=2", "lm.coarse.own_from is 2, and lm.coarse.own, .* is 0: set lm.coarse.own"),
    ("lm.coarse.kind=frame lm.coarse.own=0.2 lm.coarse.own_from=999", "and the training ends at step .*: set it below"),
    ("lm.coarse.kind=frame lm.lengths=false lm.conditioning=prefix", "frame, but with lm.dedupe .*: set lm.lengths=true"),
])
def test_mistakes_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(QUICKSTART, re.split(r" (?=lm\.\w)", override))


def test_a_parallel_decoder_needs_the_token_of_every_frame_and_no_coarse_levels():
    assert load_config(QUICKSTART, ["lm.acoustic=parallel", "lm.coarse_levels=9"]).lm.acoustic == "parallel"
    load_config(QUICKSTART, ["lm.acoustic=parallel", "lm.lengths=false", "lm.dedupe=false"])
    with pytest.raises(ConfigError, match="lm.acoustic is parallel.*set lm.lengths=true or lm.dedupe=false"):
        load_config(QUICKSTART, ["lm.acoustic=parallel", "lm.lengths=false", "lm.conditioning=prefix"])


def test_paths_in_a_file_are_relative_to_it_and_those_of_overrides_to_the_working_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert load_config(QUICKSTART).corpus.sources[0].root == str(ROOT / "workflows" / "quickstart" / "flac")
    assert load_config(QUICKSTART, ["corpus.sources.0.root=here"]).corpus.sources[0].root == str(tmp_path / "here")
    assert load_config(QUICKSTART, ["codec.pretrained=here"]).codec.pretrained == str(tmp_path / "here")
    assert load_config(QUICKSTART, ["corpus.sources.0.root=s3://b/x"]).corpus.sources[0].root == "s3://b/x"


@pytest.mark.parametrize(("section", "field"), [
    ("tables: {asr: PATH}", lambda c: c.tables.asr), ("tables: {text_model: PATH}", lambda c: c.tables.text_model),
    ("tables: {probes: {sWUGGY: PATH}}", lambda c: c.tables.probes["sWUGGY"]),
    ("lm: {semantic: {crop_s: 1, train: {steps: 1, batch: 1, lr: 1}, warm_start: {uri: PATH}}}",
     lambda c: c.lm.semantic.warm_start.uri),
    ("semantic: {abx: {items: PATH, audio: [PATH, PATH]}}", lambda c: c.semantic.abx.audio[1]),
    ("semantic: {pretrained: {uri: PATH}}", lambda c: c.semantic.pretrained.uri), ("evaluate: {lyra: PATH}",
                                                                                 lambda c: c.evaluate.lyra)])
def test_every_path_of_a_file_is_relative_to_it_and_of_an_override_to_the_working_folder(section, field, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "configs" / "my.yaml"
    file.parent.mkdir()
    corpus = "corpus: {name: c, sources: [{kind: folder, name: f, root: audio}]}\n"
    file.write_text(corpus + section.replace("PATH", "models/x"))
    assert field(load_config(str(file))) == str(file.parent / "models" / "x")
    name, _, value = section.partition(":")
    override = f"{name}={value.replace('PATH', './y').strip()}"
    assert field(load_config(str(file), [override])) == str(tmp_path / "y")


NO_PATHS = {("Pipeline", "store"), ("Pipeline", "tracking"),  # relative to the working folder, as configs share a store
            ("LibriSpeechSource", "splits"), ("AbxConfig", "speakers"),  # only about a path
            ("SemanticMetricsConfig", "digest"), ("SemanticMetricsConfig", "speakers")}


def test_every_field_that_is_a_path_by_its_name_or_description_is_marked():
    """A field of text is taken for a path where its name or description has one of the words."""
    found = {}
    for model in models(Pipeline) | models(AbxFilesConfig) | models(SemanticMetricsConfig) | models(CodecMetricsConfig):
        for name, field in model.model_fields.items():
            words = set(re.findall("[a-z]+", f"{name} {field.description or ''}".lower()))
            if words & {"folder", "folders", "uri", "uris", "path", "file", "root", "items"} and "str" in str(field.annotation):
                found[model.__name__, name] = "_Path" in str(field.rebuild_annotation())
    assert {key for key, marked in found.items() if not marked} == NO_PATHS
    assert sum(found.values()) >= 15


def models(kind) -> set[type[Config]]:
    """Every section below a type."""
    if isinstance(kind, type) and issubclass(kind, Config):
        return {kind}.union(*(models(field.annotation) for field in kind.model_fields.values()))
    return set().union(*map(models, get_args(kind)))


def test_inside_a_job_relative_places_are_refused(monkeypatch):
    cfg = load_config(QUICKSTART)
    assert place(cfg).store.startswith("/")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match="working folder changes with each submission; give an absolute path"):
        place(cfg)
    with pytest.raises(ConfigError, match="sqlite needs a local store"):
        place(load_config(QUICKSTART, ["store=s3://b/x"]))
    with pytest.raises(ConfigError, match="relative; in a Ray job give sqlite:////absolute"):
        place(load_config(QUICKSTART, ["store=/x", "tracking=sqlite:///x.db"]))


def test_every_field_can_be_shown_as_a_parameter():
    params = flatten(load_config(QUICKSTART))
    assert params["lm.coarse.train.lr"] == "0.002" and params["corpus.sources.0.kind"] == "librispeech"
    assert all(isinstance(v, str) for v in params.values())


def test_the_papers_recipe_trains_what_the_defaults_say():
    paper = load_config(str(ROOT / "workflows" / "paper.yaml"))
    codec = CodecConfig(quantizer_dropout=1.0)  # the one default that is DAC's and not the paper's
    # the paper's stages have a prefix alone, which small ones do not learn to use: not a default
    lm = LMConfig(lengths=False, conditioning="prefix", condition_dropout=0.0, tied=False, centroids=False)
    assert (paper.semantic, paper.codec, paper.lm) == (SemanticConfig(), codec, lm)


@pytest.mark.parametrize("name", ["quickstart", "scratch", "small", "adapt", "speech", "piano", "paper"])
def test_the_configs_that_ship_pass_a_dry_run(name, tmp_path):
    done = subprocess.run([sys.executable, "workflows/full_pipeline.py", f"workflows/{name}.yaml", "--dry-run",
                           f"store={tmp_path}", "tracking=none"], cwd=ROOT, capture_output=True, text=True, check=True)
    steps = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("run")]
    assert len(steps) == {"piano": 14, "small": 17, "speech": 17, "adapt": 14}.get(name, 15)
    assert ("lm_fine" in steps) == (name in ("scratch", "paper"))
    assert ("lm_decoder" in steps) == (name in ("quickstart", "small", "adapt", "speech"))
    starts = [line.split()[1] for line in done.stdout.splitlines() if "starts from small.json" in line]
    trained = ["masked_model", "kmeans", "codec", "lm_semantic", "lm_coarse", "lm_decoder"]
    assert starts == (trained if name == "quickstart" else trained[1:] if name == "adapt" else [])
