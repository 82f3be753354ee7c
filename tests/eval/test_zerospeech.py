"""Likelihood tests on spoken pairs: layouts, scores by ZeroSpeech's rules; who learnt the words wins, nobody else."""

from __future__ import annotations

import csv
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from audiolm import store
from audiolm.config import lm
from audiolm.config.lm import LMConfig
from audiolm.data.audio import wav_bytes
from audiolm.eval.metrics import ngram
from audiolm.eval.results import no_progress
from audiolm.eval.suites import zerospeech
from audiolm.eval.suites.probe_sets import Pair, ProbeSet, band_of, read_probes
from audiolm.eval.suites.run import run_suites
from audiolm.lm.batches import TokenBatches
from audiolm.lm.layouts import build_stages
from audiolm.lm.loss import batch_sums
from audiolm.lm.model import build_lm, export_lm, load_lm
from audiolm.lm.run_lengths import dedupe
from audiolm.models.lm.heads import NO_TARGET
from audiolm.tokenizers.semantic import load_semantic
from audiolm.tracking.target import resolve
from tests.worlds import token_corpus
from tests.worlds.layouts import PAPER
from tests.worlds.tiny_system import COARSE, TRAIN, VOCAB, K, Q, build, export, voice

WORDS = 16
SHAPE = lm.StageConfig(crop_s=4.0, dim=32, layers=2, heads=2, ff=64, dropout=0.0, train=TRAIN)
STAGE = build_stages(LMConfig(**PAPER, coarse_levels=COARSE, semantic=SHAPE), Q, VOCAB, K)["lm_semantic"]


def sound(number: int) -> np.ndarray:
    """Syllables of two tones each, of one number's own."""
    draw = np.random.default_rng(number)
    t = np.arange(1600) / 16_000
    syllables = [sum(np.sin(2 * np.pi * f * t) for f in draw.uniform(150, 4000, 2)) for _ in range(draw.integers(4, 9))]
    return (0.2 * np.concatenate(syllables)).astype(np.float32)


def write(folder, rows: list[dict], ending: str = "") -> str:
    """A gold.csv, and below the folder the sound of each row's "sound"."""
    sink = io.StringIO()
    table = csv.DictWriter(sink, [c for c in rows[0] if c != "sound"], extrasaction="ignore")
    table.writeheader()
    table.writerows(rows)
    store.put(str(folder / "gold.csv"), sink.getvalue().encode())
    for row in rows:
        store.put(str(folder / (row["filename"] + ending)), wav_bytes(sound(row["sound"])))
    return str(folder)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    corpus = token_corpus.make(folder / "corpus", {"train": [60] * 6, "dev": [20]})
    return {**build(str(folder)), **corpus.paths}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """As ZeroSpeech lays sWUGGY out: word i is sound i, its non-word another; two voices say each."""
    rows = [{"id": i, "filename": f"f{i}{v}{c}", "voice": f"v{v}", "frequency": 3 * i if c else "", "word": "w", "correct": c,
             "sound": 1000 * v + i + 100 * (1 - c)} for i in range(WORDS) for c in (0, 1) for v in (0, 1)]
    return write(tmp_path_factory.mktemp("lexical"), rows, ".wav")


