"""From audio to tokens to `evaluate.json`, with real tokenizers and stages that have not been trained."""

from __future__ import annotations

import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch

from audiolm import store
from audiolm.config.codec import CodecMetricsConfig
from audiolm.config.corpus import ClipFilter
from audiolm.config.evaluation import EvaluateConfig
from audiolm.config.lm import SamplesConfig
from audiolm.config.run import ClusterConfig
from audiolm.config.tokens import TokensConfig
from audiolm.dag.execute import run_step
from audiolm.dag.outputs import damaged, take_back
from audiolm.dag.step import Artifact, Step
from audiolm.data import clips as clips_data
from audiolm.data import token_index, tokens
from audiolm.eval.steps.codec import flat_facts, measure_codec
from audiolm.eval.steps.stages import run_evaluate
from audiolm.lm.layouts import build_stages
from audiolm.lm.model import build_lm, export_lm
from audiolm.tokenizers import encode
from audiolm.tokenizers.base import TokenSpec, padded_samples
from tests.worlds.basics import RecordingOut
from tests.worlds.encoded_corpus import N_Q, RATE, SHAPE, STAGES, VOCAB, K, run_encode


def test_both_stores_belong_together_and_hold_every_clip(world, encoded):
    semantic, acoustic = (tokens.TokenStore(str(world.root / f"{w}_tokens")) for w in ("semantic", "acoustic"))
    tokens.check_pair(semantic, acoustic)
    for k in range(3):
        found = semantic.read(k, ["id", "n_frames"])
        expected = [c for c in world.clips if c.shard == k]
        assert list(found["id"]) == [c.id for c in expected]
        assert list(found["n_frames"]) == [padded_samples(c.samples) // 640 for c in expected]
    assert (acoustic.meta["device"], acoustic.meta["manifest"]) == ("cpu", "manifest.0001")
    assert semantic.hash != acoustic.hash and len(acoustic.hash) == 16


def test_facts_of_the_token_steps(world, encoded):
    frames = sum(padded_samples(c.samples) // 640 for c in world.clips)
    assert encoded["semantic"]["frames"] == frames and encoded["acoustic"]["frames"] == 2 * frames
    assert encoded["semantic"]["clips"] == len(world.clips) and encoded["acoustic"]["shards"] == 3
    assert encoded["semantic"]["mean_run"] == pytest.approx(frames / encoded["semantic"]["tokens_dedup"], abs=1e-4)
    for q in range(N_Q):
        assert 2 <= encoded["acoustic"][f"used.q{q:02d}"] <= VOCAB
        assert 0 < encoded["acoustic"][f"entropy_bits.q{q:02d}"] <= math.log2(VOCAB)
    assert all(isinstance(v, int | float) for v in encoded["acoustic"].values())


def test_finished_shards_are_skipped_and_others_made_again(world, encoded, tmp_path, monkeypatch):
    out, started, encode_shard = RecordingOut(tmp_path), [], encode.encode_shard
    run_encode(world, "acoustic", out)
    index = store.get(f"{tmp_path}/{token_index.NAME}")
    monkeypatch.setattr(encode, "encode_shard", lambda job, shard: started.append(shard) or encode_shard(job, shard))
    before = {k: store.get(f"{tmp_path}/{tokens.shard_name(k)}") for k in range(3)}
    assert before[0] == store.get(str(world.root / "acoustic_tokens" / tokens.shard_name(0)))  # same bits again
    store.remove(f"{tmp_path}/{tokens.shard_name(1)}")
    foreign = store.get(str(world.root / "semantic_tokens" / tokens.shard_name(2)))
    store.put(f"{tmp_path}/{tokens.shard_name(2)}", foreign)
    facts = run_encode(world, "acoustic", out)
    assert facts["shards_skipped"] == 1 and started == [1, 2]  # a finished shard gets no task
    assert store.get(f"{tmp_path}/{token_index.NAME}") == index
    assert {k: store.get(f"{tmp_path}/{tokens.shard_name(k)}") for k in range(3)} == before
    assert {k: v for k, v in facts.items() if "second" not in k and k not in ("x_realtime", "shards_skipped")} == {
        k: v for k, v in encoded["acoustic"].items() if "second" not in k and k not in ("x_realtime", "shards_skipped")}
    made_s = sum(c.seconds for c in world.clips if c.shard != 0)
    assert facts["x_realtime"] * facts["seconds"] == pytest.approx(made_s, rel=0.05)  # not of what was there
    assert "x_realtime" not in run_encode(world, "acoustic", out)


def test_a_lost_index_is_missed_and_made_again_without_a_task(world, tmp_path):
    inputs = {n: Artifact(str(world.root / n), f"{n}.0001", {}) for n in ("manifest", "codec")}
    config = {"which": "acoustic", "tokens": TokensConfig(batch_s=4.0), "corpus": world.corpus, "seed": 0,
              "cluster": ClusterConfig(device="cpu")}
    step = Step("acoustic_tokens", encode.encode_tokens, config, part="shard")
    made = run_step(step, str(tmp_path), inputs, inline=True)
    index = store.get(f"{made.path}/{token_index.NAME}")
    store.remove(f"{made.path}/{token_index.NAME}")
    assert (bad := damaged(made.path)) == [token_index.NAME]
    take_back(made.path, bad, step.part)
    again = run_step(step, str(tmp_path), inputs, inline=True)
    assert (again.build, again.facts["shards_skipped"]) == (made.build, 3) and "x_realtime" not in again.facts
    assert store.get(f"{again.path}/{token_index.NAME}") == index and tokens.TokenStore(again.path).shards == 3


def test_the_next_batch_is_decoded_while_one_is_encoded(world):
    clips = [c for c in world.clips if c.shard == 0]
    order = [clips[i].id for batch in encode.plan_batches([c.samples for c in clips], 0.1) for i in batch]
    read = {name: threading.Event() for name in order}
    folders, encoded = {"a": str(world.root / "audio")}, []
    class Slow:
        spec = TokenSpec("slow", RATE, 640, 1, 2)

        def encode(self, wav_BT, lengths_B):
            encoded.append(int(lengths_B))
            if len(encoded) < len(order):
                assert read[order[len(encoded)]].wait(20), "nothing is decoded meanwhile"
            return [torch.zeros(padded_samples(int(lengths_B)) // 640, 1, dtype=torch.int64)]

    codes = encode.encode_clips(clips, Slow(), lambda clip: (clips_data.read_clip(clip, folders), read[clip.id].set())[0], 0.1,
                                "cpu")
    assert encoded == sorted(c.samples for c in clips) and len(encoded) == len(codes) == 4


def test_batches_are_a_rule_of_the_shard_and_bounded():
    samples = [16_000, 640, 48_000, 1, 32_000, 641, 200_000]
    plan = encode.plan_batches(samples, 4.0)
    assert sorted(i for b in plan for i in b) == list(range(7))
    for batch in plan:
        longest = max(padded_samples(samples[i]) for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= 4.0 * RATE
    assert plan[0] == [3, 1, 5, 0]


def test_a_collapsed_tokenizer_is_an_error(world, tmp_path, monkeypatch):
    class Constant:
        spec, hash = encode.TokenSpec("dead", RATE, 640, 1, K), "h"

        def encode(self, wav_BT, lengths_B):
            return [torch.full((padded_samples(int(n)) // 640, 1), 3) for n in lengths_B]

    monkeypatch.setattr(encode, "load_tokenizer", lambda *a: Constant())
    with pytest.raises(tokens.TokenError, match="semantic tokenizer collapsed: level 1 uses 1 of 8.*kmeans step"):
        run_encode(world, "semantic", RecordingOut(tmp_path))


def test_a_tokenizer_that_breaks_the_length_contract_is_named(world, tmp_path, monkeypatch):
    class Short:
        spec, hash = encode.TokenSpec("short", RATE, 640, 1, K), "h"

        def encode(self, wav_BT, lengths_B):
            return [torch.zeros(int(n) // 640, 1, dtype=torch.int64) for n in lengths_B]

    monkeypatch.setattr(encode, "load_tokenizer", lambda *a: Short())
    with pytest.raises(tokens.TokenError, match=r"clip a/train-\d: tokenizer 'short' gave shape"):
        run_encode(world, "semantic", RecordingOut(tmp_path))


def test_evaluate_fills_every_table(world, encoded, tmp_path):
    torch.manual_seed(1)
    for name, stage in build_stages(STAGES, N_Q, VOCAB, K).items():
        weights, about = export_lm(build_lm(stage, SHAPE), stage)
        store.put(str(world.root / name / "export" / "model.safetensors"), safetensors.torch.save(weights))
        store.put_json(str(world.root / name / "export" / "config.json"), about)
    names = ("manifest", "kmeans", "codec", "semantic_tokens", "acoustic_tokens", "lm_semantic", "lm_coarse", "lm_fine")
    config = {"evaluate": EvaluateConfig(clips=2, clip_s=1.0, rows=4), "samples": SamplesConfig(prompt_s=0.4), "lm": STAGES,
              "corpus": world.corpus, "cluster": ClusterConfig(device="cpu"), "seed": 0}
    facts = run_evaluate(config, {n: SimpleNamespace(path=str(world.root / n)) for n in names}, RecordingOut(tmp_path))
    table = store.get_json(f"{tmp_path}/evaluate.json")
    assert [r["level"] for r in table["stages"]["lm_fine"]["levels"]] == [3]
    for name, figures in table["stages"].items():
        of = ("unigram", "bigram", "fivegram") if name == "lm_semantic" else ("unigram", "previous")
        assert figures["tokens"] > 0 and all(0 < figures[k] < 10 for k in ("loss", *of, "baseline"))
        assert facts[f"{name}.{of[1]}"] == pytest.approx(figures[of[1]], abs=1e-6)
    above = {(name, row.get("level")): 100 * (row["loss"] / row["baseline"] - 1) for name, figures in table["stages"].items()
             for row in (figures, *figures.get("levels", ())) if row["loss"] >= row["baseline"]}
    assert {(r["stage"], r["level"]): r["percent"] for r in table["not_under"]} == pytest.approx(above, abs=1e-6)
    for row in table["not_under"]:  # nothing was trained
        name = ".".join(["over_baseline", row["stage"], *([f"level{row['level']}"] if row["level"] else [])])
        assert facts[name] == pytest.approx(row["percent"], abs=1e-6)
    assert {"stage": "lm_coarse", "level": 1} in [{k: r[k] for k in ("stage", "level")} for r in table["not_under"]]
    assert set(table["conditioning"]) == {"lm_coarse", "lm_fine"}
    assert set(table["tokens"]) == {"entropy_bits", "perplexity", "mean_run", "used"}
    rungs = [r["rung"] for r in table["ladder"]]
    assert rungs == ["original", "codec, 3 levels", "codec, 2 levels", "fine from true coarse",
                     "coarse from true semantic", "continuation"]
    assert table["ladder"][0]["mel"] == 0 and all(r["mel"] > 0 for r in table["ladder"][1:])
    for row in table["ladder"]:
        assert [f["clip"] for f in row["files"]] == ["a/test-0", "a/test-1"]  # those of a second or more
        for file in row["files"]:
            wav, rate = soundfile.read(f"{tmp_path}/{file['file']}")
            assert (len(wav), rate) == (RATE, RATE) and np.isfinite(wav).all()
    assert facts["lm_coarse.loss"] == pytest.approx(table["stages"]["lm_coarse"]["loss"], abs=1e-6)
    assert all(isinstance(v, float) for v in facts.values())


def test_codec_figures_beside_the_original_and_opus(world, tmp_path):
    want = CodecMetricsConfig(where=ClipFilter(), clips=2, clip_s=1.0, coarse_levels=2, visqol=False, with_lyra=False,
                              lyra=None)
    config = {"figures": want, "corpus": world.corpus, "cluster": ClusterConfig(device="cpu")}
    inputs = {n: SimpleNamespace(path=str(world.root / n)) for n in ("manifest", "codec")}
    facts = measure_codec(config, inputs, RecordingOut(tmp_path))
    table = store.get_json(f"{tmp_path}/codec.json")
    assert [r["n_q"] for r in table["levels"]] == [1, 2, 3]
    assert table["levels"][-1]["kbps"] == pytest.approx(50 * 3 * 4 / 1000)
    assert [u["level"] for u in table["usage"]] == [1, 2, 3]
    assert {r["codec"].split(" (")[0] for r in table["rows"]} == {"identity", "Opus", "this codec"}
    gains = [r["gain"] for r in table["levels"]]
    mels = [r["mel"] for r in table["levels"]]
    assert gains[0] is None and gains[1:] == pytest.approx([mels[0] - mels[1], mels[1] - mels[2]], abs=1e-6)
    assert table["levels_that_do_not_help"] == [q for q, gain in zip((2, 3), gains[1:], strict=True) if gain <= 0]
    assert facts["levels_that_do_not_help"] == len(table["levels_that_do_not_help"])
    assert table["absent"]["Lyra v2"].startswith("no folder") and "evaluate.wer" in table["absent"]["wer"]
    assert [p["clip"] for p in table["players"]] == ["a/test-0", "a/test-1"]
    for player in table["players"]:
        labels = [f["label"] for f in player["files"]]
        assert labels[:4] == ["original", "1 level, 0.2 kb/s", "2 levels, 0.4 kb/s", "3 levels, 0.6 kb/s"]
        assert labels[4].startswith("Opus") and labels[4].endswith("6 kb/s")
        for file in player["files"]:  # under ui/, so that the tracker shows them
            assert file["file"].startswith("ui/codec/") and (tmp_path / file["file"]).with_suffix(".png").exists()
            assert soundfile.info(f"{tmp_path}/{file['file']}").frames == RATE


def test_levels_that_do_not_help_are_counted():
    figures = {"pesq": None, "stoi": None, "si_sdr": 3.0, "mel": 0.5, "wer": None}
    table = {"visqol": None, "mean_spectrum_mel": 1.0, "levels": [{**figures, "mel": 9.0}, figures],
             "levels_that_do_not_help": [2, 4]}
    assert flat_facts(table) == {"si_sdr": 3.0, "mel": 0.5, "mean_spectrum_mel": 1.0, "levels_that_do_not_help": 2.0}
