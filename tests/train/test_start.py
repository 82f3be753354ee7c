"""Starting from weights: the first model is the export, bytes are identity, misfits are named, frozen codes stay."""

from __future__ import annotations

import sys
from pathlib import Path

import fsspec
import pytest
import torch

from audiolm import store
from audiolm.config.base import ConfigError, identity
from audiolm.config.lm import StageConfig
from audiolm.config.load import load_config
from audiolm.config.semantic import AugmentConfig, MaskedModelConfig, W2vBertConfig
from audiolm.config.start import CodecStartConfig, StartConfig
from audiolm.config.training import TrainConfig
from audiolm.dag.run_index import index_path
from audiolm.models.mel import log_mel
from audiolm.pipeline import cli
from audiolm.tokenizers.artifact import read_export, write_export
from audiolm.tokenizers.start import find_export, start_weights
from audiolm.train.engine import make_engine
from audiolm.train.objectives import lm, masked, w2vbert
from audiolm.train.objectives.base import Context
from audiolm.train.objectives.codec import codec_start
from audiolm.train.objectives.masked_inputs import MaskedInputs
from tests.worlds import token_corpus
from tests.worlds.basics import ROOT
from tests.worlds.layouts import PAPER
from tests.worlds.syllables import CTX, Crops, syllables
from tests.worlds.tiny_codec import SPECTRAL, run, saved_state, tiny_codec, training, voice
from workflows import full_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
QUICKSTART = str(ROOT / "workflows" / "scratch.yaml")
SOURCES = {"ema": {}, "factorised": {"quantizer": "factorised"}, "spectral": SPECTRAL}


@pytest.fixture(scope="module")
def builds(tmp_path_factory) -> dict:
    """{quantizer: (folder, validation loss)} of tiny codecs after some training."""
    found = {}
    for name, changes in SOURCES.items():
        objective, engines = training(tiny_codec(steps=24, **changes))
        run(objective, engines, 0, 24)
        folder = str(tmp_path_factory.mktemp("store") / "codec" / name / "0001")
        write_export(folder, *objective.export())
        found[name] = folder, objective.evaluate()["loss"]
    return found


def starting(builds, name="ema", train="all", engine="torch", zero=0, saved=(), rank=0, world=1, **changes):
    """An adversarial codec training that starts from a build, and its engines."""
    settings = {"start_step": 1, "start": CodecStartConfig(uri=builds[name][0], train=train),
                "quantize_from": 0 if name == "spectral" else 9}
    codec = tiny_codec(engine=engine, zero=zero, **{**settings, **SOURCES[name], **changes})
    planned = start_weights("codec.start.uri", codec.start, "codec")
    return training(codec, *saved, rank=rank, world=world, start=codec_start(codec, planned))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


# -- the codec

@pytest.mark.parametrize("name", SOURCES)
def test_a_codec_begins_as_the_export_and_is_good_at_once(builds, name):
    objective, engines = starting(builds, name)
    weights, about, _ = read_export(builds[name][0])
    first, config = objective.export()
    assert same(first, weights) and {**config, "weights_sha256": about["weights_sha256"]} == about
    loss = objective.evaluate()["loss"]
    new, others = training(tiny_codec(**SOURCES[name]))
    run(new, others, 0, 1)  # without codebooks there is no loss
    assert loss == pytest.approx(builds[name][1], rel=1e-5)
    assert name == "spectral" or loss < 0.8 * new.evaluate()["loss"]  # that family is good before it is trained
    # Codebooks are in use from the first step on, whatever quantize_from says, and no k-means replaces them.
    objective.generator.net.quantizer.initialise = lambda *a, **b: pytest.fail("the codebooks started anew")
    metrics, = run(objective, engines, 0, 1)
    assert "commitment" in metrics and "codes_replaced" in metrics and not same(objective.export()[0], weights)


def test_every_rank_begins_alike(builds):
    one, two = (starting(builds, rank=rank, world=2)[0] for rank in (0, 1))
    assert all(same(one.modules[name].state_dict(), two.modules[name].state_dict()) for name in one.modules)


@pytest.mark.parametrize(("name", "engine", "zero"), [("ema", "torch", 0), ("factorised", "deepspeed", 1),
                                                      ("spectral", "torch", 0)])
