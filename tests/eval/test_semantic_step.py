"""Token statistics against plain loops, and the step `semantic_figures` on a tiny corpus of tones, to the report's page."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from audiolm import store
from audiolm.config.base import identity
from audiolm.config.corpus import CorpusConfig
from audiolm.config.external import SemanticMetricsConfig, semantic_metrics_config
from audiolm.config.run import ClusterConfig
from audiolm.config.semantic import AbxConfig
from audiolm.data import clips as clips_data
from audiolm.data import tokens
from audiolm.data.clips import Clip, Part, clips_parquet
from audiolm.data.tokens import Ragged, TokenStore
from audiolm.eval.metrics import token_statistics as ts
from audiolm.eval.steps import semantic as figures
from audiolm.metrics_log import MetricsFile
from audiolm.models.conformer import Encoder, EncoderSizes
from audiolm.report.run_report import build_report
from audiolm.tokenizers.extractor import ConformerExtractor, Window
from audiolm.tokenizers.semantic import save_semantic
from tests.worlds import token_corpus
from tests.worlds.basics import HEADER, RecordingOut
from tests.worlds.pages import read

RATE, STEP, SOUND = 16_000, 0.24, 0.2  # a phone every STEP seconds, heard for SOUND
HZ = {"a": 500.0, "b": 2500.0}
TOKEN = {"a": 3, "b": 5}  # in the store; 0 elsewhere
TRAIN, HELD = ("s0", "s1"), ("s2", "s3")


def write(folder, ids, z, vocab: int) -> None:
    """A token store: names and tokens of the clips of each shard."""
    meta = {"which": "semantic", "spec": {"name": "s", "sample_rate": RATE, "hop": 640, "n_q": 1, "vocab": vocab}, "hash": "h",
            "manifest": "m", "shards": len(ids), "device": "cpu", "dtype": "float32", "versions": {}}
    for k, (names, codes) in enumerate(zip(ids, z, strict=True)):
        store.put(f"{folder}/{tokens.shard_name(k)}", tokens.shard_bytes(names, [c[:, None] for c in codes], meta, k, True))
    tokens.index_shards(str(folder))


def test_statistics_equal_plain_counting(tmp_path):
    corpus = token_corpus.make(tmp_path, {"train": [40, 7, 90, 31], "dev": [55, 12], "test": [23]})
    group_of = {c.id: "train" if c.split == "train" else "held_out" for c in corpus.clips if c.id != "train-1"}
    found = ts.tally(TokenStore(corpus.paths["semantic_tokens"]), group_of, ("train", "held_out"))
    for group in ("train", "held_out"):
        mine = [corpus.z[i].tolist() for i, g in group_of.items() if g == group]
        stretches = [(k, len(list(run))) for z in mine for k, run in itertools.groupby(z)]  # within a clip
        frames, n = Counter(itertools.chain(*mine)), sum(map(len, mine))
        lengths = Counter(length for _, length in stretches)
        bits, bits_dedup = (-sum(v / sum(c.values()) * math.log2(v / sum(c.values())) for v in c.values())
                            for c in (frames, Counter(k for k, _ in stretches)))
        s = ts.statistics(found[group], 25.0)
        assert s["frames"] == n and s["used"] == len(frames) and s["seconds"] == n / 25
        assert s["entropy_bits"] == pytest.approx(bits) and s["perplexity"] == pytest.approx(2**bits)
        assert s["mean_run"] == pytest.approx(n / len(stretches)) and s["dedup_ratio"] == pytest.approx(len(stretches) / n)
        assert s["rate_dedup"] == pytest.approx(25 * len(stretches) / n) and s["bits_per_s"] == pytest.approx(25 * bits)
        assert s["bits_per_s_dedup"] == pytest.approx(s["rate_dedup"] * bits_dedup)
        assert s["runs_by_length"] == [lengths[i] for i in range(1, 25)] + [sum(v for k, v in lengths.items() if k >= 25)]
        most, times = frames.most_common(1)[0]
        assert s["most_used"][0]["share"] == pytest.approx(times / n) and frames[s["most_used"][0]["token"]] == times
        listed = {e["token"] for e in (*s["most_used"], *s["least_used"])}
        assert listed == set(frames) and len(s["least_used"]) == len(frames) - 10
    assert ts.statistics(ts.Use.none(12), 25.0) is None


def test_runs_end_where_a_clip_ends_and_long_ones_share_a_bin(tmp_path):
    token, row, start, length = ts.runs(Ragged(np.array([7, 7, 7, 7, 2, 7], np.uint16), np.array([0, 2, 5, 6])))
    assert token.tolist() == [7, 7, 2, 7] and length.tolist() == [2, 2, 1, 1]
    assert row.tolist() == [0, 1, 1, 2] and start.tolist() == [0, 0, 2, 0]
    write(tmp_path, [["c"]], [[np.repeat([1, 2, 3], [24, 25, 90])]], vocab=4)
    use = ts.tally(TokenStore(str(tmp_path)), {"c": "all"}, ("all",))["all"]
    assert use.lengths_L.tolist() == [0] * 23 + [1, 2] and use.frames_K.tolist() == [0, 24, 25, 90]


def test_drift_is_the_jensen_shannon_divergence():
    a, b = np.array([4, 4, 0]), np.array([0, 2, 6])
    p, q = a / 8, b / 8
    plain = sum(0.5 * x * math.log2(x / m) for v in (p, q) for x, m in zip(v, (p + q) / 2, strict=True) if x)
    assert ts.drift_bits(a, b) == pytest.approx(plain)
    assert ts.drift_bits(a, 3 * a) == pytest.approx(0.0, abs=1e-12)
    assert ts.drift_bits(a, np.array([0, 0, 5])) == pytest.approx(1)


def test_phone_figures_equal_their_definitions():
    g = np.random.default_rng(0)
    frames_PK = g.integers(0, 9, (5, 7)) * (g.random((5, 7)) < 0.6)
    joint = {(p, k): n / frames_PK.sum() for (p, k), n in np.ndenumerate(frames_PK) if n}
    p_phone, p_token = Counter(), Counter()
    for (p, k), v in joint.items():
        p_phone[p] += v
        p_token[k] += v
    mutual = sum(v * math.log(v / p_phone[p] / p_token[k]) for (p, k), v in joint.items())
    found = ts.phone_figures(frames_PK)
    assert found["pnmi"] == pytest.approx(mutual / -sum(v * math.log(v) for v in p_phone.values()))
    assert found["phone_purity"] == pytest.approx(sum(max(v for (_, j), v in joint.items() if j == k) for k in p_token))
    assert found["cluster_purity"] == pytest.approx(sum(max(v for (i, _), v in joint.items() if i == p) for p in p_phone))
    perfect = ts.phone_figures(np.diag([3, 5, 2]))
    assert perfect == pytest.approx({"phone_purity": 1.0, "cluster_purity": 1.0, "pnmi": 1.0})
    assert ts.phone_figures(np.outer([1, 2, 3], [4, 1]))["pnmi"] == pytest.approx(0.0, abs=1e-9)
    assert ts.phone_figures(np.array([[3, 4]]))["pnmi"] == 0.0


def test_the_matrix_is_sorted_into_a_diagonal():
    phones, kept = ts.diagonal(np.array([[0, 1, 0, 2, 0], [9, 8, 0, 0, 0], [0, 0, 0, 1, 4]]))
    assert phones.tolist() == [1, 2, 0] and kept.tolist() == [0, 1, 4, 3]  # by frequency; token 2 never occurs


def test_occurrences_spread_over_clips_and_speakers(tmp_path):
    corpus = token_corpus.make(tmp_path, {"dev": [80] * 6}, per_shard=2)
    z, tokens_there = corpus.z, TokenStore(corpus.paths["semantic_tokens"])
    speaker_of = {c.id: f"s{n % 3}" for n, c in enumerate(corpus.clips[:5])}  # the last clip is not asked for
    found = ts.occurrences(tokens_there, list(range(12)), speaker_of, 4, seed=1)
    for k, places in found.items():
        assert 0 < len(places) <= 4
        for o in places:
            run = z[o.clip][o.start:o.start + o.length]
            assert o.clip in speaker_of and (run == k).all() and (o.start == 0 or z[o.clip][o.start - 1] != k)
        longs = sum(len(list(r)) > 1 for i in speaker_of for v, r in itertools.groupby(z[i]) if v == k)
        assert sum(o.length > 1 for o in places) == min(4, longs)
    assert found == ts.occurrences(tokens_there, list(range(12)), speaker_of, 4, seed=1)
    assert found != ts.occurrences(tokens_there, list(range(12)), speaker_of, 4, seed=2)


def test_occurrences_prefer_other_clips_then_other_speakers(tmp_path):
    z = np.tile([1, 1, 0], 9)
    write(tmp_path, [[f"clip{n}" for n in range(5)], ["clip5", "clip6"]], [[z] * 5, [z, z[1:]]], vocab=4)
    speaker_of = {f"clip{n}": "alone" if n == 5 else "rare" if n == 6 else "often" for n in range(7)}
    for n, speakers in ((3, 3), (7, 3)):
        places = ts.occurrences(TokenStore(str(tmp_path)), [1, 3], speaker_of, n, seed=n)
        assert places[3] == [] and len({o.clip for o in places[1]}) == len(places[1]) == n
        assert len({speaker_of[o.clip] for o in places[1][:3]}) == speakers
    many = ts.occurrences(TokenStore(str(tmp_path)), [1], {"clip0": "one"}, 4, seed=0)[1]
    assert len(set(many)) == 4 and all(o.length == 2 for o in many)  # one clip alone gives several


def test_a_frame_has_the_phone_of_its_centre():
    at, inside = figures.frame_phones(np.array([0.03, 0.10]), np.array([0.08, 0.16]), 6)
    assert inside.tolist() == [False, True, True, True, False, False] and at[inside].tolist() == [0, 1, 1]


def tones(speaker: int) -> tuple[np.ndarray, np.ndarray, list[tuple[float, str]]]:
    """(wav_T, tokens, (onset, phone)): a and b in turn, each followed by silence."""
    draw, phones = np.random.default_rng(speaker), "abab" * 3
    wav, z = np.zeros(round(len(phones) * STEP * RATE), np.float32), np.zeros(round(len(phones) * STEP * 25), np.int64)
    t = np.arange(round(SOUND * RATE)) / RATE
    for n, p in enumerate(phones):
        wav[round(n * STEP * RATE):][:len(t)] = 0.3 * np.sin(2 * np.pi * HZ[p] * (1 + 0.02 * speaker) * t)
        z[6 * n:6 * n + 5] = TOKEN[p]
    return wav + 0.003 * draw.standard_normal(len(wav)).astype(np.float32), z, [(n * STEP, p) for n, p in enumerate(phones)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Four speakers of tones, two of them held out: audio, items, alignment, manifest, store and a random tokenizer."""
    root = tmp_path_factory.mktemp("world")
    (root / "deep").mkdir()
    clips, codes, items, phones = [], [], [], []
    for n, speaker in enumerate((*TRAIN, *HELD)):
        wav, z, spoken = tones(n)
        soundfile.write(root / "deep" / f"f{n}.wav", wav, RATE, subtype="FLOAT")
        clips.append(Clip(f"f{n}", "s", "s", speaker, "train" if speaker in TRAIN else "dev", RATE, len(wav),
                          (Part(f"f{n}", f"deep/f{n}.wav", 0, len(wav), 0, None),), n // 2, n % 2))
        codes.append(z)
        for on, p in spoken:
            items.append(f"f{n} {on:.2f} {on + SOUND:.2f} {p} x y {speaker}\n")
            phones += [f"f{n} {on:.2f} {on + SOUND:.2f} {p} word\n", f"f{n} {on + SOUND:.2f} {on + STEP:.2f} SIL <sil>\n"]
    (root / "a.item").write_text(HEADER + "".join(items))
    (root / "phones.txt").write_text("".join(phones))
    paths = {name: str(root / name / "aaaaaaaaaaaa" / "0001") for name in ("manifest", "kmeans", "semantic_tokens")}
    store.put(store.join(paths["manifest"], "clips.parquet"), clips_parquet(clips))
    write(paths["semantic_tokens"], [[c.id for c in clips[k:k + 2]] for k in (0, 2)], [codes[:2], codes[2:]], vocab=8)
    torch.manual_seed(0)
    heard = ConformerExtractor(Encoder(EncoderSizes(dim=16, layers=1, heads=2, ff=24, conv_kernel=3, dropout=0.0)))
    wav = torch.from_numpy(tones(0)[0])[None]
    x_TD = heard.features(wav, torch.tensor([wav.shape[1]]), [1])[0][0][0]
    std_D, mean_D = torch.std_mean(x_TD, 0)
    save_semantic(paths["kmeans"], heard, 1, mean_D, std_D, ((x_TD - mean_D) / std_D)[:32:4].clone(), Window(100, 10), {})
    return SimpleNamespace(root=root, inputs={n: SimpleNamespace(path=p, build="0001", facts={}) for n, p in paths.items()})


def judged(world, **changed) -> AbxConfig:
    root = world.root
    return AbxConfig(**{"items": str(root / "a.item"), "audio": (str(root / "deep"),),
                        "phones": str(root / "phones.txt"), **changed})


def measure(world, want: SemanticMetricsConfig, path, **changed):
    """(facts, semantic.json, out)."""
    corpus = CorpusConfig(name="t", sources=({"kind": "folder", "name": "s", "root": str(world.root)},))
    config = {"figures": want, "corpus": corpus, "cluster": ClusterConfig(device="cpu"), "seed": 0}
    out = RecordingOut(path)
    facts = figures.measure_semantic(config, {**world.inputs, **changed}, out)
    return facts, json.loads(store.get(store.join(out.path, "ui", "semantic.json"))), out


@pytest.fixture(scope="module")
def measured(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("measured") / "semantic_figures" / "aaaaaaaaaaaa" / "0001"
    return measure(world, semantic_metrics_config(judged(world)), path)


def test_the_step_separates_held_out_from_seen(measured):
    facts, table, out = measured
    assert all(type(v) is float for v in facts.values()) and json.loads(json.dumps(facts)) == facts
    for group, speakers in (("held_out", HELD), ("seen", TRAIN)):
        own = table["abx"][group]
        assert own["speakers"] == list(speakers) and [r["features"] for r in own["rows"]] == list(figures.KINDS)
        for row in own["rows"]:
            assert set(row["by_speaker_within"]) == set(speakers)
            if row["features"] != "mfcc":
                mean, lo, hi = row["difference_across"]
                assert lo <= mean <= hi and mean == pytest.approx(row["across"] - own["rows"][2]["across"])
    assert facts["abx_mfcc_within"] == facts["abx_seen_mfcc_across"] == 0.0  # tones are told apart
    assert {"abx_within", "abx_features_across", "abx_seen_within", "pnmi", "drift_bits", "rate", "used"} <= set(facts)
    assert table["statistics"]["train"]["frames"] == table["statistics"]["held_out"]["frames"] == 2 * 72
    assert facts["mean_run"] == 3.0 and facts["used"] == 3 and table["absent"] == {}
    phones = table["phones"]
    assert phones["speakers"] == list(HELD) and phones["frames"] == 2 * 72 and set(phones["phones"]) == {"a", "b", "SIL"}
    assert phones["pnmi"] > 0.4 and facts["pnmi"] == pytest.approx(phones["pnmi"], abs=1e-6)
    assert out.seen[-1] == (5.0, 5.0, "parts")


def test_a_tokens_example_holds_the_sound_it_stands_for(measured):
    _, table, out = measured
    by_token = {e["token"]: e for e in table["examples"]}
    assert set(by_token) == {0, 3, 5} and table["examples_from"] == "held_out"
    for phone, token in TOKEN.items():
        places = by_token[token]["occurrences"]
        assert len(places) == 6 and {o["speaker"] for o in places} == set(HELD)
        wav, rate = soundfile.read(io.BytesIO(store.get(store.join(out.path, by_token[token]["file"]))))
        at = 0.0
        for o in places:  # one after the other, each with its context where the clip has any
            before, after = min(0.12, o["start_s"]), min(0.12, 12 * STEP - o["start_s"] - o["seconds"])
            own = wav[round((at + before + 0.01) * RATE):][:round(0.18 * RATE)]
            pitch = np.abs(np.fft.rfft(own)).argmax() * RATE / len(own)
            assert pitch == pytest.approx(HZ[phone] * (1.04 if o["speaker"] == "s2" else 1.06), abs=6)
            assert o["seconds"] == pytest.approx(SOUND)
            at += before + o["seconds"] + after + 0.15
        assert rate == RATE and len(wav) == pytest.approx((at - 0.15) * RATE, abs=6)


def test_excerpts_are_cut_where_the_run_is():
    wav = np.arange(100_000, dtype=np.float32)
    piece = figures.excerpt(wav, 20, 3)
    assert len(piece) == 3 * 640 + 2 * 1920 and piece[2000] == 20 * 640 - 1920 + 2000 and piece[0] == piece[-1] == 0
    assert len(figures.excerpt(wav, 0, 1)) == 640 + 1920  # nothing lies before
    assert len(figures.excerpt(wav, 20, 100)) == RATE + 2 * 1920  # silence is not played for long
    two = figures.joined([np.ones(10, np.float32), np.ones(5, np.float32)])
    assert len(two) == 15 + 2400 and not two[10:-5].any()


def test_the_page_shows_it_all(world, measured, tmp_path):
    inputs = {"semantic_figures": SimpleNamespace(path=measured[2].path, facts={})}
    row = {"within": 7.0, "across": 9.0, "interval_within": [6.0, 8.0], "interval_across": [8.0, 10.0]}
    for name in ("layers", "layers_2", "masked_model", "masked_model_2"):
        inputs[name] = SimpleNamespace(path=str(tmp_path / name / "aaaaaaaaaaaa" / "0001" / "0001"), facts={})
    for name in ("layers", "layers_2"):
        store.put_json(store.join(inputs[name].path, "ui", "layers.json"), {"choice": {"layer": 7, "k": 256}, "rows": [
            {"layer": None, "k": None, **row}, {"layer": 7, "k": None, **row}, {"layer": 7, "k": 256, **row}]})
    store.put(store.join(inputs["layers"].path, "ui", "layers.png"), store.get(
        store.join(measured[2].path, "ui/semantic/use.png")))
    for name in ("masked_model", "masked_model_2"):
        f = MetricsFile(f"{inputs[name].path}/../metrics-0001.jsonl")
        for s in range(1, 9):
            f.add(s, {"loss": 3.0 / s, "accuracy": 0.1 * s, "prediction_perplexity": 9.0 * s, "val.accuracy": 0.09 * s})
        f.close()
    facts = build_report({"title": "t"}, inputs, RecordingOut(tmp_path / "report"))
    found = read(tmp_path / "report")
    for text in ("held-out speakers: s2, s3", "seen speakers: s0, s1", "minus MFCC", "PNMI", "What the tokens sound like",
                 "layer 7, K = 256", "chosen", "Choice of layer and K, for masked audio model, iteration 2", "Jensen-Shannon"):
        assert text in found.text, text
    assert found.tags.count("audio") == facts["players"] == 3 and "ui/layers.png is gone." in found.text
    assert {p.name for p in (tmp_path / "report" / "ui" / "plots").iterdir()} == {
        f"{what}-{name}.png" for what in ("loss", "accuracy", "perplexity") for name in ("masked_model", "masked_model_2")}


def test_without_items_the_page_says_what_is_missing(world, tmp_path):
    facts, table, out = measure(world, semantic_metrics_config(None), tmp_path / "step" / "aaaaaaaaaaaa" / "0001")
    assert not [k for k in facts if k.startswith("abx") or k == "pnmi"] and facts["rate"] == 25.0
    store.remove(store.join(out.path, table["examples"][0]["file"]))
    inputs = {"semantic_figures": SimpleNamespace(path=out.path, facts={})}
    build_report({"title": "t"}, inputs, RecordingOut(tmp_path / "report"))
    found = read(tmp_path / "report")
    assert found.text.count("Not measured: ") == 2 and "give semantic.abx.items" in found.text
    assert found.tags.count("audio") == 2 and f"{table['examples'][0]['file']} is gone." in found.text


def test_speakers_are_seen_whatever_the_corpus_calls_them(world, tmp_path):
    """A file that was trained on tells who is seen where names do not; asking for a trained speaker is remarked on."""
    clips = clips_data.read_clips(world.inputs["manifest"].path)
    renamed = [Clip(**{**c.__dict__, "speaker": "reader " + c.speaker, "split": "train"}) for c in clips[:3]]
    store.put(str(tmp_path / "manifest" / "clips.parquet"), clips_parquet(renamed))
    want = semantic_metrics_config(judged(world, phones=None))
    groups, files, remarks = figures.item_files(want, str(tmp_path / "manifest"))
    assert groups == {"held_out": ("s3",), "seen": ("s0", "s1", "s2")} and len(files) == 4 and not remarks
    groups, _, remarks = figures.item_files(want.model_copy(update={"speakers": ("s1",)}), str(tmp_path / "manifest"))
    assert groups == {"held_out": ("s1",), "seen": ("s0", "s2")} and "s1, who are trained on" in remarks[0]
    alone = figures.abx_part("mfcc", want.items, {"held_out": ("s3",)}, files, "-", 0, "cpu")["held_out"]
    assert set(alone) == {"within"}  # nobody to go across to


def test_nothing_held_out_is_measured_on_train(world, tmp_path):
    clips = [Clip(**{**c.__dict__, "split": "train"}) for c in clips_data.read_clips(world.inputs["manifest"].path)]
    store.put(str(tmp_path / "manifest" / "clips.parquet"), clips_parquet(clips))
    manifest = SimpleNamespace(path=str(tmp_path / "manifest"), build="0001", facts={})
    facts, table, _ = measure(world, semantic_metrics_config(judged(world)), tmp_path / "out", manifest=manifest)
    assert table["drift_bits"] is None and table["statistics"]["held_out"] is None and table["examples_from"] == "train"
    assert list(table["abx"]) == ["seen"] and "trained on" in table["absent"]["held_out"] and "abx_within" not in facts
    assert table["phones"]["speakers"] == sorted([*TRAIN, *HELD]) and "abx_seen_mfcc_within" in facts


def test_what_does_not_fit_is_named(world, tmp_path):
    with pytest.raises(ValueError, match=r"semantic\.abx\.items is '/nowhere'"):
        semantic_metrics_config(judged(world, items="/nowhere"))
    with pytest.raises(ValueError, match=r"semantic\.abx\.phones"):
        semantic_metrics_config(judged(world, phones=str(tmp_path / "none.txt")))
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for n in (0, 1, 3):
        (fewer / f"f{n}.wav").write_bytes((world.root / "deep" / f"f{n}.wav").read_bytes())
    with pytest.raises(ValueError, match="f2"):
        measure(world, semantic_metrics_config(judged(world, audio=(str(fewer),))), tmp_path / "out")
    (tmp_path / "other.txt").write_text("g0 0.0 0.2 a word\n")
    with pytest.raises(ValueError, match="names none of the 2 files"):
        measure(world, semantic_metrics_config(judged(world, phones=str(tmp_path / "other.txt"))), tmp_path / "out")
    (tmp_path / "bad.txt").write_text("f2 0.0 a\n")
    with pytest.raises(ValueError, match="line 1"):
        figures.read_phones(str(tmp_path / "bad.txt"), ["f2"])


def test_identity_follows_the_bytes_of_items_and_alignment(world, tmp_path):
    one = identity(semantic_metrics_config(judged(world)))
    (tmp_path / "moved.item").write_bytes((world.root / "a.item").read_bytes())
    assert identity(semantic_metrics_config(judged(world, items=str(tmp_path / "moved.item"), audio=("elsewhere",)))) == one
    (tmp_path / "moved.item").write_text(HEADER + "f0 0.1 0.3 a x y s0\n")
    assert identity(semantic_metrics_config(judged(world, items=str(tmp_path / "moved.item")))) != one
    (tmp_path / "phones.txt").write_text("f2 0.0 0.2 a word\n")
    assert identity(semantic_metrics_config(judged(world, phones=str(tmp_path / "phones.txt")))) != one