def test_who_learnt_the_right_words_wins_and_shuffled_tokens_give_chance(steps, words, tmp_path):
    tokenizer, stage = load_semantic(steps["kmeans"]), STAGE
    torch.manual_seed(0)
    model = build_lm(stage, SHAPE)
    z, _ = zerospeech.encode_files(read_probes(words).files, tokenizer)
    ids = [stage.targets(z_T) for z_T in z]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    rows = [stage.pack(z_T, None, False) for z_T in z[::2]]
    batch = TokenBatches(steps["manifest"], steps["semantic_tokens"], None, stage, "dev", None, 1, 0).collate(rows)
    for _ in range(120):
        nats, number = batch_sums(model, stage, batch, "cpu")[:, 0]
        optimizer.zero_grad()
        (nats / number).backward()
        optimizer.step()
    export(str(tmp_path), *export_lm(model, stage))
    seen = []
    rows = zerospeech.measure_probes({"sWUGGY": words}, {**steps, "lm_semantic": str(tmp_path)},
                                 progress=lambda *at: seen.append(at))
    found = {(r.item, r.metric): r for r in rows}
    ours = found["stage 1, per token", "sWUGGY, all %"]
    assert ours.value > 90 and ours.low > 75 and (ours.n, ours.of, ours.role, ours.paper) == (WORDS, "pairs", "ours", 71.5)
    assert ours.note == "" and seen[-1] == (4 * WORDS, 4 * WORDS, "recordings")
    assert found["stage 1, per token", "sWUGGY, in-vocab %"].n == WORDS - 1
    assert found["stage 1, sum", "sWUGGY, all %"].value > 80
    bands = {metric: r.n for (item, metric), r in found.items() if item == "stage 1, sum"}
    assert list(bands)[2:] == [f"sWUGGY, {b} %" for b in ("oov", "1-5", "6-20", "21-100")] and bands["sWUGGY, 1-5 %"] == 1
    assert bands["sWUGGY, 6-20 %"] == 5 and bands["sWUGGY, 21-100 %"] == 9
    for item in ("Kneser-Ney bigram, per token", "Kneser-Ney bigram, sum", "the shorter"):  # they know nothing of the words
        row = found[item, "sWUGGY, all %"]
        assert 25 < row.value < 75 and row.low < row.high and row.role == "baseline"
    assert found["chance", "sWUGGY, all %"].value == 50

    draw, pool, wins = np.random.default_rng(0), np.concatenate(ids), []
    for _ in range(10):
        shuffled = np.split(draw.permutation(pool), np.cumsum([len(i) for i in ids])[:-1])
        scores = zerospeech.log_likelihoods(model, stage, shuffled) / [len(i) for i in ids]
        wins.append(zerospeech.wins_of(scores).mean())
    assert 0.42 < np.mean(wins) < 0.58


def test_a_batched_score_is_the_sum_of_its_tokens_chances(steps, monkeypatch):
    model, stage = load_lm(steps["lm_semantic"])
    draw = np.random.default_rng(0)
    rows = [dedupe(draw.integers(0, K, n)) for n in (3, 17, 1, 9, 9, 40)]
    by_hand = []
    for ids in rows:
        chances = model(torch.tensor([[stage.bos, *ids]]))[0].log_softmax(-1)
        by_hand.append(sum(float(chances[t, i]) for t, i in enumerate(ids)))  # the first after BOS, no EOS
    monkeypatch.setattr(zerospeech, "TOKENS", 45)
    assert sorted(map(len, zerospeech._batches([len(r) + 1 for r in rows]))) == [1, 1, 4]
    np.testing.assert_allclose(zerospeech.log_likelihoods(model, stage, rows), by_hand, rtol=1e-5)
    twice = zerospeech.by_sequence([rows[0], rows[1], rows[0]], lambda some: zerospeech.log_likelihoods(model, stage, some))
    assert twice[0] == twice[2] and zerospeech.wins_of(twice[[0, 2]]) == [0.5]


def test_the_bigrams_scores_by_hand():
    train = [np.array([STAGE.bos, 0, 1, STAGE.eos]), np.array([STAGE.bos, 0, 2, STAGE.eos])]
    model = ngram.fit(*ngram.sequence(train), 2, STAGE.vocab_size, K + 1)
    # different ids before 0, 1, 2: one each, before EOS two; discounts 0.5 and 1, and what they leave is even over K + 1
    one = 0.5 / 5 + (3 * 0.5 + 1) / 5 / (K + 1)
    first = (2 - 1) / 2 + 1 / 2 * one
    after = (1 - 0.5) / 2 + 2 * 0.5 / 2 * one
    twice = 2 * 0.5 / 2 * one  # 0 after 0 cannot be where runs are collapsed
    unseen = 2 * 0.5 / 2 * (3 * 0.5 + 1) / 5 / (K + 1)
    found = zerospeech.bigram_scores(model, STAGE, [np.array([0, 1]), np.array([0]), np.array([0, 7])])
    np.testing.assert_allclose(found, np.log([first * after / (1 - twice), first, first * unseen / (1 - twice)]))


