"""Training the decoder that hears: words come from the ids, its steps do not depend on batching, exports are the model."""

from __future__ import annotations

import pytest
import torch

from audiolm.config.base import ConfigError
from audiolm.config.lm import DecoderConfig
from audiolm.config.start import StartConfig
from audiolm.config.training import TrainConfig
from audiolm.models.conformer import Encoder, EncoderSizes
from audiolm.models.spectral.codec import SpectralSizes
from audiolm.tokenizers.acoustic import load_codec
from audiolm.tokenizers.artifact import ArtifactError, write_export
from audiolm.tokenizers.base import SAMPLE_RATE
from audiolm.tokenizers.extractor import ConformerExtractor, Window
from audiolm.tokenizers.hearing import load_hearing
from audiolm.tokenizers.semantic import save_semantic
from audiolm.tokenizers.start import start_weights
from audiolm.train.objectives import hearing
from audiolm.train.objectives.base import Context
from tests.train.test_carry import stage
from tests.worlds import token_corpus
from tests.worlds.tiny_codec import built_codec, tiny_spectral
from tests.worlds.training import Gradients, learn

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 60
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Token stores whose first level copies the ids, and a codec and clusters with as many codes and ids."""
    folder = tmp_path_factory.mktemp("hearing")
    corpus = token_corpus.make(folder, {"train": [60] * 8 + [17, 9, 5, 13], "dev": [40, 33, 12]})
    paths = {**corpus.paths, "kmeans": str(folder / "kmeans"), "codec": str(folder / "codec"),
             "soundstream": built_codec(str(folder / "soundstream"))}
    codec = tiny_spectral(n_q=token_corpus.N_Q, vocab=token_corpus.VOCAB)
    sizes = {name: getattr(codec.sizes, name) for name in SpectralSizes.EXPORTED}
    write_export(paths["codec"], codec.state_dict(), {"kind": codec.kind, "sample_rate": SAMPLE_RATE, **sizes})
    extractor = ConformerExtractor(Encoder(EncoderSizes(dim=16, layers=1, heads=2, ff=32)))
    save_semantic(paths["kmeans"], extractor, 1, torch.zeros(16), torch.ones(16), torch.randn(token_corpus.K, 16),
                  Window(400, 50), {})
    stage2 = stage(paths, "lm_coarse frame", 3, levels=token_corpus.N_Q)
    learn(stage2, 80)
    write_export(str(folder / "lm_coarse"), *stage2.export())
    return {**paths, "lm_coarse": str(folder / "lm_coarse")}


def objective(inputs, rank=0, world=1, dtype="float32", start=None, **changes):
    train = TrainConfig(steps=STEPS, batch=8, lr=1e-2, warmup_steps=5, engine="torch", dtype=dtype)
    shape = DecoderConfig(**{"crop_s": 0.8, "slow_s": 0.3, "width": 32, "layers": 2, **changes}, train=train)
    config = {"lm": shape, "rows": 6, **({"start": start} if start else {})}
    return hearing.hearing_objective(config, inputs, Context(rank, world, CPU, 0))


@pytest.fixture(scope="module")
def trained(inputs):
    o = objective(inputs)
    before = o.evaluate()
    learn(o, STEPS)
    return o, before


def test_it_learns(trained):
    o, before = trained
    assert o.evaluate()["loss"] < 0.8 * before["loss"]


def test_the_target_is_exact_whatever_the_decoder_computes_in(inputs):
    # a decoder that adds nothing yet leaves the target's arithmetic alone to differ
    assert objective(inputs, dtype="bfloat16").evaluate()["loss"] == objective(inputs).evaluate()["loss"]


def test_words_come_from_the_ids_and_the_slow_part_from_the_codes(trained):
    o, _ = trained
    batch, module = o.load(0, [0]), o.modules["decoder"].eval()  # a crop of 40 frames
    x_BDT = o.codec.quantizer.decode(batch["codes_BTQ"])

    def heard(x_BDT, z_BN, known_BT=None):
        return o.codec.expand(*module(x_BDT, x_BDT.mean(2), z_BN, known_BT))

    with torch.no_grad():
        plain = heard(x_BDT, batch["z_BN"])
        assert (heard(x_BDT, (batch["z_BN"] + 1) % token_corpus.K) - plain).abs().mean() > 0.1 * plain.abs().mean()
        mixed = x_BDT.clone()
        mixed[..., [20, 21]] = mixed[..., [21, 20]]  # both within nearly the same averages
        near, far = (heard(x, batch["z_BN"]) - plain for x in (mixed, x_BDT.flip(2)))
        assert near.abs().mean() < 0.2 * far.abs().mean()
        known_BT = torch.arange(40)[None] < 20  # what stands in the padding is not heard
        padded, other = x_BDT.clone(), x_BDT.clone()
        other[..., 20:] = 7.0
        slow, others = (module._slow(x, known_BT)[..., :20] for x in (padded, other))
        assert torch.equal(slow, others) and torch.allclose(slow, module._slow(x_BDT[..., :20], known_BT[:, :20]), atol=1e-6)


def test_micro_batches_do_not_change_a_step_and_two_workers_take_that_of_one(inputs, monkeypatch):
    o, results = objective(inputs), []
    for parts in ([range(8)], [range(0, 3), range(3, 8)], [[i] for i in range(8)]):
        engine = Gradients(o.modules["decoder"])
        loss = float(o.train_step({"decoder": engine}, [o.load(1, rows) for rows in parts], 1)["loss"])
        results.append((loss, engine.taken))
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        assert torch.allclose(gradient, results[0][1], rtol=1e-4, atol=1e-6)
    ranks = [objective(inputs, rank=r, world=2) for r in range(2)]
    parts = [[w.load(1, range(4 * r, 4 * r + 4))] for r, w in enumerate(ranks)]
    frames = sum(b["known_BT"].sum() for p in parts for b in p).double()
    assert frames < 8 * 40  # some rows are padded
    sums = []
    monkeypatch.setattr(hearing, "all_sum", lambda x: frames if not sums.append(x) and len(sums) % 2 else x)
    engines = [Gradients(w.modules["decoder"]) for w in ranks]
    losses = [float(w.train_step({"decoder": e}, p, 1)["loss"]) for w, e, p in zip(ranks, engines, parts, strict=True)]
    assert sum(losses) == pytest.approx(results[0][0], rel=1e-6)
    assert torch.allclose((engines[0].taken + engines[1].taken) / 2, results[0][1], rtol=1e-4, atol=1e-6)


def test_what_it_exports_makes_the_sound(inputs, trained, tmp_path):
    o, _ = trained
    write_export(str(tmp_path), *o.export())
    codec = load_codec(inputs["codec"])
    loaded = load_hearing(str(tmp_path), codec)
    z_N, codes_TQ, _ = o.dev.crop(0, 0)
    wav_T = loaded.decode(codes_TQ, z_N)
    assert wav_T.shape == (320 * len(codes_TQ),) and wav_T.isfinite().all()
    own_T = codec.decode(torch.from_numpy(codes_TQ)[None])[0]
    assert not torch.allclose(wav_T, own_T, atol=1e-3)
    assert torch.allclose(loaded.decode(codes_TQ, z_N, len(codes_TQ)), own_T, atol=1e-6)  # all of it was recorded
    assert not torch.allclose(loaded.decode(codes_TQ, z_N, 0, codes_TQ[:5]), wav_T, atol=1e-3)  # another voice
    other = load_codec(inputs["codec"])
    other.hash = "another"
    with pytest.raises(ArtifactError, match="was trained on the codes of .* give the codec it was trained with"):
        load_hearing(str(tmp_path), other)
    weights = tmp_path / "export" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ArtifactError, match="model.safetensors is not the file that config.json describes .*--repair"):
        load_hearing(str(tmp_path), codec)


def test_another_codec_is_refused(inputs):
    with pytest.raises(ValueError, match="this one is 'soundstream': set codec.family=spectral or lm.decoder=null"):
        objective({**inputs, "codec": inputs["soundstream"]})


def test_a_start_is_the_export(inputs, trained, tmp_path):
    write_export(str(tmp_path), *trained[0].export())
    planned = start_weights("lm.decoder.start.uri", StartConfig(uri=str(tmp_path)), "lm_decoder")
    assert objective(inputs, start=planned).evaluate() == trained[0].evaluate()
    assert objective(inputs, start=planned, slow_s=0.6).modules["decoder"].sizes.slow == 31
    with pytest.raises(ValueError, match=r"lm\.decoder\.width is 48: set it to 32"):
        objective(inputs, start=planned, width=48)
    with pytest.raises(ConfigError, match="export of a 'hearing', and this step starts from that of a step codec"):
        start_weights("codec.start.uri", StartConfig(uri=str(tmp_path)), "codec")


def test_with_another_tokenizers_ids_a_start_hears_the_same(inputs, trained, tmp_path):
    write_export(str(tmp_path), *trained[0].export())
    planned = start_weights("lm.decoder.start.uri", StartConfig(uri=str(tmp_path)), "lm_decoder")
    planned = planned.model_copy(update={"tokens": inputs["semantic_tokens"]})
    k = token_corpus.K
    other = {**inputs, **token_corpus.retokenized(inputs, tmp_path, k, lambda z: k - 1 - z)}
    assert objective(other, start=planned).evaluate()["loss"] == pytest.approx(trained[0].evaluate()["loss"], rel=1e-5)


def test_drawn_codes_are_stage_2s_and_follow_from_the_row_alone(inputs):
    o = objective(inputs, drawn=1)
    batch = o.load(3, range(8))
    codes_BTQ, known_BT = o.drawn(batch), batch["known_BT"]
    assert codes_BTQ.max() < token_corpus.VOCAB and not codes_BTQ[~known_BT].any()
    alone = torch.cat([o.drawn(o.load(3, [row])) for row in range(8)])
    assert (codes_BTQ == alone)[known_BT].float().mean() > 0.999  # sums of other batches may round otherwise
    same = (codes_BTQ == batch["codes_BTQ"])[known_BT].float().mean(0)
    assert (same < 0.9).all() and same[0] > 2 / token_corpus.VOCAB  # level 1 follows the ids, which the stage has learned
    known = {name: x for name, x in batch.items() if name in objective(inputs).load(3, range(8))}
    assert all(torch.equal(x, batch[name]) for name, x in known.items())  # the same crops
    before = o.evaluate()["loss"]
    assert before == o.evaluate()["loss"] != objective(inputs).evaluate()["loss"]
    learn(o, 20)
    assert o.evaluate()["loss"] < 0.95 * before