def test_training_the_decoder_alone_keeps_the_tokens(builds, name, engine, zero, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    objective, engines = starting(builds, name, "decoder", engine, zero)
    wav_BT = torch.stack([voice(6400, i) for i in (9, 10)])
    before, (weights, *_) = objective.averaged().encode(wav_BT), read_export(builds[name][0])
    net = objective.generator.net
    parts = {n: v.clone() for n, v in net.state_dict().items()}
    metrics = run(objective, engines, 0, 4)
    assert ("adversarial" in metrics[-1]) == (name != "spectral") and "codes_replaced" not in metrics[-1]
    after, _ = objective.export()
    assert torch.equal(objective.averaged().encode(wav_BT), before)
    # In the export and in the model that trains alike: the decoder must learn on the codes that it will get.
    for now, then in ((after, weights), (net.state_dict(), parts)):
        assert {n for n in then if not torch.equal(now[n], then[n])} == {n for n in then if n.startswith("decoder.")}


@pytest.mark.parametrize(("train", "engine", "zero"), [("all", "torch", 0), ("decoder", "torch", 0),
                                                       ("decoder", "deepspeed", 1)])
def test_a_resume_goes_on_from_the_checkpoint_bit_for_bit(builds, train, engine, zero, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    whole, engines = starting(builds, "ema", train, engine, zero)
    run(whole, engines, 0, 2)
    saved = saved_state(engines)
    rest = run(whole, engines, 2, 4)
    again, resumed = starting(builds, "ema", train, engine, zero, saved)
    assert run(again, resumed, 2, 4) == rest
    assert all(same(engines[name].state(), resumed[name].state()) for name in engines)


def test_a_codec_of_other_sizes_is_refused_with_what_to_set(builds):
    with pytest.raises(ValueError, match=r"codec\.start\.uri: .*codec\.dec_channels is 6: set it to 4; codec\.n_q is 2: "
                                         r"set it to 3$"):
        codec = tiny_codec().model_copy(update={"dec_channels": 6, "n_q": 2})
        codec_start(codec, start_weights("codec.start.uri", StartConfig(uri=builds["ema"][0]), "codec"))
    with pytest.raises(ValueError, match=r"codec\.family is 'soundstream': set it to 'spectral'$"):
        codec_start(tiny_codec(), start_weights("codec.start.uri", StartConfig(uri=builds["spectral"][0]), "codec"))
    with pytest.raises(ValueError, match=r"codec\.spectral\.width is 24: set it to 16$"):
        codec = tiny_codec(**{**SPECTRAL, "spectral": {**SPECTRAL["spectral"], "width": 24, "iterations": 5}})
        codec_start(codec, start_weights("codec.start.uri", StartConfig(uri=builds["spectral"][0]), "codec"))
    weights, about, _ = read_export(builds["ema"][0])
    broken = store.join(builds["ema"][0], "broken")
    write_export(broken, {n: v for n, v in weights.items() if n != "encoder.0.conv.bias"}, about)
    with pytest.raises(ValueError, match=r"do not fit the codec: encoder\.0\.conv\.bias differ"):
        starting({"ema": (broken, 0)})
    planned = start_weights("codec.start.uri", StartConfig(uri=broken), "codec")
    write_export(broken, weights, about)
    with pytest.raises(ValueError, match="changed since this run was planned"):
        codec_start(tiny_codec(), planned)


# -- the masked models

def masked_setting(monkeypatch, objective: str, seed: int, start=None) -> object:
    """A masked objective by its factory, on syllables."""
    train = TrainConfig(steps=40, batch=4, lr=3e-3, engine="torch", warmup_steps=2)
    sizes = MaskedModelConfig(objective=objective, dim=32, layers=2, heads=2, ff=48, targets_k=12, mask_share=0.55, dropout=0.0,
                              augment=AugmentConfig(), train=train,
                              w2vbert=W2vBertConfig(codes=12, code_dim=8, negatives=8) if objective == "w2vbert" else None)
    held = {i: syllables(9000 + i, 2.0) for i in range(2)}
    sample = [(log_mel(syllables(i, 2.0)[None]), torch.tensor([50])) for i in range(4)]
    factory = {"hubert": masked, "w2vbert": w2vbert}[objective]
    monkeypatch.setattr(factory, "masked_inputs", lambda *a: (MaskedInputs(sizes, Crops(), held, CTX.seed), sample))
    torch.manual_seed(seed)
    config = {"model": sizes, "train": train, "iteration": None, "seed": CTX.seed, **({"start": start} if start else {})}
    return getattr(factory, {"hubert": "masked_objective", "w2vbert": "w2vbert_objective"}[objective])(config, {}, CTX)


@pytest.mark.parametrize("objective", ["hubert", "w2vbert"])
def test_a_masked_model_begins_with_the_encoder_and_new_heads(objective, monkeypatch, tmp_path):
    first = masked_setting(monkeypatch, objective, 1)
    first.model.encoder.statistics.mean.add_(1.0)  # of another corpus
    write_export(str(tmp_path), *first.export())
    planned = start_weights("semantic.model.start.uri", StartConfig(uri=str(tmp_path)), "masked_model")
    second, fresh = (masked_setting(monkeypatch, objective, 2, start) for start in (planned, None))
    assert same(second.model.encoder.state_dict(), first.model.encoder.state_dict())
    above = {n: v for n, v in second.model.state_dict().items() if not n.startswith("encoder.")}
    assert same(above, {n: v for n, v in fresh.model.state_dict().items() if n in above})
    _, about = first.export()
    write_export(str(tmp_path), first.export()[0], {**about, "encoder": {**about["encoder"], "layers": 3, "ff": 64,
                                                                                   "normalise": "clip"}})
    planned = start_weights("semantic.model.start.uri", StartConfig(uri=str(tmp_path)), "masked_model")
    with pytest.raises(ValueError, match=r"semantic\.model\.layers is 2: set it to 3; semantic\.model\.ff is 48: set it to 64; "
                                         r"semantic\.model\.normalise is 'corpus': set it to 'clip'"):
        masked_setting(monkeypatch, objective, 2, planned)


# -- the language models

@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return token_corpus.make(tmp_path_factory.mktemp("corpus"), {"train": [60] * 8, "dev": [40, 33]})


DEPTH = {"dim": 16, "layers": 2, "ff": 32}


def stage(corpus, name: str, seed: int, start=None, dedupe=False, coarse=2, **changes) -> lm.LMObjective:
    train = TrainConfig(steps=40, batch=8, lr=1e-2, warmup_steps=5, engine="torch")
    name, _, kind = name.partition(" ")
    sizes = {"dim": 32, "layers": 2, "heads": 2, "ff": 64, "kind": kind or "flat", "depth": DEPTH, **changes}
    shape = StageConfig(crop_s=0.8, dropout=0.0, train=train, **sizes)
    config = {"stage": name, "seed": seed, "lm": shape, "rows": 6,
              "layout": {**PAPER, "dedupe": dedupe, "coarse_levels": coarse},
              **({"start": start} if start else {})}
    return lm.lm_objective(config, corpus.paths, Context(0, 1, CPU, seed))


@pytest.mark.parametrize("name", ["lm_semantic", "lm_coarse", "lm_coarse frame", "lm_fine"])
def test_a_stage_begins_as_the_export(corpus, name, tmp_path):
    first = stage(corpus, name, 1)
    engines = {"lm": make_engine(first.modules["lm"], first.shape.train, first.ctx)}
    for step in range(25 if name == "lm_coarse" else 1):
        first.train_step(engines, [first.load(step, range(8))], step)
    write_export(str(tmp_path), *first.export())
    step = name.split()[0]
    planned = start_weights(f"lm.{step.removeprefix('lm_')}.start.uri", StartConfig(uri=str(tmp_path)), step)
    second = stage(corpus, name, 2, planned)
    assert same(second.export()[0], first.export()[0])
    if name == "lm_coarse frame":
        with pytest.raises(ValueError, match=r"lm\.coarse\.kind is 'flat': set it to 'frame'$"):
            stage(corpus, "lm_coarse", 2, planned)
        with pytest.raises(ValueError, match=r"lm\.coarse\.depth\.layers is 1: set it to 2; lm\.coarse\.dim is 64: .* 32$"):
            stage(corpus, name, 2, planned, dim=64, depth={**DEPTH, "layers": 1})
    if name == "lm_coarse":
        assert second.evaluate()["loss"] == first.evaluate()["loss"] < 0.97 * stage(corpus, name, 2).evaluate()["loss"]
        with pytest.raises(ValueError, match=r"lm\.coarse\.layers is 3: set it to 2; lm\.dedupe is True: set it to False; "
                                             r"lm\.coarse_levels is 1: set it to 2$"):
            stage(corpus, name, 2, planned, dedupe=True, coarse=1, layers=3)
        with pytest.raises(ConfigError, match=r"lm\.fine\.start\.uri: .*export of a 'lm_coarse'.*of a step lm_fine"):
            start_weights("lm.fine.start.uri", StartConfig(uri=str(tmp_path)), "lm_fine")


# -- the plan

def planned_steps(*overrides: str) -> dict:
    return {s.name: s for s in full_pipeline.graph(load_config(QUICKSTART, list(overrides)))}


def test_the_bytes_are_the_identity_wherever_they_are(builds, tmp_path):
    here, aside = builds["ema"][0], "memory://published/speech/codec"
    for file in ("model.safetensors", "config.json"):
        store.put(f"{aside}/export/{file}", store.get(f"{here}/export/{file}"))
    index = index_path(str(tmp_path), "speech")
    paths = {"codec": here, "masked_model": "/a", "masked_model_2": "/b"}
    store.put_json(index, {"steps": {name: {"path": path} for name, path in paths.items()}})
    assert find_export(index, "codec") == find_export(f"{here}/export/", "codec") == here
    assert find_export(index, "masked_model") == "/b"  # the last iteration
    prints = {planned_steps(f"codec.start.uri={place}")["codec"].fingerprint for place in (here, aside, index)}
    decoder = planned_steps(f"codec.start.uri={here}", "codec.start.train=decoder")["codec"].fingerprint
    other = planned_steps(f"codec.start.uri={builds['factorised'][0]}")["codec"].fingerprint
    assert len({*prints, decoder, other, planned_steps()["codec"].fingerprint}) == 4
    store.put(f"{aside}/export/config.json", store.get(f"{here}/export/config.json") + b"\n")
    assert planned_steps(f"codec.start.uri={aside}")["codec"].fingerprint not in prints
    fsspec.filesystem("memory").rm("/published", recursive=True)
    # Off: older recipes keep their fingerprints.
    cfg = load_config(QUICKSTART)
    assert all("start" not in identity(section) for section in (cfg.codec, cfg.semantic.model, cfg.lm.semantic, cfg.lm.fine))


@pytest.mark.parametrize("option", ["--dry-run", "--status"])
def test_the_plan_says_where_a_step_starts(builds, tmp_path, option, monkeypatch, capsys):
    index = index_path(str(tmp_path), "speech")
    store.put_json(index, {"steps": {"codec": {"path": builds["ema"][0]}}})
    monkeypatch.setattr(sys, "argv", ["full_pipeline.py", f"codec.start.uri={index}", option, f"store={tmp_path}"])
    cli.main(full_pipeline.graph, default=Path(QUICKSTART))
    line = next(row for row in capsys.readouterr().out.splitlines() if " codec " in f" {row} " and "starts from" in row)
    digest = read_export(builds["ema"][0])[2]
    assert line.endswith(f"starts from speech.json codec {digest[:8]}")


@pytest.mark.parametrize(("overrides", "message"), [
    (["codec.start.uri=/nowhere"], r"codec\.start\.uri: /nowhere holds no export/config.json .*: give a run's index"),
    (["lm.fine.start.uri=/nowhere/x.json"], r"lm\.fine\.start\.uri: there is no run index /nowhere/x\.json: give"),
    (["semantic.model.start.uri=INDEX"], r"semantic\.model\.start\.uri: .*no finished step masked_model, there are codec"),
    (["lm.semantic.start.uri=BUILD"], r"lm\.semantic\.start\.uri: .*export of a 'soundstream', .*step lm_semantic"),
    (["codec.start.uri=nope://x"], r"codec\.start\.uri: nope://x cannot be read \(ValueError: .*nope"),
    (["codec.start.uri=BUILD", "codec.pretrained=/x"], "codec: .*pretrained imports .* drop one"),
    (["semantic.model.start.uri=BUILD", "semantic.pretrained.uri=/x", "semantic.iterations=[]"], "semantic: .*model.start"),
    (["semantic.tokenizer.uri=BUILD", "semantic.pretrained.uri=/x"], "semantic: .*tokenizer takes .* drop them"),
    (["semantic.tokenizer.uri=BUILD"], r"semantic\.tokenizer\.uri: .*export of a 'soundstream'"),
    (["lm.semantic.start.uri=BUILD", "lm.semantic.warm_start.uri=/x"], "lm.semantic has warm_start.*drop one"),
])
def test_what_cannot_be_a_start_is_refused_by_the_plan(builds, tmp_path, overrides, message):
    index = index_path(str(tmp_path), "speech")
    store.put_json(index, {"steps": {"codec": {"path": builds["ema"][0]}}})
    places = {"INDEX": index, "BUILD": builds["ema"][0]}
    with pytest.raises(ConfigError, match=message):
        planned_steps(*(o.partition("=")[0] + "=" + places.get(o.partition("=")[2], o.partition("=")[2]) for o in overrides))


def test_a_run_does_not_start_from_itself(builds, tmp_path):
    index = index_path(str(tmp_path), "scratch")  # the run's name in the config
    store.put_json(index, {"steps": {"codec": {"path": builds["ema"][0]}}})
    with pytest.raises(ConfigError, match=r"codec\.start\.uri: .*own index.*run\.name=scratch-adapted"):
        planned_steps(f"codec.start.uri={index}", f"store={tmp_path}")
    assert planned_steps(f"codec.start.uri={index}", f"store={tmp_path}", "run.name=mine")["codec"].config["start"].digest


def test_one_start_is_handed_down_to_all_parts_that_say_none(builds, tmp_path):
    """Each part of the system goes on from there, and what is not in it begins from nothing, as with start: null."""
    index, ours = index_path(str(tmp_path), "speech"), builds["ema"][0]
    tokenizer = {"format": "x", "family": "masked-conformer", "k": 64}
    write_export(str(tmp_path / "kmeans"), {"centroids": torch.zeros(1)}, tokenizer)
    store.put_json(index, {"steps": {"codec": {"path": ours}, "kmeans": {"path": str(tmp_path / "kmeans")}}})
    steps = planned_steps(f"start={index}")
    begun = {name: step.config["start"].uri for name, step in steps.items() if "start" in step.config}
    assert begun == {"codec": ours, "kmeans": str(tmp_path / "kmeans"), "masked_model": str(tmp_path / "kmeans")}
    assert steps["kmeans"].config["kmeans"].start.frames == 16.0
    own = planned_steps(f"start={index}", f"codec.start={{uri: {builds['factorised'][0]}}}")
    assert own["codec"].config["start"].uri == builds["factorised"][0] and "start" in own["kmeans"].config
    taken = planned_steps(f"start={index}", f"semantic.tokenizer.uri={index}")
    assert taken["kmeans"].config["start"].digest == steps["kmeans"].config["start"].digest
    assert not taken["kmeans"].inputs and "masked_model" not in taken
    assert not [s for s in planned_steps("start=null").values() if "start" in s.config]
    with pytest.raises(ConfigError, match=r"start: /nowhere is no published system and no run's index: .*start=null"):
        planned_steps("start=/nowhere")
    with pytest.raises(ConfigError, match=r"^start: .*own index.*run\.name=scratch-adapted"):
        own = index_path(str(tmp_path), "scratch")
        store.put_json(own, store.get_json(index))
        planned_steps(f"start={own}", f"store={tmp_path}")


def test_relative_places_are_resolved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load_config(QUICKSTART, ["codec.start.uri=a/b", "semantic.model.start.uri=c", "lm.fine.start.uri=hf://u/r"])
    places = (cfg.codec.start.uri, cfg.semantic.model.start.uri, cfg.lm.fine.start.uri)
    assert places == (f"{tmp_path}/a/b", f"{tmp_path}/c", "hf://u/r")