def test_tokens_are_the_recordings_own_and_the_same_alone_and_batched(steps, words):
    tokenizer = load_semantic(steps["kmeans"])
    files = read_probes(words).files[:24]
    together, samples = zerospeech.encode_files(files, tokenizer)
    assert len(set(map(len, together))) > 2
    for path, z_T, n in zip(files, together, samples, strict=True):
        (alone,), _ = zerospeech.encode_files([path], tokenizer)
        np.testing.assert_array_equal(z_T, alone)
        assert len(z_T) == -(-n // 640)


def test_reads_words_sentences_and_stories(tmp_path, words):
    assert [p.band for p in read_probes(words).pairs[:12:2]] == ["oov", "1-5", "6-20", "6-20", "6-20", "6-20"]
    assert [band_of({"frequency": f}) for f in ("4", "5", "20.0", "100", "NaN")] == ["1-5", "6-20", "21-100", ">100", None]
    found = read_probes(words)
    assert (found.kind, found.official, len(found.pairs), len({p.id for p in found.pairs})) == ("words", True, 2 * WORDS, WORDS)
    rows = [{"id": 1, "filename": f"{sub}{c}", "voice": "v", "type": "t", "subtype": sub, "transcription": "", "correct": c,
             "sound": c} for sub in "ab" for c in (1, 0)]
    found = read_probes(write(tmp_path / "syntactic", rows, ".flac"))  # sentences are numbered within their subtype
    assert (found.kind, [p.id for p in found.pairs]) == ("sentences", ["t/a/1", "t/b/1"]) and not found.pairs[0].known
    assert found.pairs[0].right.endswith("/syntactic/a1.flac")
    rows = [{"id": f"x{c}", "pair_id": "x", "voice": "v", "word": "w", "is_word": c, "frequency_band": "high",
             "filename": f"audio/{c}.wav", "sound": c} for c in (1, 0)]
    folder = tmp_path / "own"
    store.put(str(folder / "pairs.csv"), b"pair_id,d3\nx,-0.5\n")
    found = read_probes(store.join(write(folder, rows), "gold.csv"))
    assert (found.kind, found.official, found.pairs[0].band, found.trigrams) == ("words", False, "high", {"x": -0.5})
    assert found.pairs == (Pair("x", "v", f"{folder}/audio/1.wav", f"{folder}/audio/0.wav", "high"),)
    stories = write(tmp_path / "cloze", [{k: v for k, v in r.items() if k not in ("is_word", "frequency_band")} |
                                         {"correct": r["is_word"]} for r in rows])
    assert read_probes(stories).kind == "stories"


def test_refuses_what_it_cannot_pair(tmp_path, steps, words):
    rows = [{"id": "x", "filename": f"{c}.wav", "correct": c, "sound": c} for c in (1, 0)]
    with pytest.raises(ValueError, match="pair 'x' of voice '' has 1 right and 0 wrong"):
        read_probes(write(tmp_path, rows[:1]))
    with pytest.raises(ValueError, match="filename, correct"):
        read_probes(write(tmp_path, [{k: v for k, v in r.items() if k != "correct"} for r in rows]))
    with pytest.raises(ValueError, match="'1', and .* has no such audio"):
        read_probes(write(tmp_path / "other", [{**r, "filename": str(r["correct"])} for r in rows]))
    with pytest.raises(FileNotFoundError):
        read_probes(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="coarse stage"):
        zerospeech.measure_probes({"w": words}, {**steps, "lm_semantic": steps["lm_coarse"]})


def test_voices_first_then_pairs_and_the_paper_beside():
    pairs = tuple(Pair(pair, str(i), "", "", None) for i, pair in enumerate(["a", "a", "b"]))
    sums = {"stage 1": np.array([-4.0, -5.0, -6.0, -6.0, -3.0, -2.0])}
    found = zerospeech.rows_of("sBLIMP", ProbeSet("sentences", False, pairs, {"a": 1.0, "b": 0.0}), sums, [4, 8, 3, 3, 3, 1],
                           np.array([10, 20, 30, 30, 50, 40]), 0, 1.0, "one is long")
    by_item = {r.item: r for r in found}
    assert by_item["stage 1, sum"].value == 37.5 and by_item["stage 1, per token"].value == 62.5
    assert by_item["the shorter"].value == 37.5 and by_item["phone trigrams"].value == 75
    assert (by_item["stage 1, sum"].paper, by_item["stage 1, per token"].paper) == (67.5, 64.7)
    assert by_item["stage 1, sum"].note == "other pairs than the paper's (ZeroSpeech 2021, dev); one is long"
    assert all(r.table == "IV" and r.n == 2 for r in found)


def gold_of(folder, columns: str, lines: str) -> tuple[str, dict[str, float]]:
    """(folder, scores) of a gold in ZeroSpeech's layout, from lines "COLUMNS right wrong": a recording's name is its number."""
    rows, scores = [], {}
    for line in lines.split("\n"):
        *cells, right, wrong = line.split()
        for correct, score in ((0, wrong), (1, right)):
            rows.append({**dict(zip(columns.split(), cells, strict=True)), "filename": f"r{len(rows)}", "correct": correct})
            scores[rows[-1]["filename"]] = float(score)
    rows.sort(key=lambda row: row["filename"][::-1])
    sink = io.StringIO()
    table = csv.DictWriter(sink, list(rows[0]))
    table.writeheader()
    table.writerows(rows)
    store.put(str(folder / "gold.csv"), sink.getvalue().encode())
    for name in scores:
        store.put(str(folder / f"{name}.wav"), b"")
    return str(folder), scores


def official(folder: str, scores: dict[str, float]) -> dict[str, tuple[float, int]]:
    """{part: (accuracy in 0 to 1, pairs)} of stage 1, per token."""
    probes = read_probes(folder)
    sums_F = np.array([scores[path.rsplit("/", 1)[1].removesuffix(".wav")] for path in probes.files])
    rows = zerospeech.rows_of("set", probes, {"stage 1": sums_F}, np.ones(len(sums_F)), np.ones(len(sums_F)), 0, 1.0)
    return {r.metric.removeprefix("set, ").removesuffix(" %"): (pytest.approx(r.value / 100), r.n) for r in rows
            if r.item == "stage 1, per token"}


def test_words_are_scored_as_zerospeech_does(tmp_path):
    """The expected values are those of zerospeech2021's lexical.py on these files, worked out by hand."""
    folder, scores = gold_of(tmp_path / "lexical" / "dev", "id voice frequency word phones length",
                             "1 A 0 w p 3 -1 -2\n1 B 0 w p 3 -5 -5\n1 C 0 w p 3 -9 -8\n"  # 1, 0.5, 0: 0.5 of three voices
                             "2 A 4 w p 3 -1.5 -1.75\n"  # 1
                             "3 A 5 w p 5 -2 -3\n3 B 5 w p 5 -inf -inf\n"  # 1, 0.5: 0.75
                             "4 B 20 w p 5 -4 -3\n"  # 0
                             "5 A 100 w p 5 -3 -3\n5 C 100 w p 5 0 0\n"  # 0.5, 0.5: 0.5
                             "6 C 1 w p 3 7 -7")  # 1
    assert official(folder, scores) == {
        "all": (0.625, 6),  # 3.75 of 6 pairs; of the 10 recordings' pairs it would be 0.6
        "in-vocab": (0.65, 5),  # 2 to 6
        "oov": (0.5, 1), "1-5": (1, 2), "6-20": (0.75, 1), "21-100": (0, 1), ">100": (0.5, 1),
        "3 phones": (2.5 / 3, 3), "5 phones": (1.25 / 3, 3)}


def test_sentences_are_scored_as_zerospeech_does(tmp_path):
    """As syntactic.py: ids count within their subtype, and types within no other."""
    folder, scores = gold_of(tmp_path / "syntactic" / "dev", "id voice type subtype transcription",
                             "1 A agree s1 t -1 -2\n1 B agree s1 t -2 -1\n"  # 1, 0: 0.5
                             "1 A agree s2 t -3 -4\n"  # 1
                             "2 A bind s3 t -1 -1\n2 B bind s3 t -1 -2\n2 C bind s3 t -1 -2")  # 0.5, 1, 1: 2.5 / 3
    assert official(folder, scores) == {"all": ((1.5 + 2.5 / 3) / 3, 3), "type agree": (0.75, 2), "type bind": (2.5 / 3, 1)}


def test_stories_in_the_layout_of_twist(tmp_path):
    names = ["10_b-1_correct.wav", "11_b-1_incorrect.wav", "2_a_correct.flac", "3_a_incorrect.wav", "notes.txt"]
    for name in names:
        store.put(str(tmp_path / name), b"")
    found = read_probes(str(tmp_path))
    assert (found.kind, found.trigrams) == ("stories", {})
    assert [[p.removeprefix(f"{tmp_path}/") for p in (pair.right, pair.wrong)] for pair in found.pairs] == [
        ["2_a_correct.flac", "3_a_incorrect.wav"], ["10_b-1_correct.wav", "11_b-1_incorrect.wav"]]
    store.put(str(tmp_path / "5_c_incorrect.wav"), b"")
    with pytest.raises(ValueError, match="5_c_incorrect.wav has no partner 4_c_correct in its folder"):
        read_probes(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="neither gold.csv .* nor 0_STORY_correct.wav"):
        read_probes(str(tmp_path / "nowhere"))


class Dearer(torch.nn.Module):
    """A planted model: the n-th token of a recording costs n nats, so it prefers shorter ones, by the sum and per token."""

    def forward(self, ids_BT, docs, index_SN, label_SN, *extra):
        return (index_SN % ids_BT.shape[1] + 1.0) * (label_SN != NO_TARGET)


SECONDS = {"right": [(0.3, 0.9)] * 4, "wrong": [(0.9, 0.3)] * 4, "chance": [(0.3, 0.9), (0.9, 0.3)] * 2,
           "ties": [(0.5, 0.5)] * 4}  # of the right and the wrong recording


def planted(folder, kind: str, case: str) -> str:
    """Four pairs of a kind in its published layout; of the case's lengths."""
    rows = []
    for pair, lengths in enumerate(SECONDS[case]):
        for wrong, seconds in enumerate(lengths):
            name = f"{2 * pair + wrong}_{pair}_{'in' * wrong}correct"
            store.put(str(folder / f"{name}.wav"), wav_bytes(voice(seconds, pair)))
            rows.append({"id": pair, "filename": name, "voice": "v", "correct": 1 - wrong, **(
                {"frequency": 1, "word": "w", "phones": "p", "length": 3} if kind == "words" else
                {"type": "t", "subtype": "s", "transcription": ""})})
    if kind != "stories":
        lines = [",".join(map(str, row)) for row in (rows[0], *(row.values() for row in rows))]
        store.put(str(folder / "gold.csv"), "\n".join(lines).encode())
    return str(folder)


def test_planted_models_score_as_planted_and_missing_sets_are_rows(steps, tmp_path, monkeypatch):
    monkeypatch.setattr(zerospeech, "load_lm", lambda path, device: (Dearer(), STAGE))
    sets = {f"{kind} {case}": planted(tmp_path / kind / case, kind, case)
            for kind in ("words", "sentences", "stories") for case in SECONDS}
    published = {name: path for name, path in steps.items() if name != "manifest"}
    config = SimpleNamespace(tables=SimpleNamespace(probes={**sets, "sSC": str(tmp_path / "none")}),
                             lm=SimpleNamespace(semantic=SimpleNamespace(where=None)))
    context = SimpleNamespace(config=config, steps=published, seed=0, device="cpu", progress=no_progress)
    rows = {(r.item, r.metric): r for r in zerospeech.zerospeech_suite(context)}
    for name in sets:
        for how in ("per token", "sum"):
            row = rows[f"stage 1, {how}", f"{name}, all %"]
            assert row.value == {"right": 100, "wrong": 0, "chance": 50, "ties": 50}[name.split()[1]] and row.n == 4
            assert name.endswith("chance") == (row.low < row.high)
        assert "no train tokens" in rows["Kneser-Ney bigram", f"{name}, all %"].note
    assert rows["stage 1", "sSC %"].value is None and "neither gold.csv" in rows["stage 1", "sSC %"].note
    context.config.tables.probes = {}
    assert [r.metric for r in zerospeech.zerospeech_suite(context)] == ["sWUGGY %", "sBLIMP %", "sSC %", "tSC %"]

    places = [sets["words right"], sets["sentences ties"]]
    written = zerospeech.write_submission(places, published, str(tmp_path / "submission"))
    assert written == [f"{tmp_path}/submission/{how}/{task}.txt" for task in ("lexical/right", "syntactic/ties")
                       for how in ("per-token", "sum")]
    mean, total = ([line.split(" ") for line in store.get(path).decode().splitlines()] for path in written[:2])
    assert [name for name, _ in total] == [f"{i}_{i // 2}_{'in' * (i % 2)}correct" for i in range(8)]
    assert all(float(right) > float(wrong) for (_, right), (_, wrong) in zip(total[::2], total[1::2], strict=True))
    tokens = [float(all_) / float(each) for (_, all_), (_, each) in zip(total, mean, strict=True)]
    assert tokens == pytest.approx(np.round(tokens)) and min(tokens) > 1
    with pytest.raises(ValueError, match="stories that ZeroSpeech 2021 does not score"):
        zerospeech.write_submission([sets["stories right"]], published, str(tmp_path))


def test_a_published_system_is_evaluated_by_name(tmp_path):
    target = resolve("small", str(tmp_path))
    roots = {source.root.rsplit("/", 1)[-1] for source in target.config.corpus.sources}
    assert "manifest" not in target.steps and roots == {"not published"}
    report = run_suites(target.steps, ["stages", "wer"], str(tmp_path), target.config, SimpleNamespace(inline=True),
                        cache=str(tmp_path / "cache"))
    assert ["a published system has no manifest" in r.note for r in report.rows] == [True, True]
