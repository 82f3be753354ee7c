"""SALMon's protocol: its layout is read, planted models get what they must, and scores are the stages' likelihoods."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from audiolm import store
from audiolm.config.evaluation import TablesConfig
from audiolm.eval.suites import run, salmon, zerospeech
from audiolm.lm.loss import batch_sums
from audiolm.lm.model import load_lm
from audiolm.lm.pack_rows import pack_rows
from audiolm.lm.parallel import whole_level_sums
from audiolm.lm.stages import Stage
from audiolm.models.lm.heads import NO_TARGET
from audiolm.tokenizers.base import TokenSpec
from tests.worlds import sounds, voices
from tests.worlds.basics import RecordingOut
from tests.worlds.layouts import TIMED
from tests.worlds.tiny_system import COARSE, VOCAB, K, Q, build, token_store
from workflows import evaluate

SEMANTIC = Stage("semantic", K, VOCAB, (0, 0), 1, False, 4.0)
ACOUSTIC = Stage("coarse", K, VOCAB, (0, 1), 1, False, 4.0)
METRIC = "made, speaker_consistency %"


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("run"))
    return {**build(folder), "semantic_tokens": token_store(folder)}


class Planted(torch.nn.Module):
    """The nats of an id are `cost` where it differs from the one before; or random, where cost is None."""

    def __init__(self, cost: float | None):
        super().__init__()
        self.cost, self.draw = cost, torch.Generator().manual_seed(0)

    def forward(self, ids_BT, docs, index_SN, label_SN, *_):
        if self.cost is None:
            return torch.rand(index_SN.shape, generator=self.draw)
        ids = ids_BT.flatten()
        changes_SN = ids[(index_SN + 1).clamp_max(len(ids) - 1)] != ids[index_SN]
        return self.cost * changes_SN * (label_SN != NO_TARGET)


def planted_tokens(pairs: int, changes: tuple[bool, bool]) -> list[np.ndarray]:
    """tokens_TC of pairs: semantic ids and codes stay in the right one; in the wrong one those change halfway that `changes`
    names (semantic, acoustic)."""
    draw, tokens = np.random.default_rng(0), []
    for _ in range(pairs):
        right_TC = np.tile(draw.integers(0, K, 2), (16, 1))
        wrong_TC = right_TC.copy()
        wrong_TC[8:] += changes * (1 - right_TC[8:] % 2 * 2)  # to an even or odd neighbour: K and VOCAB are even
        tokens += [right_TC, wrong_TC]
    return tokens


def accuracies(semantic: float | None, acoustic: float | None, tokens: list[np.ndarray]) -> dict[str, tuple]:
    stages = {"semantic": (Planted(semantic), SEMANTIC), "coarse": (Planted(acoustic), ACOUSTIC)}
    rows = salmon.part_rows(METRIC, salmon.likelihoods(stages, tokens), np.full(len(tokens), 5120), 0, 0.0)
    assert {r.n for r in rows} == {len(tokens) // 2} and {r.of for r in rows} == {"pairs"}
    return {r.item: (r.value, r.note) for r in rows}


def test_planted_models_get_all_none_or_chance():
    sound = planted_tokens(20, (False, True))  # the sound changes, the words do not
    for cost, value in ((1.0, 100), (-1.0, 0)):
        found = accuracies(1.0, cost, sound)
        for how in ("per token", "sum"):
            assert found[f"acoustic stages, {how}"] == found[f"whole system, {how}"] == (value, "")
            assert found[f"stage 1, {how}"] == (50, "20 ties")
    assert found["the shorter"] == (50, "20 ties") and found["chance"][0] == 50
    assert set(accuracies(0.0, 0.0, sound).values()) == {(50, "20 ties"), (50, "")}  # and the row of chance
    words = accuracies(1.0, -1.0, planted_tokens(20, (True, False)))  # stage 1 alone can see it
    assert words["stage 1, sum"][0] == words["whole system, sum"][0] == 100 and words["acoustic stages, sum"] == (50, "20 ties")
    draw = np.random.default_rng(1)
    noise = [draw.integers(0, K, (16, 2)) for _ in range(400)]
    low, high = sounds.chance_band(200)
    assert all(low <= value <= high for value, _ in accuracies(None, None, noise).values())


def test_pairs_are_scored_as_salmon_scores_them():
    scores_F2 = np.array([(-1, 1), (-2, 4), (-3, 1), (-3, 1), (-5, 2), (-4, 2), (-1, 1), (-9, 1)], float)
    rows = {r.item: r for r in salmon.part_rows(METRIC, {"stage 1": scores_F2}, np.arange(8), 0, 0.0, "long")}
    for item, values_F in (("stage 1, sum", scores_F2[:, 0]), ("stage 1, per token", scores_F2[:, 0] / scores_F2[:, 1])):
        right, wrong = torch.tensor(values_F[::2]), torch.tensor(values_F[1::2])
        result = torch.zeros(4)  # salmon.py: 1 above, 0.5 equal, 0 below
        result[right > wrong], result[right == wrong] = 1, 0.5
        row = rows[item]
        assert row.value == 100 * float(result.mean()) and row.low <= row.value <= row.high
        assert row.note == "1 ties; long" and row.role == "ours"
    assert (rows["stage 1, sum"].value, rows["stage 1, per token"].value) == (62.5, 37.5)
    assert rows["the shorter"].value == 100 and rows["the shorter"].role == "baseline" and rows["chance"].role == "floor"


@torch.no_grad()
@pytest.mark.parametrize("layout", [{}, {"kind": "frame", "coarse": Q, **TIMED}], ids=["flat", "frame"])
def test_scores_are_the_stages_own_losses(layout, tmp_path):
    steps = build(str(tmp_path), **layout)
    stages = {stage.name: (model, stage) for model, stage in (load_lm(steps[n]) for n in steps if n.startswith("lm_"))}
    draw = np.random.default_rng(0)
    tokens = [np.concatenate([np.repeat(draw.integers(0, K, n), 6)[:2 * n, None], draw.integers(0, VOCAB, (2 * n, Q))], 1)
              for n in (9, 24, 17)]
    tokens.append(tokens[1])
    scores = salmon.likelihoods(stages, tokens)
    model, stage = stages["semantic"]
    z = [tokens_TC[::2, 0] for tokens_TC in tokens]
    np.testing.assert_allclose(scores["stage 1"][:, 0], zerospeech.log_likelihoods(
        model, stage, z if stage.lengths else [stage.targets(z_T) for z_T in z]), rtol=1e-5)
    assert scores["stage 1"][:, 1].tolist() == [len(stage.targets(z_T)) for z_T in z]

    def alone(name, z_T, codes_TQ):
        model, stage = stages[name]
        piece = stage.pack(z_T, codes_TQ[:, :len(stage.columns)], False)
        return batch_sums(model, stage, pack_rows(stage, [[piece]]), "cpu").numpy()

    for tokens_TC, z_T, acoustic, whole in zip(tokens, z, scores["acoustic stages"], scores["whole system"], strict=True):
        semantic, own = alone("semantic", z_T, tokens_TC[:, 1:]), alone("coarse", z_T, tokens_TC[:, 1:]).sum(1)
        if "fine" in stages:  # in pieces of 0.4 s
            own = own + sum(alone("fine", z_T[at:at + 10], tokens_TC[2 * at:2 * at + 20, 1:]).sum(1)
                            for at in range(0, len(z_T), 10))
        np.testing.assert_allclose((-acoustic[0], acoustic[1]), own, rtol=1e-5)
        np.testing.assert_allclose(-whole[0], own[0] + semantic[0].sum(), rtol=1e-5)  # with run lengths
        assert whole[1] == own[1] + semantic[1, 0]
    assert all((scores_F2[1] == scores_F2[3]).all() for scores_F2 in scores.values())  # equal tokens tie


def test_the_parallel_decoder_scores_whole_levels():
    model = voices.untrained()
    z_T, codes_TQ = voices.sound(np.random.default_rng(0))
    found = salmon.acoustic_scores(model, voices.STAGE, [np.column_stack([np.repeat(z_T, 2), codes_TQ])])
    nats, number = whole_level_sums(model, voices.STAGE, [(z_T, codes_TQ)], "cpu").sum(1).tolist()
    assert found.tolist() == [[-nats, 0, number]] and number == codes_TQ.size


def test_reads_salmons_layout(tmp_path):
    place = str(tmp_path / "set")
    for part in ("accents", "rir_consistency", "speaker_consistency"):
        for number in (0, 2, 10):
            for side in (1, 0):
                store.put(f"{place}/{part}/sample_{number}_{side}.wav", b"")
    store.put(f"{place}/rir_consistency/metadata.json", b"[]")
    store.put(f"{place}/set.json", b"{}")
    found = salmon.read_set(place)
    assert list(found) == ["speaker_consistency", "rir_consistency", "accents"]
    assert found["accents"] == [f"{place}/accents/sample_{n}_{side}.wav" for n in (0, 2, 10) for side in (0, 1)]
    store.put(f"{place}/accents/sample_2_2.wav", b"")
    with pytest.raises(ValueError, match="/accents/sample_2_2.wav: the pair 2 of accents needs a right"):
        salmon.read_set(place)
    store.remove(f"{place}/accents/sample_2_2.wav")
    store.put(f"{place}/accents/right.wav", b"")
    with pytest.raises(ValueError, match="accents/right.wav: SALMon's wavs are called"):
        salmon.read_set(place)
    for empty in (f"{place}/speaker_consistency", str(tmp_path / "none")):
        with pytest.raises(ValueError, match="holds no folder with sample_0_0.wav"):
            salmon.read_set(empty)


def test_from_recordings_to_a_table(speech, steps, tmp_path, capsys):
    folder, index = str(tmp_path / "made"), str(tmp_path / "runs" / "tiny.json")
    store.put_json(index, {"run": "tiny", "steps": {name: {"path": path} for name, path in steps.items()}})
    assert evaluate.main(["salmon", folder, "--make", speech, "--pairs", "2"]) == 0
    assert capsys.readouterr().out == (f"{folder}: 2 pairs of speaker_consistency, 2 pairs of bg_all_consistency, "
                                       "2 pairs of rir_consistency\n")
    assert evaluate.main(["salmon", folder, "--run", index, "--json", str(tmp_path / "rows.json")]) == 0
    said = capsys.readouterr().out
    rows = store.get_json(str(tmp_path / "rows.json"))
    assert len(rows) == 3 * 8 and all(0 <= r["value"] <= 100 and r["n"] == 2 and r["table"] == "SALMon" for r in rows)
    assert "made, rir_consistency %" in said and "4 of 4 recordings exceed the 2 s that the coarse stage was trained on" in said

    young = {name: path for name, path in steps.items() if name != "lm_coarse"}
    rows = salmon.measure_salmon({"made": folder}, young)
    assert len(rows) == 3 * 4 + 1 and rows[-1].value is None and rows[-1].item == "whole system"
    assert rows[-1].note == "the run has not finished lm_coarse yet"
    with pytest.raises(ValueError, match=f"predict {COARSE} levels of 16 codes, the codec has {Q} of 16: .* lm_fine too"):
        coarse = Stage("coarse", K, VOCAB, (0, COARSE), COARSE, True, 2.0)
        salmon.check_stages({"semantic": (None, SEMANTIC), "coarse": (None, coarse)}, *(
            SimpleNamespace(spec=TokenSpec("", 16_000, hop, n_q, vocab)) for hop, n_q, vocab in ((640, 1, K), (320, Q, VOCAB))))
    with pytest.raises(ValueError, match="semantic stage of the tokenizer's 12 tokens, got another stage"):
        salmon.measure_salmon({"made": folder}, {**steps, "lm_semantic": steps["lm_coarse"]})


def test_what_is_missing_is_one_row_with_the_fix(steps):
    assert "salmon" in run.OPTIONAL and run.check_names(["salmon"]) == ["salmon"]
    for sets, fix in (({}, "no pairs: name folders of SALMon's layout, tables.salmon="),
                      ({"a": "/nowhere"}, "/nowhere holds no folder with sample_0_0.wav")):
        config = SimpleNamespace(tables=TablesConfig(salmon=sets), run=SimpleNamespace(seed=0))
        context = run.SuiteContext(steps, config, "/nowhere/cache", "cpu", RecordingOut("/nowhere"))
        ((row,), sounds) = run._run_suite("salmon", context)
        assert row.value is None and fix in row.note and sounds == []
