"""The tiny pipeline with a parallel decoder in place of the acoustic stages, and a decoder that hears, from audio to report."""

from __future__ import annotations

import numpy as np
import pytest

from audiolm import store
from audiolm.config.load import load_config
from audiolm.dag.execute import execute
from audiolm.dag.plan import plan
from audiolm.dag.run_index import SYSTEM_STEPS, missing_of
from audiolm.eval.stage_gates import failures
from audiolm.generate.load import load
from audiolm.generate.long_form import stream
from tests.worlds.basics import ROOT
from tests.worlds.tiny_system import voice
from workflows.full_pipeline import graph

TRAIN = "{steps: 8, batch: 4, lr: 2.0e-3, eval_every: 4, save_every: 4, log_every: 1, export: best, engine: torch}"
PARALLEL = ["tracking=none", "cluster={workers: 1, device: cpu, threads: 1}", "lm.acoustic=parallel",
            f"lm.parallel={{crop_s: 2.0, dim: 32, layers: 2, heads: 2, ff: 64, gates: warn, train: {TRAIN}}}",
            f"lm.decoder={{crop_s: 1.0, width: 16, layers: 1, train: {TRAIN}}}", "lm.semantic.train.engine=torch",
            "semantic.model.train.engine=torch", "codec.train.engine=torch",
            "tables.suites=[attention, temperatures]", "tables.temperatures=[0.8]", "tables.utterances=1"]

SYSTEM = ("kmeans", "codec", "semantic_tokens", "lm_semantic", "lm_parallel", "lm_decoder")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("parallel"))
    cfg = load_config(str(ROOT / "tests" / "e2e.yaml"), [*PARALLEL, f"store={folder}"])
    steps = graph(cfg)
    execute(plan(steps, folder), folder, inline=True)
    return {row.step.name: row.state.artifact for row in plan(steps, folder)}


def test_it_ends_in_samples_and_a_report(run):
    assert "lm_parallel" in run and not {"lm_coarse", "lm_fine"} & run.keys()
    assert missing_of(SYSTEM_STEPS, run) == []
    assert missing_of(SYSTEM_STEPS, run.keys() - {"lm_parallel", "codec"}) == ["codec", "lm_coarse"]
    samples = store.get_json(store.join(run["samples"].path, "samples.json"))
    assert [s["mode"] for s in samples[::2]] == ["unconditional", "acoustic", "continuation", "resynthesis"]
    assert all(s["seconds"] > 0 for s in samples if s["mode"] != "unconditional")
    page = store.get(store.join(run["report"].path, "ui", "report.html")).decode()
    assert "parallel decoder" in page and "hearing decoder" in page and "coarse stage" not in page


def test_its_losses_stand_beside_baselines_and_gates(run):
    table = store.get_json(store.join(run["evaluate"].path, "evaluate.json"))
    figures = table["stages"]["lm_parallel"]
    assert [level["level"] for level in figures["levels"]] == [1, 2, 3]
    assert all(level["unigram"] > 0 and level["previous"] > 0 for level in figures["levels"])
    assert np.mean([level["loss"] for level in figures["levels"]]) == pytest.approx(figures["loss"])
    assert figures["loss"] == pytest.approx(run["lm_parallel"].facts["val.loss"], rel=1e-5)
    assert table["conditioning"]["lm_parallel"].keys() == {"true", "shuffled", "se"}
    rungs = [rung["rung"] for rung in table["ladder"]]
    assert rungs == ["original", "codec, 3 levels", "parallel from true semantic", "continuation"]
    gates = store.get_json(store.join(run["lm_parallel"].path, "gates.json"))
    assert gates.keys() == {"semantic_tokens", "acoustic_tokens", "unigram", "conditioning"}
    assert all("lm_parallel" not in text for text in failures(run["lm_parallel"].path))


def test_sounds_beyond_the_crop(run):
    lm = load({name: run[name].path for name in SYSTEM})
    prompt = voice(1.0)
    whole = lm.continuation([prompt], 4.0, [3], may_end=False)[0]  # the decoder's crop is 2 s
    np.testing.assert_array_equal(whole.codes_TQ[:50], lm.encode([prompt])[0])
    assert whole.codes_TQ.shape == (250, 3)
    np.testing.assert_array_equal(whole.wav_T[:12_000], lm.decode(whole.codes_TQ[:50], 16_000)[:12_000])
    pieces = list(stream(lm, prompt, 12.0, 3, may_end=False, window_s=4.0))
    assert len(pieces) > 3 and sum(map(len, pieces)) == 13 * 16_000
    assert lm.spent_s["parallel"] > 0 and "coarse" not in lm.spent_s


def test_drawn_codes_are_heard_with_their_tokens_and_recorded_ones_are_not(run):
    paths = {name: run[name].path for name in SYSTEM}
    lm, plain = load(paths), load({name: path for name, path in paths.items() if name != "lm_decoder"})
    wav = voice(2.0)
    heard, own = (each.acoustic(each.tokenize([wav]), [3])[0] for each in (lm, plain))
    np.testing.assert_array_equal(heard.codes_TQ, own.codes_TQ)
    assert np.abs(heard.wav_T - own.wav_T).max() > 1e-4
    np.testing.assert_array_equal(lm.resynthesis([wav])[0].wav_T, plain.resynthesis([wav])[0].wav_T)
