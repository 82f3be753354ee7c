"""Word error rate of a codec: references, sums, one transcript a version, what cannot be measured; and the codec's gates,
which stop the acoustic stages, can be forced, and measure once.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from audiolm import store
from audiolm.config.codec import CodecMetricsConfig
from audiolm.config.corpus import ClipFilter, CorpusConfig
from audiolm.config.load import load_config
from audiolm.config.run import ClusterConfig
from audiolm.dag.execute import StepFailed, execute
from audiolm.dag.plan import plan
from audiolm.dag.step import Step
from audiolm.data.clips import Clip, Part, clips_parquet
from audiolm.eval import codec_quality, codec_wer, stage_gates
from audiolm.eval.codec_gates import levels_verdict, wer_verdict
from audiolm.eval.codec_wer import Spoken
from audiolm.eval.models import asr
from audiolm.eval.models.baseline_codecs import Baseline
from audiolm.eval.steps import codec as codec_step
from audiolm.eval.steps.codec import flat_facts, spoken_clips
from tests.eval.test_codec_quality import RATE, Noisy, noise, voice
from tests.worlds.basics import ROOT
from workflows.full_pipeline import graph as full_graph

SAID = "it was the best of times it was the worst".split()  # ten words


@pytest.fixture
def recogniser(monkeypatch):
    """Stands in for Whisper: the louder the noise, the fewer words; keeps how many wavs it was given."""
    for name in ("jiwer", "transformers"):
        pytest.importorskip(name)
    calls = SimpleNamespace(n=0, words=len(SAID))

    def recognise(wav_T: np.ndarray) -> str:
        calls.n += 1
        share = 1 - 10 * float(np.sqrt(np.mean(np.square(wav_T[-1600:]))))  # the voices end in silence
        return " ".join(SAID[:round(calls.words * max(share, 0.0))])

    monkeypatch.setattr(asr, "missing_dependency", lambda path=None: None)
    monkeypatch.setattr(asr, "recogniser", lambda path=None, device="cpu": recognise)
    return calls


def spoken_voice(index: int) -> np.ndarray:
    return np.concatenate([voice(RATE, index), np.zeros(1600, np.float32)])


def test_the_column_of_original_baselines_and_levels_and_what_it_is_against(recogniser):
    wavs, baseline = [spoken_voice(i) for i in range(3)], Baseline("halved", 3.0, lambda wav: (
        wav + 0.03 * noise(len(wav)), 1500 * len(wav) // RATE))
    codec = Noisy((0.8, 0.5, 0.2, 0.0))
    texts = [" ".join(SAID), " ".join([*SAID, *SAID]), " ".join(SAID)]
    table = codec_quality.compare(codec, wavs, [baseline], levels=[1, 3, 4], with_visqol=False,
                                  spoken=Spoken(wavs, texts))
    assert recogniser.n == 3 * (1 + 1 + 3)  # each version of a clip once, and not the level that is not measured
    identity, *others = table["rows"]
    assert identity["wer"] == pytest.approx(100 * 10 / 40)  # errors over words of all clips
    low, high = identity["wer_interval"]
    assert low == 0 and high == pytest.approx(50)
    assert [r["wer"] for r in table["levels"]][1] is None
    ours = [r["wer"] for r in table["rows"] if r["codec"] == "this codec"]
    assert ours == sorted(ours, reverse=True) and ours[0] > 75 and ours[-1] == identity["wer"]
    assert next(r["wer"] for r in others if r["codec"] == "halved") > identity["wer"]
    assert "WER: 3 utterances, 40 words, by Whisper tiny.en, against their texts." in codec_quality.notes(table)
    assert flat_facts(table)["wer"] == 25.0


def test_without_texts_the_transcript_of_the_original_is_the_reference(recogniser):
    wavs = [spoken_voice(0), spoken_voice(1), np.ones(RATE, np.float32)]  # nothing is heard in the last one
    table = codec_quality.compare(Noisy((0.5, 0.0)), wavs, levels=[1, 2], with_visqol=False, spoken=Spoken(wavs))
    assert recogniser.n == 3 + 2 * 2
    assert [r["wer"] for r in table["rows"]] == [0.0, pytest.approx(50, abs=10), 0.0]
    assert table["wer"] == {"clips": 2, "words": 20, "reference": "transcripts", "asr": "Whisper tiny.en"}
    assert "WER is 0 for that reason" in " ".join(codec_quality.notes(table))


def test_without_words_or_packages_the_column_is_absent(recogniser, monkeypatch):
    wav = spoken_voice(0)
    recogniser.words = 0
    table = codec_quality.compare(Noisy((0.1,)), [wav], with_visqol=False, spoken=Spoken([wav]))
    assert table["absent"]["wer"] == codec_wer.NO_WORDS and table["wer"] is None and "wer" not in flat_facts(table)
    assert all(r["wer"] is None for r in (*table["rows"], *table["levels"]))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "jiwer", None)
    monkeypatch.setattr(asr.importlib.util, "find_spec", lambda name: None)
    table = codec_quality.compare(None, [wav], with_visqol=False, spoken=Spoken([wav]))
    assert "jiwer" in table["absent"]["wer"] and asr.INSTALL in table["absent"]["wer"]
    assert "No WER %: " in " ".join(codec_quality.notes(table))


def test_the_step_takes_whole_utterances_with_a_text_else_the_clips_at_hand(tmp_path):
    soundfile.write(tmp_path / "long.wav", voice(9 * RATE), RATE)
    want = CodecMetricsConfig(where=ClipFilter(), clips=2, clip_s=1.0, coarse_levels=2, visqol=False, with_lyra=False,
                              wer=1, lyra=None)
    wavs = [voice(RATE), voice(RATE, 1)]

    def spoken(*texts: str | None) -> Spoken:
        """Of a clip of two utterances of 4.5 s with these texts."""
        parts = tuple(Part(f"p{i}", "long.wav", i * 72_000, 72_000, i * 72_000, text) for i, text in enumerate(texts))
        clip = Clip("a/long", "a", "a", "ann", "test", RATE, 2 * 72_000, parts, 0, 0)
        store.put(str(tmp_path / "clips.parquet"), clips_parquet([clip]))
        return spoken_clips(want, {"a": str(tmp_path)}, str(tmp_path), wavs, "cpu")

    found = spoken(None, "these words alone")
    assert found.texts == ["these words alone"] and len(found.wavs[0]) == 72_000 // 640 * 640
    found = spoken(None, None)
    assert found.texts is None and len(found.wavs) == 1 and found.wavs[0] is wavs[0]


def table(wer: float | None = 100.0, original: float = 5.0, opus: float | None = 10.0, perplexity: float = 30.0) -> dict:
    """Of codec_quality.compare, as far as gates and facts read it."""
    level = {"n_q": 2, "pesq": 1.1, "stoi": 0.5, "si_sdr": -3.0, "mel": 0.7, "wer": wer}
    rows = [{"codec": name, "wer": value if wer is not None else None}
            for name, value in (("identity", original), ("Opus", opus), ("this codec", wer))]
    return {"rows": rows, "levels": [{**level, "wer": None}, level], "visqol": None, "mean_spectrum_mel": 1.0, "seconds": 24.0,
            "wer": None if wer is None else {"clips": 2, "words": 30, "reference": "texts", "asr": "Whisper tiny.en"},
            "usage": [{"level": q, "used": 60, "share": 60 / 64, "perplexity": perplexity} for q in (1, 2)],
            "levels_that_do_not_help": [], "absent": {}, "players": []}


@pytest.mark.parametrize(("found", "ok"), [
    (table(wer=59.0), True), (table(wer=61.0), False),
    (table(wer=None), None),  # packages are missing, or it is music
    (table(wer=100.0, original=90.0), None),  # a recogniser of another language
    (table(wer=100.0, original=0.0, opus=80.0), None),  # as well, without texts
    (table(wer=100.0, original=0.0, opus=None), False),
])
def test_a_codec_is_judged_by_its_words_where_the_recogniser_understands_the_originals(found, ok):
    verdict = wer_verdict(found)
    assert (verdict and verdict["ok"]) == ok


def test_collapsed_levels_are_named():
    assert levels_verdict(table())["ok"]
    found = levels_verdict(table(perplexity=6.0))
    assert not found["ok"] and "level 1 uses 60 of 64 codes and 2.58 of 6.00 bits; level 2" in found["text"]


@pytest.fixture
def measured(monkeypatch):
    """Plants the table that the step measures; a list of the measurements made."""
    planted = [table()]
    calls = []

    def part(*args):
        calls.append(args)
        return planted[0]

    monkeypatch.setattr(codec_step, "codec_part", part)
    return planted, calls


def graph(gates: str = "stop") -> list[Step]:
    want = CodecMetricsConfig(where=ClipFilter(), clips=2, clip_s=1.0, coarse_levels=1, visqol=False, with_lyra=False,
                              lyra=None, gates=gates)
    config = {"figures": want, "cluster": ClusterConfig(device="cpu", threads=1),
              "corpus": CorpusConfig(name="x", sources=[{"kind": "folder", "name": "x", "root": "/nowhere"}])}
    codec, tokens = Step("codec", lambda *args: {}), Step("acoustic_tokens", lambda *args: {})
    figures = Step("codec_figures", codec_step.measure_codec, config, (codec,))
    return [codec, tokens, figures, Step("lm_coarse", lambda *args: {}, {}, (tokens,), after=(figures,))]


def go(steps: list[Step], folder: str, force: tuple[str, ...] = ()) -> dict:
    return execute(plan(steps, folder, force=force), folder, inline=True, force=force)


STOPPED = (r"step codec_figures failed: GateFailed: the codec is not understood: .* 100 % of the words wrong.*Look at .*"
           r"\(the measurements are kept\): --force codec_figures; to be told only: codec.gates=warn")


def test_a_codec_that_is_not_understood_stops_before_the_stages_and_force_goes_on(measured, tmp_path):
    folder = str(tmp_path)
    for _ in range(2):
        with pytest.raises(StepFailed, match=STOPPED):
            go(graph(), folder)
    assert len(measured[1]) == 1  # the rerun measures nothing
    assert plan(graph(), folder)[-1].state.artifact is None  # no stage was trained
    built = go(graph(), folder, force=("codec_figures",))
    assert "lm_coarse" in built and len(measured[1]) == 1
    facts = built["codec_figures"].facts
    assert facts["gate/failed"] == 1 and "GATE the codec is not understood" in facts["notes"][0] and facts["wer"] == 100.0
    assert store.get_json(f"{built['codec_figures'].path}/gates.json")["wer"]["forced"]
    assert stage_gates.failures(built["codec_figures"].path)[0].endswith("(forced)")


def test_a_gate_that_only_warns_goes_on_and_is_the_same_step(measured, tmp_path):
    built = go(graph("warn"), str(tmp_path))
    assert "lm_coarse" in built and built["codec_figures"].facts["gate/failed"] == 1
    assert stage_gates.failures(built["codec_figures"].path)[0].endswith("(told only)")
    assert graph("warn")[2].fingerprint == graph()[2].fingerprint


def test_without_a_recogniser_the_gate_is_silent_and_collapsed_codes_stop_all_the_same(measured, tmp_path):
    measured[0][0] = table(wer=None)
    assert go(graph(), f"{tmp_path}/a")["codec_figures"].facts["gate/failed"] == 0
    measured[0][0] = table(wer=None, perplexity=2.0)
    with pytest.raises(StepFailed, match="the codec's codes collapsed: level 1 uses 60 of 64 codes and 1.00 of 6.00 bits"):
        go(graph(), f"{tmp_path}/b")


def test_the_stages_come_after_the_gate_and_keep_their_recipe():
    cfg = load_config(str(ROOT / "workflows" / "speech.yaml"))
    steps = {s.name: s for s in full_graph(cfg)}
    assert {name for name, s in steps.items() if s.after} == {"lm_semantic", "lm_coarse", "lm_decoder"}
    assert all(s.after == (steps["codec_figures"],) for s in steps.values() if s.after)
    others = {s.name: s for s in full_graph(cfg.model_copy(update={"evaluate": cfg.evaluate.model_copy(update={"wer": 3})}))}
    assert others["codec_figures"].fingerprint != steps["codec_figures"].fingerprint
    assert others["lm_coarse"].fingerprint == steps["lm_coarse"].fingerprint
