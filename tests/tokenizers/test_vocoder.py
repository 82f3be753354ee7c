"""The semantic vocoder: lengths, prefixes, learning, the loop's resume, and builds that do not belong together."""

from __future__ import annotations

import pytest
import torch

from audiolm import store
from audiolm.config.run import ClusterConfig
from audiolm.dag.execute import StepFailed, execute
from audiolm.dag.plan import plan
from audiolm.dag.step import Step
from audiolm.models.soundstream import fold
from audiolm.models.vocoder import SemanticVocoder
from audiolm.tokenizers.artifact import ArtifactError
from audiolm.tokenizers.residual import load_residual
from audiolm.tokenizers.vocoder import load_vocoder
from audiolm.train.engine import make_engine
from audiolm.train.loop import train
from audiolm.train.objectives.base import Context
from audiolm.train.objectives.vocoder import VocoderObjective, vocoder_objective
from tests.worlds import tiny_vocoder as tiny
from tests.worlds.basics import RecordingOut


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(corpus, {"manifest", "kmeans", "residual"})."""
    folder = tmp_path_factory.mktemp("vocoder")
    corpus = tiny.corpus(folder)
    path = tiny.built_tokenizer(f"{folder}/kmeans", corpus.wavs[:6])
    with pytest.MonkeyPatch.context() as patch:
        tiny.few_pieces(patch)
        out = RecordingOut(folder / "residual")
        tiny.run_residual(corpus, path, out)
        yield corpus, {"manifest": corpus.manifest, "kmeans": path, "residual": out.path}


def objective_of(made, vocoder, inputs=None):
    torch.manual_seed(0)
    ctx = Context(0, 1, torch.device("cpu"), 0)
    objective = vocoder_objective({"vocoder": vocoder, "corpus": made[0].config, "seed": 0}, inputs or made[1], ctx)
    return objective, {name: make_engine(m, vocoder.train, ctx) for name, m in objective.modules.items()}


def run(objective, engines, start: int, end: int, pieces: int = 1) -> list[dict]:
    found = []
    for step in range(start, end):
        batches = [objective.load(step, range(i, i + 4 // pieces)) for i in range(0, 4, 4 // pieces)]
        for engine in engines.values():
            engine.set_lr(objective.vocoder.train.lr)
        found.append({k: float(v) for k, v in objective.train_step(engines, batches, step).items()})
    return found


@pytest.mark.parametrize("frames", [1, 2, 3, 7, 26])
def test_every_length_and_prefix_gives_whole_frames_and_batch_equals_single(frames):
    torch.manual_seed(0)
    net = SemanticVocoder(3, 12, 16, 2, 2).eval()
    codes_BTQ = torch.randint(12, (2, frames, 3))
    for levels in (1, 2, 3):
        wav_BT = net(codes_BTQ[..., :levels])
        assert wav_BT.shape == (2, frames * 640) and wav_BT.isfinite().all()
        assert torch.allclose(net(codes_BTQ[1:, :, :levels])[0], wav_BT[1], atol=1e-6)
        masked_BT = net(codes_BTQ, torch.full((2,), levels))
        assert torch.allclose(masked_BT, wav_BT, atol=1e-6)  # an example's own number of levels is that prefix
    assert not torch.allclose(net(codes_BTQ[..., :1]), net(codes_BTQ), atol=1e-3)
    with pytest.raises(ValueError, match="decodes 1 to 3"):
        net(torch.zeros(1, frames, 4, dtype=torch.int64))
    before = net(codes_BTQ)
    assert torch.allclose(fold(net)(codes_BTQ), before, atol=1e-5)


def test_a_crop_is_made_with_the_context_around_it():
    torch.manual_seed(0)
    net = SemanticVocoder(1, 12, 16, 2, 2).eval()
    codes_BTQ = torch.randint(12, (1, 40, 1))
    crop_BT = net(codes_BTQ, None, torch.tensor([10]), 20)
    assert crop_BT.shape == (1, 20 * 640)
    whole_BT, alone_BT = net(codes_BTQ)[:, 10 * 640:30 * 640], net(codes_BTQ[:, 10:30])
    last = slice(-640, None)  # the causal decoder's history is back; the blocks see frames behind the crop
    assert torch.allclose(crop_BT[:, last], whole_BT[:, last], atol=1e-5)
    assert not torch.allclose(crop_BT[:, last], alone_BT[:, last], atol=1e-5)


def test_rows_are_whole_frames_of_the_clip_with_every_number_of_levels(made):
    objective, _ = objective_of(made, tiny.tiny_vocoder())
    loaded = [objective.load(step, range(4)) for step in range(12)]
    assert {int(n) for b in loaded for n in b["levels_B"]} == {1, 2, 3}
    assert loaded[0]["wav_BT"].shape == (4, 30 * 640) and len({int(s) for b in loaded for s in b["starts_B"]}) > 10
    assert max(int(s) for b in loaded for s in b["starts_B"]) <= 25  # 30 frames heard, 5 made
    again = objective.load(7, [2])
    assert all(torch.equal(again[k][0], loaded[7][k][2]) for k in again)


def test_training_lowers_the_distance_and_the_export_decodes(made, tmp_path):
    objective, engines = objective_of(made, tiny.tiny_vocoder(start_step=24))
    early = objective.evaluate()
    first, = run(objective, engines, 0, 1)
    assert "discriminator" not in first and first["units"] == pytest.approx(4 * 0.2)
    run(objective, engines, 1, 24)
    assert engines["discriminator"].updates == 0
    last = run(objective, engines, 24, 28)[-1]
    assert engines["discriminator"].updates == 4 and {"adversarial", "feature", "grad_norm/discriminator"} <= set(last)
    late = objective.evaluate()
    assert late["loss"] == late["mel"] < 0.75 * early["loss"] and late["mel/q00"] < 0.75 * early["mel/q00"]

    tokenizer = load_residual(made[1]["kmeans"], made[1]["residual"])
    codec = load_vocoder(tiny.write_export(objective, f"{tmp_path}/build"), tokenizer)
    wav_BT, n = torch.from_numpy(made[0].wavs[7])[None], len(made[0].wavs[7])
    codes_TQ, = codec.encode(wav_BT, torch.tensor([n]))
    assert codec.spec.n_q == 3 and codes_TQ.shape == (-(-n // 640), 3)  # the tokenizer has 4 levels
    direct = objective.averaged()(codes_TQ[None, :, :2])
    assert torch.allclose(codec.decode(codes_TQ[None, :, :2]), direct, atol=1e-6) and direct.shape[1] == len(codes_TQ) * 640
    with pytest.raises(ValueError, match="codes run from"):
        codec.decode(codes_TQ[None] + tiny.K)


def test_micro_batches_and_engines_train_alike(made, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    results = []
    for engine, pieces in (("torch", 1), ("torch", 2), ("deepspeed", 2)):
        objective, engines = objective_of(made, tiny.tiny_vocoder(start_step=0, engine=engine, zero=0))
        results.append(run(objective, engines, 0, 2, pieces)[-1])
    for key, value in results[0].items():
        assert results[1][key] == pytest.approx(value, rel=1e-3), key
        assert results[2][key] == pytest.approx(results[1][key], rel=1e-3), key


def test_a_run_that_failed_and_resumed_equals_an_uninterrupted_one(made, tmp_path, monkeypatch):
    vocoder = tiny.tiny_vocoder(start_step=3, steps=6, save_every=2, log_every=1)

    def build(store_path):
        def fn(config, inputs, out):
            settings = {"vocoder": vocoder, "corpus": made[0].config, "seed": 0}
            return train(lambda config, _, ctx: vocoder_objective(config, made[1], ctx), settings, vocoder.train, {}, out,
                         cluster=ClusterConfig(threads=1, device="cpu"))

        step = Step("semantic_vocoder", fn, {"train": vocoder.train}, trains=True)
        execute(plan([step], store_path), store_path, inline=True)
        return plan([step], store_path)[0].state.artifact

    whole = build(f"{tmp_path}/whole")
    step_of = VocoderObjective.train_step
    with monkeypatch.context() as patch, pytest.raises(StepFailed, match="planted"):
        def fails(self, engines, batches, step):
            if step == 5:
                raise ValueError("planted")
            return step_of(self, engines, batches, step)

        patch.setattr(VocoderObjective, "train_step", fails)
        build(f"{tmp_path}/broken")
    resumed = build(f"{tmp_path}/broken")
    assert resumed.facts == whole.facts
    name = "export/model.safetensors"
    assert store.get(f"{resumed.path}/{name}") == store.get(f"{whole.path}/{name}")


def test_what_does_not_belong_together_is_refused(made, tmp_path):
    corpus, inputs = made
    objective, _ = objective_of(made, tiny.tiny_vocoder())
    build = tiny.write_export(objective, f"{tmp_path}/build")
    plain, more = load_residual(inputs["kmeans"]), load_residual(inputs["kmeans"], inputs["residual"])
    with pytest.raises(ArtifactError, match="trained on 3 levels, the tokenizer has 1"):
        load_vocoder(build, plain)
    other = load_residual(tiny.built_tokenizer(f"{tmp_path}/other", corpus.wavs[:6], seed=1))
    alone, _ = objective_of(made, tiny.tiny_vocoder(levels=1), {k: v for k, v in inputs.items() if k != "residual"})
    one = tiny.write_export(alone, f"{tmp_path}/one")
    assert load_vocoder(one, plain).spec.n_q == load_vocoder(one, more).spec.n_q == 1
    with pytest.raises(ArtifactError, match="was trained on the tokens of"):
        load_vocoder(one, other)
    with pytest.raises(ArtifactError, match="no semantic vocoder's"):
        load_vocoder(inputs["kmeans"], plain)
    config = store.get_json(f"{build}/export/config.json")
    store.put_json(f"{build}/export/config.json", {**config, "dim": 8})
    with pytest.raises(ArtifactError, match="do not fit the semantic vocoder"):
        load_vocoder(build, more)


def test_configs_that_cannot_train_are_refused(made, tmp_path):
    corpus, inputs = made
    with pytest.raises(ValueError, match="exceeds heard_s"):
        type(tiny.tiny_vocoder())(crop_s=2.0, heard_s=1.0)
    for change, text in (({"levels": 5}, "levels 5 exceed the tokens' 4"), ({"crop_s": 0.04}, "raise it to at least 0.08")):
        with pytest.raises(ValueError, match=text):
            objective_of(made, tiny.tiny_vocoder().model_copy(update=change))
    with pytest.raises(ValueError, match="no clip of split 'dev'"):
        trained = tiny.write_manifest(f"{tmp_path}/trained", corpus.clips[:6])
        objective_of(made, tiny.tiny_vocoder(), {**inputs, "manifest": trained})
