"""The codec in training: learning, resume, micro-batches, workers, the alarm, configs that cannot train."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

from audiolm import rng, store
from audiolm.config import codec as codec_config
from audiolm.config import corpus as corpus_config
from audiolm.tokenizers.acoustic import load_codec
from audiolm.tokenizers.artifact import ArtifactError, write_export
from audiolm.tokenizers.base import TokenSpec
from audiolm.train.objectives.base import Context
from audiolm.train.objectives.codec import codec_objective
from audiolm.train.objectives.levels import draw_levels, init_frames
from tests.worlds.tiny_codec import SPECTRAL, run, saved_state, tiny_codec, training, voice
from tests.worlds.training import of_two_ranks

RECIPES = {"ema": {}, "factorised": {"quantizer": "factorised"},
           "soundstream": {"losses": "soundstream", "weights": {"reconstruction": 1, "feature": 100}},
           "balanced": {"balance": True, "weights": {"reconstruction": 1, "waveform": 1, "feature": 2}}}
RECIPES |= {"spectral": SPECTRAL, "fsq": {**SPECTRAL, "quantizer": "fsq"}}


def recipe(name: str, start_step: int = 2, engine: str = "torch", zero: int = 0) -> codec_config.CodecConfig:
    plain = tiny_codec(start_step, engine=engine, zero=zero).model_dump()
    late = {} if name in ("spectral", "fsq") else {"quantize_from": 1}
    return codec_config.CodecConfig.model_validate({**plain, **late, **RECIPES[name]})


@pytest.mark.parametrize("name", ["ema", "factorised"])
def test_training_lowers_the_distance_and_the_export_gives_the_same_codes(tmp_path, name):
    objective, engines = training(tiny_codec(start_step=46, steps=50, **RECIPES[name]))
    first, = run(objective, engines, 0, 1)
    assert "discriminator" not in first and first["units"] == pytest.approx(4 * 3200 / 16_000)
    early = objective.evaluate()
    before = engines["discriminator"].state()
    run(objective, engines, 1, 46)
    untouched = engines["discriminator"].state()
    assert engines["discriminator"].updates == 0 and all(torch.equal(before[k], untouched[k]) for k in before)
    last = run(objective, engines, 46, 50)[-1]
    late = objective.evaluate()
    assert engines["discriminator"].updates == 4 and {"adversarial", "feature", "grad_norm/discriminator"} <= set(last)
    assert any(not torch.equal(before[k], v) for k, v in engines["discriminator"].state().items() if k in before)
    assert late["loss"] < 0.75 * early["loss"] and late["loss"] == late["mel/q02"]
    assert late["gain/q01"] == pytest.approx(late["mel/q00"] - late["mel/q01"])

    weights, sizes = objective.export()
    store.put(f"{tmp_path}/export/model.safetensors", safetensors.torch.save(weights))
    store.put_json(f"{tmp_path}/export/config.json", sizes)
    loaded, wav_BT, lengths_B = load_codec(str(tmp_path)), voice(6400, 9)[None], torch.tensor([6400])
    direct = objective.averaged().encode(wav_BT)[0]
    assert torch.equal(loaded.encode(wav_BT, lengths_B)[0], direct[:20]) and len(loaded.hash) == 16
    assert loaded.spec.n_q == 3 and loaded.spec.vocab == 16 and loaded.spec.rate_hz == 50
    store.put_json(f"{tmp_path}/export/config.json", {**sizes, "dim": 8})
    with pytest.raises(ArtifactError, match="do not fit the codec"):
        load_codec(str(tmp_path))


@pytest.mark.parametrize("name", ["spectral", "fsq"])
def test_a_spectral_codec_is_understood_at_once_and_learns_on(tmp_path, name):
    objective, engines = training(tiny_codec(steps=100, **RECIPES[name], code_decay=0.99))
    first, = run(objective, engines, 0, 1)
    early = objective.evaluate()
    assert first["units"] == pytest.approx(4 * 3200 / 16_000) and early["loss"] < 0.8 * early["mel/q00"]
    run(objective, engines, 1, 100)
    late = objective.evaluate()
    assert late["loss"] < 0.97 * early["loss"] and late["loss"] == late["mel/q02"]

    write_export(str(tmp_path), *objective.export())
    loaded, wav_BT, lengths_B = load_codec(str(tmp_path)), voice(6400, 9)[None], torch.tensor([6400])
    direct = objective.averaged()
    codes_TQ = loaded.encode(wav_BT, lengths_B)[0]
    assert torch.equal(codes_TQ, direct.encode(wav_BT)[0]) and loaded.spec == TokenSpec("spectral", 16_000, 320, 3, 16)
    assert torch.equal(loaded.decode(codes_TQ[None]), direct.decode(codes_TQ[None]))


@pytest.mark.parametrize("change", [{"balance": True}, {"quantize_from": 3}, {"quantizer": "factorised"},
                                    {"vocab": 17, "quantizer": "fsq"}, {"dim": 41}, {"n_q": 11, "quantizer": "fsq", "vocab": 32,
                                     "spectral": {**SPECTRAL["spectral"], "fsq": (2, 2, 2, 2, 2)}}])
def test_settings_that_a_spectral_codec_has_not_are_refused(change):
    plain = recipe("spectral").model_dump()
    with pytest.raises(ValueError, match=next(iter(change))):
        codec_config.CodecConfig.model_validate({**plain, **change})


def test_levels_that_do_not_help_raise_the_alarm():
    objective, engines = training(tiny_codec())
    assert "alarm/levels_without_gain" not in objective.evaluate()  # nothing is quantized yet
    run(objective, engines, 0, 1)
    net = objective.generator.net
    with torch.no_grad():
        net.quantizer.codebook_QND[1:] = 0.0
    assert objective.evaluate()["alarm/levels_without_gain"] == 2.0
    silent = {"mel/q00", "mel/q01", "mel/q02", "mel/unquantized", "gain/q01", "used/q00", "perplexity/q00"}
    assert silent <= set(objective.evaluate())


@pytest.mark.parametrize("engine", [("torch", 0), ("deepspeed", 0), ("deepspeed", 1)], ids=["torch", "zero0", "zero1"])
@pytest.mark.parametrize("name", RECIPES)
def test_resume_equals_an_uninterrupted_run(name, engine):
    whole, engines = training(recipe(name, 2, *engine))
    run(whole, engines, 0, 3)
    saved = saved_state(engines)
    rest = run(whole, engines, 3, 5)
    again, resumed = training(recipe(name, 2, *engine), *saved)
    assert run(again, resumed, 3, 5) == rest
    for key, value in saved_state(engines)[0].items():
        other = resumed[key].state()
        assert all(torch.equal(v, other[k]) for k, v in value.items())


@pytest.mark.parametrize("name", RECIPES)
def test_micro_batches_add_up_to_the_batch(name):
    one, engines = training(recipe(name, 0))
    run(one, engines, 0, 2)
    two, others = training(recipe(name, 0), *saved_state(engines))
    a, b = run(one, engines, 2, 3)[-1], run(two, others, 2, 3, pieces=2)[-1]
    for key, value in a.items():
        assert b[key] == pytest.approx(value, rel=1e-3), key
    books = [x.generator.net.quantizer.state_dict() for x in (one, two)]
    assert all(torch.allclose(v, books[1][k], atol=1e-3) for k, v in books[0].items())


TWO = [("ema", "torch", 0), ("balanced", "deepspeed", 0), ("ema", "deepspeed", 1), ("factorised", "deepspeed", 1),
       ("spectral", "torch", 0), ("fsq", "deepspeed", 1)]


def cases_of(rank, world, cases):
    """(case of TWO, [metrics of steps 1 to 3, validation, state]) of one of two workers."""
    for case, saved in cases.items():
        objective, engines = training(recipe(case[0], 2, *case[1:]), *saved, rank=rank, world=world)
        metrics = run(objective, engines, 1, 4)
        held_out, state = objective.evaluate(), saved_state(engines)[0]
        yield case, [metrics, held_out, {n: {k: v.numpy() for k, v in s.items()} for n, s in state.items()}]


@pytest.fixture(scope="module")
def one_and_two():
    """({recipe: metrics of steps 1 to 3, validation and objective of one worker}, {case of TWO: those of two, and state})."""
    one, saved = {}, {}
    for name in dict.fromkeys(case[0] for case in TWO):
        objective, engines = training(recipe(name))
        run(objective, engines, 0, 1)
        saved[name] = saved_state(engines)
        one[name] = run(objective, engines, 1, 4), objective.evaluate(), objective
    two = of_two_ranks(cases_of, {case: saved[case[0]] for case in TWO}, n=len(TWO), patience_s=120)
    return one, two


@pytest.mark.parametrize(("name", "engine", "zero"), TWO)
def test_two_workers_train_as_one(name, engine, zero, one_and_two):
    """Start and updates of the codebooks, discriminators and validation, on halves of the same batches."""
    expected, figures, one = one_and_two[0][name]
    metrics, held_out, state = one_and_two[1][name, engine, zero]
    for mine, theirs in zip(expected, metrics, strict=True):
        for key, value in mine.items():
            assert theirs[key] == pytest.approx(value, rel=2e-5 if "loss" in key else 1e-3, abs=1e-5), key
    for key, value in figures.items():
        if key.startswith("si_sdr_db"):  # as a ratio of amplitudes: at -42 dB rounding moves the decibels
            assert 10 ** (held_out[key] / 20) == pytest.approx(10 ** (value / 20), rel=1e-3, abs=1e-4), key
        else:
            assert held_out[key] == pytest.approx(value, rel=1e-3, abs=1e-3), key
    if name in ("ema", "spectral"):
        book = torch.from_numpy(state["generator"]["buffer/net.quantizer.codebook_QND"])
        assert torch.allclose(book, one.generator.net.quantizer.codebook_QND, atol=1e-5)


def test_compiled_and_in_bfloat16_as_on_a_gpu(monkeypatch):
    """The path a GPU takes, but for the kernels: graphs of the same parts, autocast, the balancer's two ways back."""
    compile_, parts = torch.nn.Module.compile, []

    def by_eager(self, **options):
        parts.append(self)
        compile_(self, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", by_eager)
    plain = recipe("balanced", 0)
    half = plain.model_copy(update={"train": plain.train.model_copy(update={"dtype": "bfloat16"})})
    eager, engines = training(plain)
    compiled, others = training(half, compile=True)
    assert len(parts) == 2 + 2 and list(compiled.generator.state_dict()) == list(eager.generator.state_dict())
    for mine, theirs in zip(run(eager, engines, 0, 2), run(compiled, others, 0, 2), strict=True):
        for key in ("loss", "reconstruction", "adversarial", "discriminator"):
            assert theirs[key] == pytest.approx(mine[key], rel=0.05), key
    assert compiled.evaluate()["mel"] == pytest.approx(eager.evaluate()["mel"], rel=0.1)


def test_what_is_not_quantized_yet_is_never_the_best():
    objective, engines = training(recipe("ema"))
    run(objective, engines, 0, 1)
    assert "loss" not in objective.evaluate() and objective.evaluate()["mel"] > 0
    run(objective, engines, 1, 2)
    assert objective.evaluate()["loss"] == objective.evaluate()["mel"]
    with pytest.raises(ValueError, match=r"quantize_from \(40\) must be below train.steps \(40\)"):
        tiny_codec(quantize_from=40)
    with pytest.raises(ValueError, match="one code a level"):
        tiny_codec(quantizer="factorised", balance=True)


def test_dropout_draws_depend_on_step_and_row_alone():
    objective, _ = training(tiny_codec())
    whole = objective.load(3, range(8))["n_q_B"]
    assert torch.equal(torch.cat([objective.load(3, range(i, i + 2))["n_q_B"] for i in (0, 2, 4, 6)]), whole)
    many = objective.load(4, range(60))["n_q_B"]
    assert set(many.tolist()) == {1, 2, 3}


def test_a_share_of_the_rows_uses_all_levels_and_the_others_keep_their_draw():
    rows = range(400)
    uniform = [int(rng.generator(0, "n_q", 5, row).integers(1, 13)) for row in rows]
    assert [draw_levels(0, 5, row, 12, 1.0) for row in rows] == uniform  # SoundStream's
    assert {draw_levels(0, 5, row, 12, 0.0) for row in rows} == {12}
    half = [draw_levels(0, 5, row, 12, 0.5) for row in rows]
    assert all(n in (12, drawn) for n, drawn in zip(half, uniform, strict=True))
    assert sum(n == 12 for n in half) / len(rows) == pytest.approx(0.5 + 0.5 / 12, abs=0.08)
    for share in (0.0, 1.0):
        objective, _ = training(tiny_codec(quantizer_dropout=share))
        drawn = objective.load(4, range(60))["n_q_B"].tolist()
        assert drawn == [draw_levels(0, 4, row, 3, share) for row in range(60)]


def test_the_start_of_large_codebooks_takes_fewer_frames_a_code():
    assert [init_frames(n) for n in (256, 2**12, 2**14, 2**17)] == [2**13, 2**17, 2**17, 2**18]


def test_configs_that_cannot_train_are_refused():
    corpus = corpus_config.CorpusConfig(name="x", sources=[{"kind": "folder", "name": "x", "root": "/nowhere"}])
    ctx = Context(0, 1, torch.device("cpu"), 0)
    for codec, message in ((codec_config.CodecConfig(strides=(2, 4, 5)), "make a hop of 40 samples"),
                           (codec_config.CodecConfig(crop_s=0.04), "raise it to at least 0.08")):
        with pytest.raises(ValueError, match=message):
            codec_objective({"codec": codec, "corpus": corpus, "seed": 0}, {"manifest": "/nowhere"}, ctx)
